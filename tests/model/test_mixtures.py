"""Mixtures of experts: one Hessian an expert, experts that few or no tokens reach, bounded memory, what stands in."""

import copy
import re

import pytest
import torch
from torch import nn

from sparsegpt.driver import stages
from sparsegpt.driver.stages import enough_tokens, plan_stages, waves
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import prunable_linears
from sparsegpt.model.unfuse import sources, unfused
from sparsegpt.sparsity import parse_sparsity
from tests.architectures import MIXTURES, block_matrices, expected_inputs, tiny_variant
from tests.more_architectures import CONFIGS
from tests.support import (
    assert_pattern,
    brute_layer_mask,
    crossed,
    logits_of,
    prune_model,
    random_windows,
    tiny_model,
    weights_of,
)


@pytest.fixture(params=MIXTURES)
def model(request):
    return tiny_variant(request.param)


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


# Few tokens


TWO_TOKENS = random_windows(1, 2)  # each goes to two experts at most: of four some stay idle, some get one token


@crossed("preset, sparsity", ("paper", "default"), ("0.5", "2:4"))
def test_an_expert_that_hardly_a_token_reaches_is_pruned_by_magnitude_and_reported(model, preset, sparsity):
    dense = {name: matrix.detach().clone() for name, matrix in block_matrices(model).items()}
    report = prune_model(model, TWO_TOKENS, sparsity, preset=preset)
    counts = {layer.name: layer.tokens for layer in report.layers}
    assert counts.keys() == dense.keys()
    assert 0 in counts.values()
    for name, matrix in block_matrices(model).items():
        assert_pattern(matrix, sparsity)
        if counts[name] >= 2:
            continue
        path, expert, linear = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", name).groups()
        kept = brute_layer_mask(dense[name].abs(), parse_sparsity(sparsity))
        assert torch.equal(matrix, dense[name].masked_fill(~kept, 0)), name
        told = [line for line in report.warnings if line.startswith(f"{path}.*.{linear}: ") and "magnitude" in line]
        assert len(told) == 1
        assert f" {expert}: {counts[name]}" in told[0]
    assert torch.isfinite(logits_of(model, random_windows())).all()
    if preset == "default":  # input by input: experts are chosen by what the pruned model goes on with
        assert counts == {name: len(rows) for name, rows in expected_inputs(model, TWO_TOKENS).items()}


def test_an_expert_that_only_a_later_micro_batch_reaches_uses_all_it_saw(model):
    windows = random_windows(10, 2)
    report = prune_model(model, windows, "2:4", micro_batch=1)
    expected = {name: len(rows) for name, rows in expected_inputs(model, windows).items()}
    assert {layer.name: layer.tokens for layer in report.layers} == expected
    assert max(tokens for name, tokens in expected.items() if ".experts." in name) > 4


@pytest.mark.parametrize(("width", "tokens"), [(16, 2), (64, 2), (128, 2), (129, 3), (4096, 64)])
def test_an_expert_needs_a_token_in_64_inputs(width, tokens):
    assert enough_tokens(width) == tokens


# Stages


def names(groups):
    return [name for group in groups for name in group]


GROUPS = [
    ("attn.q", "attn.k"),
    ("attn.o",),
    ("mlp.experts.0.gate_up_proj",),
    ("mlp.experts.0.down_proj",),
    ("mlp.experts.2.gate_up_proj",),
    ("mlp.experts.2.down_proj",),
    ("mlp.shared.down",),
    ("mlp.experts.1.gate_up_proj",),
    ("mlp.experts.1.down_proj",),
]


def test_experts_are_gathered_together_up_before_down():
    found = waves(GROUPS)
    assert [len(wave) for wave in found] == [1, 1, 3, 3, 1]
    assert {name.rsplit(".", 1)[1] for name in names(found[2])} == {"gate_up_proj"}
    assert {name.rsplit(".", 1)[1] for name in names(found[3])} == {"down_proj"}


@pytest.mark.parametrize("order", ["input", "block", "linear"])
@pytest.mark.parametrize("budget", [1, 4 * 8**2 * 2, 2**30])
def test_stages_hold_every_linear_once_and_experts_only_up_to_the_budget(order, budget, monkeypatch):
    monkeypatch.setattr(stages, "EXPERT_BYTES", budget)
    plan = plan_stages(waves(GROUPS), order, lambda name: 8)
    assert sorted(names(group for stage in plan for group in stage)) == sorted(names(GROUPS))
    most = max(1, budget // (4 * 8**2))
    assert all(sum("experts" in group[0] for group in stage) <= most for stage in plan)
    if order == "block":
        assert {"attn.q", "attn.o", "mlp.shared.down"} <= set(names(plan[0]))


@pytest.mark.parametrize("order", ["input", "linear"])
def test_the_budget_of_memory_changes_only_how_often_is_gathered(order, monkeypatch):
    results = []
    for budget in (1, 2**32):
        monkeypatch.setattr(stages, "EXPERT_BYTES", budget)
        model = tiny_variant("mixtral")
        prune_model(model, random_windows(40), "2:4", method="sparsegpt", order=order)
        results.append(block_matrices(model))
    for name, matrix in results[0].items():
        torch.testing.assert_close(matrix, results[1][name], rtol=1e-3, atol=1e-4)


def test_allocation_by_outliers_keeps_the_budget_over_experts(model):
    report = prune_model(model, random_windows(), 0.5, preset="fast", method="magnitude", allocation="owl")
    matrices = block_matrices(model)
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices.values())
    assert zeros == round(0.5 * sum(matrix.numel() for matrix in matrices.values()))
    assert len(report.layers) == len(matrices)


