"""Whole-model distillation against ordinary training of the whole model; masks fixed, held-out loss never worse."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsegpt.recovery import distill, training
from sparsegpt.recovery.distill import Trained, adam_step, divergence
from tests.architectures import tiny_variant
from tests.support import assert_pattern, block_linears, logits_of, prune_model, random_windows, tiny_model, weights_of

WINDOWS = random_windows(40)
# Leaves much to be learnt, and from windows as few as these.
ROUGH = {"preset": "paper", "method": "magnitude"}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(training, "TOKENS_PER_BATCH", 16 * 5)  # five windows a step, eight batches


@pytest.fixture
def in_float32(monkeypatch):
    """Exact products, where this machine would use bfloat16."""
    monkeypatch.setattr(distill, "autocast", lambda device: nullcontext())


def test_divergence_and_its_gradient_are_those_of_autograd():
    logits, wanted = torch.randn(2, 3, 7, 50, dtype=torch.float64) * 3
    leaf = logits.clone().requires_grad_()
    expected = functional.kl_div(leaf.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum") / 21
    expected.backward()
    loss, gradient = divergence(logits, wanted)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-7)


def test_tokens_that_both_models_rule_out_add_nothing():
    logits, wanted = torch.randn(2, 1, 4, 9)
    padding = torch.full((1, 4, 3), -math.inf)
    loss, gradient = divergence(torch.cat([logits, padding], -1), torch.cat([wanted, padding], -1))
    assert loss == pytest.approx(divergence(logits, wanted)[0], rel=1e-6)
    assert not gradient[..., 9:].any()


def test_adam_is_that_of_torch():
    start, gradients = torch.randn(6, 5), torch.randn(7, 6, 5)
    reference = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([reference], lr=0.01, betas=training.BETAS)
    state = Trained(start.clone(), torch.zeros(6, 5), torch.zeros(6, 5))
    for number, gradient in enumerate(gradients, start=1):
        reference.grad = gradient
        optimizer.step()
        adam_step(state, gradient, number, 0.01)
    torch.testing.assert_close(state.weight, reference.data, rtol=1e-5, atol=1e-6)


def reference_training(pruned, dense, epochs, rate):
    """The same batches, order and schedule through autograd of the whole model and torch's optimizer."""
    inside = {name: p for name, p in pruned.named_parameters() if any(part.isdigit() for part in name.split("."))}
    masks = {name: p != 0 for name, p in inside.items() if p.ndim > 1 and (p == 0).sum() * 2 == p.numel()}
    trained = {name: p for name, p in inside.items() if name in masks or p.ndim == 1}
    optimizer = torch.optim.Adam(trained.values(), lr=rate, betas=(0.9, 0.95))
    batches = WINDOWS.split(5)[:7]  # the eighth is held out
    for step in range(epochs * 7):
        epoch, number = divmod(step, 7)
        order = torch.randperm(7, generator=torch.Generator().manual_seed(epoch + 1)).tolist()
        tokens = batches[order[number]]
        with torch.no_grad():
            wanted = dense(tokens).logits.log_softmax(-1)
        found = pruned(tokens).logits.log_softmax(-1)
        loss = functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        for name, mask in masks.items():
            if trained[name].grad is not None:
                trained[name].grad[~mask] = 0
        warm_up = min(1.0, (step + 1) / (epochs * 7 / 16))
        optimizer.param_groups[0]["lr"] = rate * warm_up * 0.5 * (1 + math.cos(math.pi * step / (epochs * 7)))
        optimizer.step()


# Attention does not depend on a bias of the keys: its gradient is rounding alone.
KEY_BIASES = ("k_proj.bias", "c_attn.bias", "query_key_value.bias")


# Plain, learned positions and biases, transposed weights, experts, capped logits, biases by distance, parallel parts.
@pytest.mark.parametrize("variant", ["llama", "opt", "gpt2", "mixtral", "gemma2", "bloom", "gptj"])
@pytest.mark.usefixtures("in_float32")
def test_block_by_block_training_is_that_of_the_whole_model(variant):
    dense = tiny_variant(variant).eval()
    expected, found = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_model(expected, WINDOWS, "2:4", **ROUGH)
    untrained = weights_of(expected)
    reference_training(expected, dense, epochs=2, rate=1e-3)
    report = prune_model(found, WINDOWS, "2:4", distill=2, distill_rate=1e-3, micro_batch=10, **ROUGH)
    for name, parameter in found.named_parameters():
        if not name.endswith(KEY_BIASES):
            change, wanted = (new - untrained[name] for new in (parameter.data, expected.get_parameter(name).data))
            assert (change - wanted).norm() <= 0.02 * wanted.norm(), name
    assert report.epochs[-1].loss == pytest.approx(divergence_from(dense, found), rel=1e-3)


