"""Training of weights on a grid: integers and masks stay, scales move, and files can keep what comes out."""

import pytest
import torch

from sparsegpt import prune_model
from sparsegpt.grid import Grid
from sparsegpt.quantization import encode, recover, representable, search_scales
from sparsegpt.recovery.training import GridWeight
from tests.support import random_windows, refused, tiny_model

GRID = Grid(4, 16)


def rounded(seed=0):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) * 0.1
    weight[:, ::3] = 0
    return encode(weight, search_scales(weight, GRID)).decode(torch.bfloat16)


def test_a_weight_in_training_begins_as_it_was():
    weight = rounded()
    trained = GridWeight(weight, GRID, "layer")
    for stored in (False, True):
        torch.testing.assert_close(trained.weight(trained.values(), stored=stored).bfloat16(), weight, rtol=0, atol=0)
    with refused("mlp.up", "not on a grid int4:16"):
        GridWeight(torch.randn(2, 32), GRID, "mlp.up")


def test_the_gradient_of_the_scales_is_that_of_autograd():
    trained, direction = GridWeight(rounded(), GRID, "layer"), torch.randn(6, 40)
    values = trained.values().requires_grad_(True)
    (trained.weight(values) * direction).sum().backward()
    torch.testing.assert_close(trained.gradient(direction), values.grad)


def test_stored_scales_are_those_that_files_hold():
    trained = GridWeight(rounded(), GRID, "layer")
    moved = trained.values() * (1 + 0.1 * torch.rand(6, 3))
    found = recover(trained.weight(moved, stored=True), GRID)
    assert torch.equal(representable(found.scales.scale), found.scales.scale)
    torch.testing.assert_close(trained.weight(moved, stored=True), trained.weight(moved), rtol=0.005, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [{"reconstruct": 2}, {"distill": 2, "distill_rate": 0.01}])
def test_trained_models_stay_on_their_grids_and_get_no_worse(training, dtype):
    options = {"preset": "fast", "quantize": "int4:16"}
    before, after = (tiny_model("llama").to(dtype) for _ in range(2))
    prune_model(before, random_windows(), "2:4", **options)
    report = prune_model(after, random_windows(), "2:4", **options, **training)
    losses = [epoch.loss for epoch in report.epochs] or [1.0, *(block.reconstruction for block in report.blocks)]
    assert min(losses[1:]) < losses[0]
    first = "model.layers.0."  # later blocks are pruned on what the first one gives
    changed = False
    for name, weight in after.named_parameters():
        if name.startswith(first) and weight.ndim == 2:
            found, start = recover(weight.data, GRID, name), recover(before.get_parameter(name).data, GRID, name)
            assert torch.equal(found.steps.sign(), start.steps.sign())
            changed |= not torch.equal(weight, before.get_parameter(name))
    assert changed