def test_half_precision_experts_come_back_from_reconstruction_in_their_own_parameters(model):
    model = model.to(torch.bfloat16)
    kept = {name: id(parameter) for name, parameter in model.named_parameters()}
    prune_model(model, random_windows(), "2:4", preset="paper", reconstruct=1)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == kept
    for matrix in block_matrices(model).values():
        assert matrix.dtype == torch.bfloat16
        assert_pattern(matrix, "2:4")
    assert all(tensor.dtype != torch.float32 or "inv_freq" in name for name, tensor in model.named_buffers())


# Standing in


@torch.no_grad()
def test_what_stands_in_computes_what_the_experts_do(model):
    tokens = random_windows()
    for implementation in ("eager",) if model.config.model_type == "llama4_text" else ("eager", "grouped_mm"):
        model.config._experts_implementation = implementation
        expected = logits_of(model, tokens)
        blocks = DecoderModel.of(model).blocks
        with unfused(blocks[0]), unfused(blocks[1]):
            assert all(type(module).__name__ == "_LoopedExperts" for module in experts_of(model).values())
            torch.testing.assert_close(logits_of(model, tokens), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits_of(model, tokens), expected)


@pytest.mark.parametrize("variant", ["gpt2", *MIXTURES])
def test_modules_and_parameters_come_back_the_same_also_after_an_exception(variant):
    model = tiny_variant(variant)
    before, modules = weights_of(model), dict(model.named_modules())
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    block = DecoderModel.of(model).blocks[1]
    with pytest.raises(ZeroDivisionError), unfused(block):
        assert {type(linear) for linear in prunable_linears(block).values()} <= {nn.Linear, _twin_of_conv1d()}
        _ = 1 / 0
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def _twin_of_conv1d():
    from sparsegpt.model import unfuse

    return unfuse._TransposedLinear


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("variant", ["gpt2", *MIXTURES])
@torch.no_grad()
def test_what_is_written_into_a_linear_lands_in_its_slice_alone(variant, moved):
    model = tiny_variant(variant)
    before = {name: matrix.clone() for name, matrix in block_matrices(model).items()}
    decoder = DecoderModel.of(model)
    block = decoder.blocks[1]
    with unfused(block):
        if moved:
            block.double()
        name, linear = list(prunable_linears(block).items())[-1]
        linear.weight[1, 2] = 7.0
        if moved:
            block.float()
    changed = {key for key, matrix in block_matrices(model).items() if not torch.equal(matrix, before[key])}
    assert changed == {decoder.prefix(1) + name}
    assert block_matrices(model)[decoder.prefix(1) + name][1, 2] == 7.0


# Other forms


class Packed(nn.Module):
    """Experts in a form that nothing is known of; computes what an expert each would."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.w1, self.w2 = experts.gate_up_proj, experts.down_proj
        self.act = experts.act_fn

    def forward(self, hidden, chosen, shares):
        result = torch.zeros_like(hidden)
        for expert in range(len(self.w1)):
            token, rank = torch.where(chosen == expert)
            gate, up = (hidden[token] @ self.w1[expert].T).chunk(2, dim=-1)
            result.index_add_(0, token, (self.act(gate) * up) @ self.w2[expert].T * shares[token, rank, None])
        return result


def test_experts_of_an_unknown_form_stay_dense_and_are_named_with_their_share():
    model = tiny_variant("mixtral")
    experts = Packed(model.model.layers[1].mlp.experts)
    model.model.layers[1].mlp.experts = experts
    before = weights_of(model)
    report = prune_model(model, random_windows(), "2:4", preset="paper")
    counts = {f"model.layers.1.mlp.experts.{name}": getattr(experts, name).numel() for name in ("w1", "w2")}
    assert [found for found in report.parameters.not_prunable.values() if counts.items() <= found.items()]
    matrices = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim > 1)
    (told,) = [line for line in report.warnings if "stay dense" in line]
    for part in (f"{sum(counts.values()) / matrices:.1%}", *counts, "experts", "Packed"):
        assert part in told
    for name in counts:
        assert torch.equal(model.get_parameter(name), before[name])
    assert_pattern(model.model.layers[0].mlp.experts.down_proj[0], "2:4")


def test_experts_that_the_user_leaves_out_are_no_surprise():
    model = tiny_variant("mixtral")
    model.model.layers[1].mlp.experts = Packed(model.model.layers[1].mlp.experts)
    for options in ({"only_blocks": "0"}, {"select": lambda name: "experts" not in name}):
        report = prune_model(copy.deepcopy(model), random_windows(), "2:4", preset="paper", **options)
        assert not [line for line in report.warnings if "stay dense" in line]


class Members(nn.Module):
    """A mixture whose list of experts and whose router have names of their own."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.n_routed_experts = experts
        self.chooser = nn.Linear(width, experts, bias=False)
        self.members = nn.ModuleList(nn.Sequential(nn.Linear(width, 16), nn.Linear(16, width)) for _ in range(experts))

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        shares, chosen = self.chooser(flat).softmax(-1).topk(2)
        result = torch.zeros_like(flat)
        for index, member in enumerate(self.members):
            token, rank = torch.where(chosen == index)
            if len(token):
                result.index_add_(0, token, member(flat[token]) * shares[token, rank, None])
        return result.view_as(hidden)


