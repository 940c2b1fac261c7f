"""Every weight of a model stands in one of three lists, and what the report counts is what is there."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsegpt.driver.accounting import in_braces
from sparsegpt.settings.recipe import parse_recipe
from tests.architectures import VARIANTS, WRAPPERS, block_matrices, stored_keys, tiny_variant, tiny_wrapper
from tests.support import prune_model, random_windows, refused, tiny_model, weights_of


def of_all(lists) -> dict[str, int]:
    """Weights by parameter, all lists together."""
    found: dict[str, int] = {}
    for counts in (lists.pruned, *lists.left_dense_by_choice.values(), *lists.not_prunable.values()):
        for name, count in counts.items():
            found[name] = found.get(name, 0) + count
    return found


def sizes_of(model) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def prune(model, sparsity="2:4", **options):
    return prune_model(model, random_windows(), sparsity, preset="paper", **options)


@pytest.mark.parametrize("variant", [*VARIANTS, *WRAPPERS])
def test_the_three_lists_hold_every_parameter_whole(variant):
    model = tiny_wrapper(variant) if variant in WRAPPERS else tiny_variant(variant)
    report = prune(model)
    assert of_all(report.parameters) == sizes_of(model)
    assert report.parameters.total == sum(sizes_of(model).values())
    assert report.parameters.pruned.keys() == stored_keys(block_matrices(model)) & sizes_of(model).keys()
    reasons = set(report.parameters.not_prunable)
    assert reasons <= {
        "a norm, a bias or another vector",
        "a router or a gate of experts",
        "the embedding",
        "outside of the decoder blocks",
        "a kernel of a convolution",
    }
    assert not [line for line in report.warnings if "dense" in line]


def test_what_is_left_dense_by_choice_says_by_which():
    recipe = parse_recipe('[[rule]]\nmodules = "v_proj"\nskip = true\n')
    model = tiny_model("llama")
    report = prune(model, only_blocks="1", select=lambda name: "q_proj" not in name, recipe=recipe)
    choice = report.parameters.left_dense_by_choice
    assert choice["not selected"] == {"model.layers.1.self_attn.q_proj.weight": 32 * 32}
    assert choice["left dense by the recipe"] == {"model.layers.1.self_attn.v_proj.weight": 16 * 32}
    assert len(choice["in a block that was not selected"]) == 7
    assert choice["the output layer, which was not asked for"] == {"lm_head.weight": 96 * 32}
    assert of_all(report.parameters) == sizes_of(model)
    assert not [line for line in report.warnings if "stay dense" in line]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_the_output_layer_counts_once_and_where_it_belongs(tied, head):
    model = tiny_model("llama", tie_word_embeddings=tied)
    report = prune(model, include_head=head)
    assert of_all(report.parameters) == sizes_of(model)
    assert ("lm_head.weight" in report.parameters.pruned) == head
    assert report.parameters.not_prunable["the embedding"] == {"model.embed_tokens.weight": 96 * 32}


def test_a_parameter_of_which_some_experts_are_pruned_is_parted():
    model = tiny_variant("mixtral")
    report = prune(model, select=lambda name: ".experts.0." not in name)
    name = "model.layers.0.mlp.experts.down_proj"
    whole = model.get_parameter(name).numel()
    assert report.parameters.pruned[name] == whole * 3 // 4
    assert report.parameters.left_dense_by_choice["not selected"][name] == whole // 4
    assert of_all(report.parameters) == sizes_of(model)


@pytest.mark.parametrize("shared", ["parameter", "memory"])
def test_a_weight_of_two_linears_stays_dense_and_is_named(shared):
    model = tiny_model("llama", num_hidden_layers=3)
    layers, name = model.model.layers, "model.layers.1.mlp.up_proj.weight"
    if shared == "parameter":
        layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    else:
        layers[1].mlp.up_proj.weight = torch.nn.Parameter(layers[0].mlp.up_proj.weight.detach())
    before = model.get_parameter(name).clone()
    report = prune(model)
    assert torch.equal(model.get_parameter(name), before)
    assert {layer.name for layer in report.layers}.isdisjoint({"model.layers.0.mlp.up_proj", name[:-7]})
    (told,) = [line for line in report.warnings if "stay dense" in line]
    assert "shared with" in told
    assert of_all(report.parameters) == sizes_of(model)


@pytest.mark.parametrize(("blocks", "reason"), [(2, "no linear layer that can be pruned"), (3, "runs 2 times")])
def test_a_block_that_runs_twice_is_refused(blocks, reason):
    model = tiny_model("llama", num_hidden_layers=blocks)
    model.model.layers[1] = model.model.layers[0]
    before = weights_of(model)
    with refused(reason):
        prune(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_linear_whose_weight_is_read_without_a_call_stays_dense_and_is_named():
    model = tiny_model("llama")
    for layer in model.model.layers:
        up = layer.mlp.up_proj
        layer.mlp.act_fn = Reading(up)
        up_weight = up.weight
        layer.mlp.up_proj = torch.nn.Identity()
        layer.mlp.unused = up
        layer.mlp.down_proj = torch.nn.Linear(32, 32, bias=False)
        layer.mlp.gate_proj = torch.nn.Linear(32, 32, bias=False)
        assert up.weight is up_weight
    before = model.model.layers[0].mlp.unused.weight.clone()
    report = prune(model)
    name = "model.layers.0.mlp.unused.weight"
    assert torch.equal(model.get_parameter(name), before)
    (reason,) = [why for why, counts in report.parameters.not_prunable.items() if name in counts]
    assert "never called" in reason
    assert any("never called" in line and "model.layers.{0-1}.mlp.unused" in line for line in report.warnings)
    assert of_all(report.parameters) == sizes_of(model)


class Reading(torch.nn.Module):
    """Multiplies by a linear's weight behind its back."""

    def __init__(self, linear):
        super().__init__()
        self.__dict__["linear"] = linear

    def forward(self, inputs):
        return torch.relu(inputs @ self.__dict__["linear"].weight.T @ self.__dict__["linear"].weight)


