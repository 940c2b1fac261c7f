"""Integers chosen inside the sweep, against the definition in float64."""

import itertools

import pytest
import torch

from sparsegpt import NM, Unstructured, prune_weight
from sparsegpt.grid import parse_grid
from sparsegpt.quantization import encode, search_scales
from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.solvers.masks import keeps_counts
from sparsegpt.solvers.rounding import polish, round_weight
from tests.support import brute_nm_mask, damped, random_layer, refused, relative_error

GRIDS = ["int4:32", "int3:16", "uint4:8", "int8:row"]
METHODS = ["magnitude", "wanda+refit", "sparsegpt", "sparsegpt+refit", "admm"]


def rounded_to(scales, weight, j):
    """Column j of the weight, every number to its nearest on the grid."""
    return encode(weight, scales).decode(torch.float64)[:, j]


def gptq_oracle(weight, raw, scales, mask=None, pattern=None, *, as_they_lie=False):
    """The textbook loop, in float64: a fresh inverse for every column, columns by falling diag H, groups as they lie.

    mask: what stays; None: n:m of `pattern`, whose groups go together, chosen when the first of a group is reached.
    as_they_lie: columns too.
    """
    weight, hessian = weight.double().clone(), damped(raw)
    together = 1 if mask is not None else pattern.m
    energy = raw.double().diagonal().view(-1, together).sum(1)
    order = [group * together + k for group in energy.argsort(descending=True, stable=True) for k in range(together)]
    order = sorted(order) if as_they_lie else order
    mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.clone()
    for place, j in enumerate(order):
        rest = torch.tensor(order[place:])
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        if together > 1 and place % together == 0:
            group = torch.tensor(order[place : place + together])
            left = [torch.tensor(order[k:]) for k in range(place, place + together)]
            costs = [torch.linalg.inv(hessian[columns][:, columns])[0, 0] for columns in left]
            mask[:, group] = brute_nm_mask(weight[:, group].square() / torch.stack(costs), pattern)
        rounded = rounded_to(scales, weight, j).masked_fill(~mask[:, j], 0)
        error = (weight[:, j] - rounded) / inverse[0, 0]
        weight[:, rest] -= torch.outer(error, inverse[0])
        weight[:, j] = rounded
    return weight, mask


@pytest.mark.parametrize("text", GRIDS)
def test_the_sweep_is_the_textbook_loop(text):
    weight, raw = random_layer(10, 48)
    hessian, scales = DampedHessian(raw, dtype=torch.float64), search_scales(weight, parse_grid(text))
    everything = torch.ones_like(weight, dtype=torch.bool)
    half = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    for mask in (everything, half):
        expected, _ = gptq_oracle(weight, raw, scales, mask)
        found, kept = round_weight(weight.double(), hessian, Unstructured(0), scales, block_size=16, mask=mask)
        assert torch.equal(kept, mask)
        torch.testing.assert_close(found.decode(torch.float64), expected)
    # On the mask of a pattern columns go as they lie, with the factor that has found it.
    expected, _ = gptq_oracle(weight, raw, scales, half, as_they_lie=True)
    found, _ = round_weight(weight.double(), hessian, Unstructured(0.5), scales, block_size=16, mask=half)
    torch.testing.assert_close(found.decode(torch.float64), expected)


@pytest.mark.parametrize("text", GRIDS)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8)])
def test_masks_and_integers_are_chosen_in_one_sweep(text, pattern):
    weight, raw = random_layer(10, 48, seed=1)
    hessian, scales = DampedHessian(raw, dtype=torch.float64), search_scales(weight, parse_grid(text))
    expected, mask = gptq_oracle(weight, raw, scales, pattern=pattern)
    found, kept = round_weight(weight.double(), hessian, pattern, scales, block_size=16)
    assert torch.equal(kept, mask)
    torch.testing.assert_close(found.decode(torch.float64), expected)


