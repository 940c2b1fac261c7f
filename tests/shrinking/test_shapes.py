"""Budgets, depth, experts and latency, each against its definition on a tiny model."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsegpt.model.decoder import DecoderModel
from sparsegpt.shrinking.budget import budget_of, multiple_of, shapes_for
from sparsegpt.shrinking.cutting import Kept, cut
from sparsegpt.shrinking.depth import Walk, choose_blocks, make_up
from sparsegpt.shrinking.experts import choose_experts
from sparsegpt.shrinking.latency import LatencyTable, measure_latency
from sparsegpt.shrinking.settings import ShrinkSettings
from sparsegpt.shrinking.shapes import Anatomy, Shape
from sparsegpt.shrinking.shrink import shrink_model
from sparsegpt.shrinking.speed import compare_speed
from tests.architectures import tiny_variant
from tests.support import logits_of, random_windows, tiny_model

WINDOWS = random_windows(8, 12)


def anatomy_of(model: torch.nn.Module) -> Anatomy:
    return Anatomy.of(DecoderModel.of(model))


@pytest.mark.parametrize("keep", ["90%", "0.7", "50%"])
def test_a_budget_is_met_and_used(keep):
    """No shape with a step more of channels, at the same heads, meets it too."""
    anatomy = anatomy_of(tiny_model("llama"))
    settings = ShrinkSettings(keep=keep)
    budget = budget_of(anatomy, settings, 4)
    assert budget is not None
    [shape] = shapes_for(anatomy, settings, budget)
    weights = 2 * (96 * shape.channels["intermediate_size"] + 3072 * (shape.groups or 0) // 2)
    assert (
        budget.cost(shape)
        == weights
        <= budget.limit
        == pytest.approx(2 * (3072 + 6144) * float(keep.rstrip("%")) / (100 if "%" in keep else 1))
    )
    more = anatomy.with_channels(shape, shape.channels["intermediate_size"] + multiple_of(anatomy, settings))
    assert budget.cost(more) > budget.limit


def test_budgets_of_parameters_and_bytes_are_those_of_the_whole_model():
    anatomy = anatomy_of(tiny_model("llama"))
    whole = sum(parameter.numel() for parameter in anatomy.decoder.model.parameters())
    for settings in (ShrinkSettings(parameters="20K"), ShrinkSettings(size="40KB")):
        [shape] = shapes_for(anatomy, settings, budget_of(anatomy, settings, 2))
        assert 15_000 < anatomy.size(shape).total <= 20_000 < whole


def brute_divergence(model: torch.nn.Module, kept: tuple[int, ...], dense: Tensor) -> float:
    """Of the model with these layers alone, run as a whole."""
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(layers[index] for index in kept)
    model.config.num_hidden_layers = len(kept)
    with torch.no_grad():
        ours = model(input_ids=WINDOWS, use_cache=False).logits.log_softmax(-1)
    model.model.layers, model.config.num_hidden_layers = layers, len(layers)
    return float((dense.exp() * (dense - ours)).sum(-1).mean())


def test_the_search_removes_the_block_without_which_predictions_part_least():
    model = tiny_model("llama", num_hidden_layers=4)
    dense = logits_of(model, WINDOWS).log_softmax(-1)
    rests = list(itertools.combinations(range(4), 3))
    best = min(rests, key=lambda kept: brute_divergence(model, kept, dense))
    walk = Walk.of(DecoderModel.of(model), [WINDOWS])
    assert choose_blocks(walk, 3, "divergence") == best
    assert choose_blocks(walk, 4, "divergence") == (0, 1, 2, 3)


def test_similarity_removes_the_block_that_turns_the_stream_least():
    model = tiny_model("llama", num_hidden_layers=3)
    with torch.no_grad():
        for projection in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            projection.weight.mul_(0.01)
    assert choose_blocks(Walk.of(DecoderModel.of(model), [WINDOWS]), 2, "similarity") == (0, 2)


def test_blocks_that_stay_make_up_for_one_that_left():
    model, windows = tiny_model("llama", num_hidden_layers=3, spread=0.1), random_windows(64, 16)
    anatomy, kept = anatomy_of(model), (0, 2)
    dense = logits_of(model, windows)
    part = anatomy_of(cut(anatomy, replace(anatomy.full, blocks=kept), Kept(kept, {}, {})))
    before = float((logits_of(part.decoder.model, windows) - dense).square().sum())
    assert make_up(anatomy.decoder, part, kept, [windows], 1.0, 0.01) == 2
    assert float((logits_of(part.decoder.model, windows) - dense).square().sum()) < before
    assert torch.equal(logits_of(model, windows), dense)


def test_kinds_of_blocks_go_with_them():
    model = tiny_variant("gemma2", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    shrunk = shrink_model(model, WINDOWS, blocks=3)
    kinds = [model.config.layer_types[index] for index in shrunk.report.shape.blocks]
    assert shrunk.model.config.layer_types == kinds
    assert len(shrunk.model.model.layers) == 3


def mixtral_output(layer: torch.nn.Module, hidden: Tensor, experts: list[int]) -> Tensor:
    """A Mixtral MLP with these experts alone, from its definition: hidden [T, H], two experts a token."""
    shares = (hidden @ layer.gate.weight[experts].T).softmax(-1)
    top, chosen = shares.topk(2, dim=-1)
    top = top / top.sum(-1, keepdim=True)
    result = torch.zeros_like(hidden)
    for place, expert in enumerate(experts):
        gate, up = (hidden @ layer.experts.gate_up_proj[expert].T).chunk(2, -1)
        output = (torch.nn.functional.silu(gate) * up) @ layer.experts.down_proj[expert].T
        result += output * (top * (chosen == place)).sum(-1, keepdim=True)
    return result


@torch.no_grad()
def test_the_expert_leaves_whose_loss_is_least():
    model = tiny_variant("mixtral")
    seen = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits_of(model, WINDOWS)
    handle.remove()
    layer, hidden = model.model.layers[0].mlp, seen[0].flatten(0, 1)
    whole = mixtral_output(layer, hidden, [0, 1, 2, 3])
    torch.testing.assert_close(whole, layer(seen[0]).flatten(0, 1), rtol=1e-4, atol=1e-5)
    rests = [[each for each in range(4) if each != gone] for gone in range(4)]
    best = min(rests, key=lambda rest: float((mixtral_output(layer, hidden, rest) - whole).square().sum()))
    anatomy = anatomy_of(model)
    found = choose_experts(anatomy, Walk.of(anatomy.decoder, [WINDOWS]), 3)
    assert found[0].tolist() == best
    shrunk = shrink_model(model, WINDOWS, experts=3)
    assert shrunk.model.config.num_local_experts == 3
    rows = shrunk.model.model.layers[0].mlp.gate.weight
    assert torch.equal(rows, layer.gate.weight[shrunk.report.kept_experts[0]])


def test_latency_is_read_off_the_table():
    table = LatencyTable(
        tokens=1, outside=1.0, full=4.0, by_channels={64: 2.0, 128: 4.0}, by_groups={1: 3.0, 2: 4.0}, first_key="wide"
    )
    assert table.seconds(Shape((0, 1), 2, {"wide": 128})) == 1 + 2 * 4
    assert table.seconds(Shape((0, 1), 1, {"wide": 96})) == 1 + 2 * (3 - 1)
    assert table.seconds(Shape((0,), None, {"wide": 64})) == 1 + 2


def test_a_table_is_measured_of_this_model():
    anatomy = anatomy_of(tiny_model("llama", intermediate_size=256))
    table = measure_latency(anatomy, WINDOWS)
    assert sorted(table.by_channels) == [64, 128, 192, 256]
    assert sorted(table.by_groups) == [1, 2]
    assert min(*table.by_channels.values(), *table.by_groups.values(), table.outside) > 0


def test_speeds_are_of_every_model():
    models = {
        "first": tiny_model("llama"),
        "second": tiny_model("gpt2", intermediate_size=None, num_key_value_heads=None),
    }
    found = compare_speed(models, WINDOWS[0], rounds=1)
    assert found.keys() == models.keys()
    assert all(min(speed.prefill, speed.decode) > 0 for speed in found.values())


def test_divergence_chooses_among_shapes_of_one_budget():
    model = tiny_model("llama", num_hidden_layers=3)
    shrunk = shrink_model(model, WINDOWS, "60%", choose="divergence")
    found = shrunk.report.divergence
    assert len(found) > 2
    chosen = [name for name in found if len(shrunk.report.shape.channels) and found[name] == min(found.values())]
    wanted = replace(shrunk.report.shape, blocks=tuple(range(len(shrunk.report.shape.blocks))))
    assert str(wanted) in chosen
