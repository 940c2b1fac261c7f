"""Mixtures of experts: one Hessian an expert, experts that few or no tokens reach, bounded memory, what stands in."""

import re

import pytest
import torch
from torch import nn

from sparsegpt import SparseGPTError, prune_model
from sparsegpt.driver import stages
from sparsegpt.driver.stages import enough_tokens, plan_stages, waves
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import prunable_linears
from sparsegpt.model.unfuse import unfused
from sparsegpt.sparsity import parse_sparsity
from tests.architectures import MIXTURES, block_matrices, expected_inputs, tiny_variant
from tests.support import assert_pattern, brute_layer_mask, logits_of, random_windows, refused, weights_of


@pytest.fixture(params=MIXTURES)
def model(request):
    return tiny_variant(request.param)


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


# Few tokens


TWO_TOKENS = random_windows(1, 2)  # each goes to two experts at most: of four some stay idle, some get one token


@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
@pytest.mark.parametrize("preset", ["paper", "default"])
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
    windows = random_windows(24, 2)
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


class Packed(nn.Module):
    """Experts in a form that nothing is known of."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.ones(2, 4, 4)), nn.Parameter(torch.ones(2, 4, 4))


def test_weights_of_an_unknown_form_are_refused_rather_than_left_dense():
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Packed()})})
    with refused("mlp.experts", "gate_up_proj", "w1, w2", "Packed"), unfused(block):
        pass
    model = tiny_variant("mixtral")
    model.model.layers[1].mlp.experts = Packed()
    with pytest.raises(SparseGPTError, match="w1, w2"):
        prune_model(model, random_windows(), "2:4")