@pytest.mark.parametrize(("rows", "inputs"), [(128, 512), pytest.param(1024, 1024, marks=pytest.mark.slow)])
def test_on_a_large_layer_it_is_the_textbook_loop_to_a_thousandth(rows, inputs):
    """By the usual factor of the inverse, in float64; float32 may round single weights otherwise."""
    weight, raw = random_layer(rows, inputs)
    scales = search_scales(weight, parse_grid("int4"))
    order = raw.diagonal().argsort(descending=True, stable=True)
    inverse = torch.linalg.inv(damped(raw)[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True)
    width, textbook = parse_grid("int4").width(inputs), weight.double()[:, order]
    for place, j in enumerate(order.tolist()):
        scale = scales.scale[:, j // width].double()
        rounded = (textbook[:, place] / scale).round().clamp(-8, 7) * scale
        error = (textbook[:, place] - rounded) / factor[place, place]
        textbook[:, place + 1 :] -= torch.outer(error, factor[place, place + 1 :])
        textbook[:, place] = rounded
    whole = torch.ones_like(weight, dtype=torch.bool)
    found, _ = round_weight(weight, DampedHessian(raw), Unstructured(0), scales, block_size=128, mask=whole)
    ours = relative_error(weight, found.decode(), raw)
    assert ours == pytest.approx(relative_error(weight, textbook[:, order.argsort()], raw), rel=1e-3)


@pytest.mark.parametrize("text", GRIDS)
def test_polishing_lowers_the_damped_loss_and_keeps_the_mask(text):
    weight, raw = random_layer(20, 96, seed=4)
    hessian, grid = DampedHessian(raw, dtype=torch.float64), parse_grid(text)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    integers = encode(weight * mask, search_scales(weight, grid))
    losses = []
    for passes in range(4):
        found = polish(integers, mask, weight.double(), hessian, passes=passes)
        error = weight.double() - found.decode(torch.float64)
        losses.append((error @ damped(raw) * error).sum(1))
        assert not found.steps[~mask].any()
        least, most = (bound.repeat_interleave(grid.width(96), 1)[:, :96] for bound in found.scales.bounds)
        assert ((found.steps >= least) & (found.steps <= most)).all()
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-6)).all()
    assert losses[1].sum() < 0.9 * losses[0].sum()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
def test_every_method_gives_a_pruned_weight_of_integers(method, sparsity):
    weight, raw = random_layer(24, 96, seed=5)
    found = prune_weight(weight, raw, sparsity, method=method, grid="int4:32")
    assert found.integers is not None
    assert torch.equal(found.integers.decode(), found.weight)
    assert not found.weight[~found.mask].any()
    assert found.integers.steps.min() >= -8 and found.integers.steps.max() <= 7
    plain = prune_weight(weight, raw, sparsity, method=method)
    nearest = prune_weight(weight, raw, sparsity, method=method, grid="int4:32", quantizer="rtn")
    assert torch.equal(nearest.mask, plain.mask)
    assert relative_error(weight, found.weight, raw) < relative_error(weight, nearest.weight, raw)
    assert found.relative_error == pytest.approx(relative_error(weight, found.weight, raw), rel=1e-3)


def test_without_zeros_a_grid_rounds_alone():
    weight, raw = random_layer(24, 96, seed=6)
    found = prune_weight(weight, raw, 0, grid="int4:32")
    nearest = prune_weight(weight, raw, 0, grid="int4:32", quantizer="rtn")
    assert found.mask.all()
    assert nearest.weight.equal(encode(weight, search_scales(weight, parse_grid("int4:32"), clip=False)).decode())
    assert relative_error(weight, found.weight, raw) < 0.6 * relative_error(weight, nearest.weight, raw)


def test_what_was_rounded_is_rounded_to_itself():
    weight, raw = random_layer(8, 64, seed=7)
    once = prune_weight(weight, raw, 0, grid="int4:32", quantizer="rtn")
    assert torch.equal(prune_weight(once.weight, raw, 0, grid="int4:32", quantizer="rtn").weight, once.weight)


def test_dead_inputs_and_other_dtypes():
    weight, raw = random_layer(8, 64, seed=8)
    raw[3] = raw[:, 3] = 0
    found = prune_weight(weight.bfloat16(), raw, "2:4", grid="int4:32")
    assert found.weight.dtype == torch.bfloat16
    assert torch.equal(found.integers.decode(torch.bfloat16), found.weight)
    assert keeps_counts(found.mask, NM(2, 4))


def test_what_cannot_be_rounded_is_refused():
    weight, raw = random_layer(8, 64)
    with refused("groups of 6 weights under one scale cut groups of 2:4"):
        prune_weight(weight, raw, "2:4", grid="int4:6")
    with refused("quantizer 'gtpq' is not known", "did you mean gptq?"):
        prune_weight(weight, raw, "2:4", grid="int4", quantizer="gtpq")
    with refused("mlp.up: a scale of int4:32 is beyond float16"):
        prune_weight(weight * 1e7, raw, 0, grid="int4:32", name="mlp.up")
