"""Grids of integers against their definition in float64, and the way back from decoded weights to integers."""

import itertools

import pytest
import torch

from sparsegpt import NM, SparseGPTError, Unstructured
from sparsegpt.grid import Grid, parse_grid
from sparsegpt.quantization import (
    LEAST_SCALE,
    SHRINK,
    Scales,
    encode,
    recover,
    representable,
    search_scales,
)

GRIDS = ["int4:32", "int8:16", "int3:8", "int2:5", "uint4:32", "uint3:16", "int4:row", "uint8:row"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def some_weight(rows=12, columns=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) * 0.1
    weight[torch.rand(rows, columns, generator=generator) < 0.4] = 0
    weight[2] = 0
    return weight


def groups_of(grid, columns):
    width = columns if grid.group_size is None else grid.group_size
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def numbers_of(grid, scale, zero):
    """Every number of a group's grid, in float64."""
    if grid.symmetric:
        end = 2 ** (grid.bits - 1)
        return scale.double() * torch.arange(-end + (grid.bits == 8), end)
    return scale.double() * (torch.arange(2**grid.bits) - zero)


@pytest.mark.parametrize("text", GRIDS)
def test_a_weight_goes_to_the_nearest_number_of_its_groups_grid(text):
    grid, weight = parse_grid(text), some_weight()
    scales = search_scales(weight, grid)
    found = encode(weight, scales).decode(torch.float64)
    for row, (group, columns) in itertools.product(range(len(weight)), enumerate(groups_of(grid, weight.shape[1]))):
        zero = None if scales.zero is None else scales.zero[row, group]
        numbers = numbers_of(grid, scales.scale[row, group], zero)
        nearest = (weight[row, columns].double()[:, None] - numbers).abs().min(1).values
        distance = (weight[row, columns].double() - found[row, columns]).abs()
        torch.testing.assert_close(distance, nearest, rtol=0, atol=1e-9)


@pytest.mark.parametrize("text", GRIDS)
def test_the_clip_search_takes_the_best_end(text):
    grid, weight = parse_grid(text), some_weight()
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1))
    chosen = encode(weight, search_scales(weight, grid, importance=importance)).decode(torch.float64)
    for row, columns in itertools.product(range(len(weight)), groups_of(grid, weight.shape[1])):
        part, cost = weight[row : row + 1, columns], importance[columns].double()
        whole_row = Grid(grid.bits, None, grid.symmetric)
        tried = [
            encode(part, search_scales(part * share, whole_row, clip=False)).decode(torch.float64) for share in SHRINK
        ]
        least = min(float((cost * (value - part.double()).square()).sum()) for value in tried)
        found = float((cost * (chosen[row, columns] - part.double()).square()).sum())
        assert found == pytest.approx(least, rel=1e-5, abs=1e-15)


def test_scales_are_numbers_of_float16_and_of_bfloat16():
    values = representable(torch.logspace(-12, 4, 2000))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(values.to(dtype).float(), values)
    close = torch.logspace(-4, 4, 2000)
    assert ((representable(close) / close - 1).abs() <= 1.1 * 2**-8).all()  # rounded twice
    assert representable(torch.tensor([0.0])) == LEAST_SCALE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", GRIDS)
def test_decoded_weights_give_integers_of_the_same_bits(text, dtype):
    grid, weight = parse_grid(text), some_weight()
    decoded = encode(weight, search_scales(weight, grid)).decode(dtype)
    found = recover(decoded, grid)
    assert torch.equal(found.decode(dtype), decoded)
    least, most = (bound.repeat_interleave(grid.width(70), 1)[:, :70] for bound in found.scales.bounds)
    assert ((found.steps >= least) & (found.steps <= most)).all()
    assert torch.equal(representable(found.scales.scale), found.scales.scale)


@pytest.mark.parametrize("steps", [(1,), (0, 2, -4), (3, -6), (7, 1), (127, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_found_whatever_the_largest_step(steps, dtype):
    scales = representable(torch.logspace(-5, 0, 300))[:, None]
    decoded = (torch.tensor([steps]) * scales).to(dtype)
    assert torch.equal(recover(decoded, Grid(8, None)).decode(dtype), decoded)


def test_weights_off_the_grid_are_refused_with_the_layers_name():
    decoded = encode(some_weight(), search_scales(some_weight(), Grid(4, 32))).decode(torch.bfloat16)
    decoded[3, decoded[3, :32].abs().argmax()] *= 1.02
    with pytest.raises(SparseGPTError, match=r"mlp\.up: 1 of 36 groups are not on a grid int4:32"):
        recover(decoded, Grid(4, 32), "mlp.up")
    with pytest.raises(SparseGPTError, match="not on a grid int3"):
        recover(decoded, Grid(3, 32))


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("int4", Grid(4, 128)),
        ("INT3:32", Grid(3, 32)),
        ("int8:row", Grid(8, None)),
        ("uint4:64", Grid(4, 64, symmetric=False)),
        ("none", None),
        (None, None),
    ],
)
def test_texts_of_grids(text, grid):
    assert parse_grid(text) == grid
    if grid is not None:
        assert parse_grid(str(grid)) == grid


@pytest.mark.parametrize("text", ["int9", "int1", "int4:1", "int4:0", "fp8", "4", "int4:", "int4:x", ""])
def test_other_texts_are_refused(text):
    with pytest.raises(SparseGPTError, match=r"such as int4|2 or more"):
        parse_grid(text)


def test_scales_that_overflow_and_groups_that_cut_others_are_refused():
    with pytest.raises(SparseGPTError, match="head: a scale of int4:128 is beyond float16"):
        search_scales(torch.full((1, 4), 1e6), Grid(4), name="head")
    Grid(4, 6).check(Unstructured(0.5))
    with pytest.raises(SparseGPTError, match="groups of 6 weights under one scale cut groups of 2:4: give a multiple"):
        Grid(4, 6).check(NM(2, 4))


@pytest.mark.parametrize(("grid", "bits"), [(Grid(4), 4.125), (Grid(8, None), 8 + 16 / 256), (Grid(3, 32), 3.5)])
def test_bits_of_a_weight(grid, bits):
    assert grid.bits_per_weight(256) == bits
    assert grid.bits_per_weight(256, 0.5) == bits - grid.bits / 2 + 1
    assert Grid(4, 128, symmetric=False).bits_per_weight(256) == 4 + 20 / 128


def test_zero_points_reach_further_than_symmetry():
    weight = torch.rand(4, 32, generator=torch.Generator().manual_seed(0))  # all of one sign
    errors = [
        float((encode(weight, search_scales(weight, parse_grid(text))).decode() - weight).norm())
        for text in ("int4:32", "uint4:32")
    ]
    assert errors[1] < 0.6 * errors[0]
    assert Scales(Grid(4), torch.ones(1, 1)).bounds == (-8, 7)


def test_a_symmetric_grid_reaches_further_where_the_larger_weights_are():
    """Eighths of the largest weight are on a grid of four bits, whichever sign it has."""
    steps = torch.tensor([[-8.0, 7, 3, 0], [8, -7, 1, 0]])
    for sign in (1, -1):
        found = encode(sign * steps / 8, search_scales(sign * steps / 8, Grid(4), clip=False))
        assert torch.equal(found.decode(), sign * steps / 8)
        assert (found.steps.amin(1) == -8).all()
        assert torch.equal(recover(found.decode(torch.bfloat16), Grid(4)).steps, found.steps)
    assert Scales(Grid(8), torch.ones(1, 1)).bounds == (-127, 127)
