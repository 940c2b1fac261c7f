"""Corrections stay within what they repair: rows by their length, layers by what is left of the drift."""

import pytest
import torch

from sparsegpt.driver import groups
from sparsegpt.driver.ranks import Ranks
from sparsegpt.solvers import METHODS, prune_layer
from sparsegpt.solvers.correction import GROWTH, hold_back, mean_length, remainder
from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.sparsity import NM
from tests.support import prune_model, random_windows, tiny_model


def drifted(tokens: int = 300, width: int = 16, out: int = 8):
    """Dense and pruned inputs [tokens, width] and a weight, in float64."""
    generator = torch.Generator().manual_seed(3)
    dense = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    pruned = dense + 0.3 * torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return dense, pruned, torch.randn(out, width, generator=generator, dtype=torch.float64)


def test_what_is_left_is_that_of_the_outputs_themselves():
    """sum |W x - W' x'|^2 - sum |W x - W x'|^2, token by token."""
    dense, inputs, weight = drifted()
    hessian = DampedHessian(inputs.T @ inputs, 0.0, dtype=torch.float64)
    target = weight + (weight @ (dense - inputs).T @ inputs) @ torch.linalg.inv(hessian.raw)
    found = prune_layer(weight, hessian, NM(2, 4), METHODS["sparsegpt"], target=target).weight
    wanted = dense @ weight.T
    expected = (wanted - inputs @ found.T).square().sum() - (wanted - inputs @ weight.T).square().sum()
    left = remainder(weight, target, found, hessian)
    assert left.found == pytest.approx(float(expected), rel=1e-9)
    lost = (target - found) @ hessian.raw @ (target - found).T
    share = lost.trace() / (target @ hessian.raw @ target.T).trace()
    assert left.plain == pytest.approx(float(share * (weight @ hessian.raw @ weight.T).trace()), rel=1e-9)


def test_without_a_correction_what_is_left_is_the_loss():
    _, inputs, weight = drifted()
    hessian = DampedHessian(inputs.T @ inputs, 0.0, dtype=torch.float64)
    pruned = prune_layer(weight, hessian, NM(2, 4), METHODS["sparsegpt"])
    left = remainder(weight, weight.clone(), pruned.weight, hessian)
    assert left.found == pytest.approx(pruned.loss, rel=1e-9)
    assert left.plain == pytest.approx(pruned.loss, rel=1e-9)


def test_a_row_moves_by_a_few_lengths_at_most():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.1], [6.0, 8.0]])
    moves = torch.tensor([[100.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    target = weight + moves
    mean = float(weight.norm(dim=1).mean())
    held, most = hold_back(weight, target, mean_length(weight))
    assert held == 1
    assert most == pytest.approx(100 / max(5.0, mean))
    expected = torch.tensor([[GROWTH * max(5.0, mean), 0.0], [0.0, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(target - weight, expected)


def test_a_layer_asked_for_the_impossible_keeps_its_size_and_is_named():
    """The MLP writes far more into the stream than attention can take back."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(300)
            layer.mlp.down_proj.weight.mul_(300)
    before = {name: float(weight.detach().abs().max()) for name, weight in model.named_parameters()}
    report = prune_model(model, random_windows(), "2:4")
    named = [warning for warning in report.warnings if "o_proj" in warning and "held to" in warning]
    assert named
    for name, weight in model.named_parameters():
        assert float(weight.detach().abs().max()) < 20 * before[name], name


def test_of_a_harmful_correction_the_share_that_leaves_least_is_taken(monkeypatch):
    """A solver that ruins every target but the weight itself: plain pruning leaves less, and is what remains."""
    _, inputs, weight = drifted()
    hessian = DampedHessian(inputs.T @ inputs, 0.0, dtype=torch.float64, name="layer")
    plain = prune_layer(weight, hessian, NM(2, 4), METHODS["sparsegpt"])

    def solve(target):
        far = float((target - weight).abs().max())
        if far < 1e-12:
            return plain
        ruined = plain.weight * (1 + 10 * far)
        error = weight - ruined
        return groups.Pruned(ruined, plain.mask, float((error @ hessian.raw * error).sum()), 1.0, 0.0)

    found = groups._fit_target(weight, hessian, weight + 0.2 * weight.flip(0), solve, Ranks())
    assert found.weight is plain.weight
    assert "0% of it was taken" in found.warnings[0]