def divergence_from(dense, model, windows=WINDOWS[35:]):
    """Mean over tokens of KL(dense || model), on the held-out windows."""
    found, wanted = (logits_of(each, windows).double().log_softmax(-1) for each in (model, dense))
    return float(functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean())


def test_training_lowers_the_divergence_and_keeps_the_pattern():
    dense = tiny_model("llama")
    untrained, model = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_model(untrained, WINDOWS, "2:4", **ROUGH)
    report = prune_model(model, WINDOWS, "2:4", distill=4, distill_rate=2e-3, **ROUGH)
    assert [epoch.epoch for epoch in report.epochs] == [0, 1, 2, 3, 4]
    # Where the hardware has them, products are bfloat16 while training.
    before, after = divergence_from(dense, untrained), divergence_from(dense, model)
    assert report.epochs[0].loss == pytest.approx(before, rel=0.03)
    assert report.epochs[-1].loss == pytest.approx(after, rel=0.03)
    assert after < 0.95 * before
    assert report.seconds["distill"] > 0
    for name, linear in block_linears(model).items():
        assert_pattern(linear.weight, "2:4")
        assert torch.equal(linear.weight == 0, block_linears(untrained)[name].weight == 0)
    outside = {name for name in weights_of(model) if ".layers." not in name}
    assert outside
    assert all(torch.equal(weights_of(model)[name], weights_of(dense)[name]) for name in outside)


@pytest.mark.parametrize("rate", [10.0, 1e30])
def test_a_training_that_does_not_help_is_rolled_back_to_the_bit(rate):
    expected, model = tiny_model("llama"), tiny_model("llama")
    prune_model(expected, WINDOWS, "2:4")
    report = prune_model(model, WINDOWS, "2:4", distill=2, distill_rate=rate)
    assert all(torch.equal(weight, weights_of(expected)[name]) for name, weight in weights_of(model).items())
    [warning] = report.warnings
    assert "rolled back; lower the distillation rate" in warning


def test_blocks_that_were_left_dense_stay_as_they_are_and_pass_gradients_on():
    dense = tiny_model("llama", num_hidden_layers=3)
    model = copy.deepcopy(dense)
    report = prune_model(model, WINDOWS, "2:4", only_blocks="0:1,2", distill=2, distill_rate=2e-3, **ROUGH)
    assert report.epochs[-1].loss < report.epochs[0].loss
    moved = {name for name, weight in weights_of(model).items() if not torch.equal(weight, weights_of(dense)[name])}
    assert {name.split(".")[2] for name in moved} == {"0", "2"}


def test_gradients_switches_and_dtypes_come_back():
    model = tiny_model("llama").bfloat16()
    model.model.layers[0].mlp.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    prune_model(model, WINDOWS, "2:4", preset="paper", distill=1)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in model.parameters())


def test_a_pruned_head_follows_the_trained_blocks():
    """The head is solved on what the trained blocks give it."""
    untrained, model = tiny_model("llama"), tiny_model("llama")
    options = {**ROUGH, "method": "sparsegpt", "include_head": True}
    prune_model(untrained, WINDOWS, "2:4", **options)
    prune_model(model, WINDOWS, "2:4", distill=3, distill_rate=2e-3, **options)
    assert_pattern(model.lm_head.weight, "2:4")
    seen = {}
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.update(inputs=args[0]))
    logits_of(model, WINDOWS)
    handle.remove()
    inputs = seen["inputs"].flatten(0, 1).double()
    dense = tiny_model("llama").lm_head.weight.detach().double()

    def error(weight):
        return float(((weight.double() - dense) @ inputs.T).square().sum())

    assert error(model.lm_head.weight.detach()) < error(untrained.lm_head.weight.detach())


def test_a_single_window_is_enough_to_run():
    report = prune_model(tiny_model("llama"), WINDOWS[:1], "2:4", distill=1)
    assert len(report.epochs) == 2