# The report


def test_the_report_file_names_what_differs_in_numbers_alone_once():
    model = tiny_variant("qwen2_moe", num_hidden_layers=4)
    found = prune(model).as_dict()["parameters"]
    assert json.loads(json.dumps(found)) == found
    assert found["total"] == sum(sizes_of(model).values())
    assert "model.layers.{0-3}.mlp.experts.gate_up_proj" in found["pruned"]["names"]
    assert "model.layers.{0-3}.self_attn.q_proj.weight" in found["pruned"]["names"]
    lists = [found["pruned"], *found["left_dense_by_choice"], *found["not_prunable"]]
    assert sum(part["weights"] for part in lists) == found["total"]
    routers = [part for part in found["not_prunable"] if "router" in part["reason"]]
    assert routers[0]["names"] == [
        "model.layers.{0-3}.mlp.gate.weight",
        "model.layers.{0-3}.mlp.shared_expert_gate.weight",
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.up", "a.1.up", "a.2.up"], ["a.{0-2}.up"]),
        (["a.0.up", "a.2.up", "a.3.up"], ["a.{0,2-3}.up"]),
        (["a.0.e.0.w", "a.0.e.1.w", "a.1.e.0.w", "a.1.e.1.w"], ["a.{0-1}.e.{0-1}.w"]),
        (["a.0.e.0.w", "a.0.e.1.w", "a.1.e.0.w"], ["a.0.e.{0-1}.w", "a.1.e.0.w"]),
        (["w1.x", "w2.x"], ["w1.x", "w2.x"]),
        (["lm_head"], ["lm_head"]),
        ([], []),
    ],
)
def test_names_are_joined_by_their_numbers(names, expected):
    assert in_braces(names) == expected


def written_out(text: str) -> set[str]:
    """What a name with braces stands for."""
    head, brace, rest = text.partition("{")
    if not brace:
        return {text}
    ranges, _, tail = rest.partition("}")
    numbers: list[int] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return {f"{head}{number}{end}" for number in numbers for end in written_out(tail)}


@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1))
def test_joined_names_stand_for_exactly_the_names_there_were(numbers):
    names = {f"layers.{block}.experts.{expert}.w" for block, expert in numbers}
    joined = [written_out(line) for line in in_braces(names)]
    assert set().union(*joined) == names
    assert sum(map(len, joined)) == len(names)


# Zeros


@pytest.mark.parametrize("options", [{}, {"reconstruct": 1}, {"distill": 1}, {"reconstruct": 1, "distill": 1}])
@pytest.mark.parametrize("sparsity", ["2:4", "0.3"])
def test_zeros_are_counted_on_the_weights_that_are_left(options, sparsity):
    model = tiny_model("llama").to(torch.float16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:8] = 6e-8  # as small as float16 can say: some round to zero
    report = prune(model, sparsity, **options)
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        assert layer.zeros == pytest.approx(float((weight == 0).double().mean()), abs=1e-9), layer.name
    zeros = sum(int((model.get_submodule(layer.name).weight == 0).sum()) for layer in report.layers)
    assert report.density == pytest.approx(1 - zeros / sum(report.parameters.pruned.values()))


def test_a_weight_that_was_zero_before_counts_as_zero():
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[:32] = 0
    report = prune(model, 0.25)
    (layer,) = [layer for layer in report.layers if layer.name == "model.layers.0.mlp.up_proj"]
    assert layer.zeros == float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) >= 0.5