@pytest.mark.parametrize("order", ["input", "block", "linear"])
@pytest.mark.parametrize("windows", [TWO_TOKENS, random_windows()])
def test_experts_in_a_list_of_another_name_are_treated_as_routed(order, windows):
    torch.manual_seed(0)
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = Members(32, 5)
    routers = [layer.mlp.chooser.weight.clone() for layer in model.model.layers]
    report = prune_model(model, windows, "2:4", order=order)
    counts = {layer.name: layer.tokens for layer in report.layers if ".members." in layer.name}
    assert len(counts) == 2 * 5 * 2
    assert (0 in counts.values()) == (windows is TWO_TOKENS)
    for name in counts:
        assert_pattern(model.get_submodule(name).weight, "2:4")
    for layer, before in zip(model.model.layers, routers, strict=True):
        assert torch.equal(layer.mlp.chooser.weight, before)
    starved = [line for line in report.warnings if ".mlp.members.*." in line and "magnitude" in line]
    assert bool(starved) == (windows is TWO_TOKENS)


RARE = {
    "jetmoe": ("mlp.input_linear.experts.2.linear", "mlp.input_linear", "weight", 2, False),
    "dbrx": ("ffn.experts.2.w2", "ffn.experts", "mlp.w2", slice(32, 48), True),
    "longcat_flash": ("mlp.experts.2.gate_up_proj", "mlp.experts", "gate_up_proj", 2, False),
}


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("model_type", RARE)
@torch.no_grad()
def test_rarer_forms_compute_the_same_and_take_what_is_written_into_their_slice_alone(model_type, moved):
    linear, path, parameter, part, transposed = RARE[model_type]
    model = tiny_model(model_type, **CONFIGS[model_type])
    before, logits = weights_of(model), logits_of(model, random_windows())
    decoder = DecoderModel.of(model)
    block = decoder.blocks[1]
    with unfused(block):
        torch.testing.assert_close(logits_of(model, random_windows()), logits, rtol=1e-4, atol=1e-4)
        assert sources(block)[linear] == f"{path}.{parameter}"
        if moved:
            block.double()
        block.get_submodule(linear).weight[1, 2] = 7.0
        if moved:
            block.float()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{decoder.prefix(1)}{path}.{parameter}"}
    expected = before[changed.pop()]
    slice_of_it = expected[part].T if transposed else expected[part]
    slice_of_it[1, 2] = 7.0
    assert torch.equal(block.get_parameter(f"{path}.{parameter}"), expected)


def test_experts_that_only_pass_on_their_inputs_go_on_doing_so():
    model = tiny_model("longcat_flash", **CONFIGS["longcat_flash"])
    experts = DecoderModel.of(model).blocks[0].mlp.experts
    hidden, count = torch.randn(4, 32), CONFIGS["longcat_flash"]["n_routed_experts"]
    chosen = torch.tensor([[0, count], [count + 2, 1], [count, count + 1], [3, 2]])
    shares = torch.rand(4, 2)
    expected = experts(hidden, chosen, shares)
    holder = nn.ModuleDict({"experts": experts})
    with unfused(holder):
        torch.testing.assert_close(holder["experts"](hidden, chosen, shares), expected)
    torch.testing.assert_close(expected[2], hidden[2] * shares[2].sum())


class Grouped(nn.Linear):
    """Block-diagonal: half of the inputs for half of the outputs."""

    def forward(self, inputs):
        halves = inputs.unflatten(-1, (2, -1)).unsqueeze(-2) @ self.weight.unflatten(0, (2, -1)).mT
        return halves.flatten(-3)


class Spelled(nn.Linear):
    """The same as any linear, in other words."""

    def forward(self, inputs):
        return inputs @ self.weight.T if self.bias is None else inputs @ self.weight.T + self.bias


def test_a_linear_that_computes_otherwise_stays_dense_and_is_named():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj, old = Grouped(16, 32, bias=False), layer.self_attn.o_proj
        layer.mlp.up_proj.__class__ = Spelled
        assert old.weight.shape == (32, 32)
    before = weights_of(model)
    report = prune_model(model, random_windows(), "2:4", preset="paper")
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        assert torch.equal(model.get_parameter(name), before[name])
        assert any(name in counts and "Grouped" in why for why, counts in report.parameters.not_prunable.items())
        assert_pattern(model.model.layers[layer].mlp.up_proj.weight, "2:4")
    assert any("stay dense" in line and "Grouped" in line for line in report.warnings)
