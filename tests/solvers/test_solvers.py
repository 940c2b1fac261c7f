"""Layer solvers against the definition in float64, and the properties that hold for all of them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsegpt import NM, SparseGPTError, Unstructured, parse_sparsity, prune_weight
from sparsegpt.solvers import METHODS, prune_layer
from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.solvers.sparsegpt import sweep
from tests.support import (
    assert_pattern,
    brute_layer_mask,
    damped,
    obs_oracle,
    random_layer,
    refused,
    relative_error,
)

PATTERNS = ["2:4", "4:8", "1:4", "3:4", "8:16", "16:32", "2:3", "0.5", "0.3", "0.9", "0.5/row", "0.3/row"]
# Divides into groups of all PATTERNS, and is one block of columns.
WIDTH = BLOCK = 96


def run_oracle(weight, hessian, sparsity, block_size=BLOCK, damping=0.01):
    return obs_oracle(
        weight,
        damped(hessian, damping),
        parse_sparsity(sparsity),
        block_size=block_size,
        dead=hessian.diagonal() == 0,
    )


# SparseGPT is the optimal brain surgeon


@pytest.mark.parametrize("sparsity", PATTERNS)
def test_the_sweep_knows_its_loss_under_the_damped_hessian(sparsity):
    weight, raw = random_layer(12, WIDTH)
    raw[5] = raw[:, 5] = 0  # an input that never fired
    hessian = DampedHessian(raw, dtype=torch.float64)
    pruned, _, loss = sweep(weight.double(), hessian, parse_sparsity(sparsity), block_size=32)
    error = weight.double() - pruned
    torch.testing.assert_close(loss, (error @ damped(raw) * error).sum())


@pytest.mark.parametrize("sparsity", PATTERNS)
def test_sparsegpt_is_the_column_by_column_definition(sparsity):
    weight, hessian = random_layer(12, WIDTH)
    expected, mask = run_oracle(weight, hessian, sparsity)
    found = prune_weight(weight.double(), hessian, sparsity, method="sparsegpt", block_size=BLOCK, dtype=torch.float64)
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("columns", [16, 40, 41])
@pytest.mark.parametrize("block_size", [1, 7, 16, 32, 64])
def test_blocks_of_a_fraction_have_their_own_threshold(columns, block_size):
    weight, hessian = random_layer(9, columns, seed=3)
    expected, mask = run_oracle(weight, hessian, 0.55, block_size)
    found = prune_weight(weight.double(), hessian, 0.55, method="sparsegpt", block_size=block_size, dtype=torch.float64)
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-10)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 6),
    pattern=st.sampled_from([NM(2, 4), NM(1, 4), NM(1, 3), NM(5, 8)]),
    damping=st.sampled_from([0.001, 0.01, 0.3]),
    seed=st.integers(0, 1000),
)
def test_sparsegpt_is_the_definition_in_any_shape(rows, groups, pattern, damping, seed):
    weight, hessian = random_layer(rows, groups * pattern.m, seed)
    expected, mask = run_oracle(weight, hessian, pattern, damping=damping)
    found = prune_weight(
        weight.double(),
        hessian,
        pattern,
        method="sparsegpt",
        damping=damping,
        block_size=pattern.m,
        dtype=torch.float64,
    )
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.weight, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "16:32"])
def test_block_size_is_irrelevant_for_groups(pattern):
    weight, hessian = random_layer(8, 128)
    first, *others = [
        prune_weight(weight, hessian, pattern, method="sparsegpt", block_size=size) for size in (32, 64, 128, 256)
    ]
    for other in others:
        assert torch.equal(first.weight, other.weight)
        assert torch.equal(first.mask, other.mask)


def textbook(weight, hessian, pattern, block_size=128):
    """Algorithm 1 of the paper as published: column after column, updates of later blocks postponed; float64."""
    weight = weight.double().clone()
    rows, columns = weight.shape
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian)))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, columns, block_size):
        block, local = weight[:, start : start + block_size], factor[start : start + block_size]
        diagonal, errors = local[:, start:].diagonal(), torch.zeros(rows, block_size, dtype=torch.float64)
        mask = torch.ones_like(block, dtype=torch.bool)
        if isinstance(pattern, Unstructured):
            saliency = (block / diagonal).square()
            mask = saliency > saliency.flatten().kthvalue(round(pattern.fraction * saliency.numel())).values
        for j in range(block_size):
            if isinstance(pattern, NM) and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                order = (block[:, group] / diagonal[group]).square().argsort(1, descending=True)
                mask[:, group] = torch.zeros(rows, pattern.m, dtype=torch.bool).scatter(1, order[:, : pattern.n], True)
            errors[:, j] = block[:, j].masked_fill(mask[:, j], 0) / diagonal[j]
            block[:, j:] -= torch.outer(errors[:, j], local[j, start + j : start + block_size])
            block[:, j].masked_fill_(~mask[:, j], 0)
        weight[:, start + block_size :] -= errors @ local[:, start + block_size :]
    return weight


@pytest.fixture(scope="module")
def large_layer():
    return random_layer(1024, 1536, tokens=4096)


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", ["2:4", "4:8", "0.5"])
def test_loss_of_a_large_layer_is_the_textbooks_in_float64(large_layer, sparsity):
    weight, hessian = large_layer
    expected = relative_error(weight, textbook(weight, hessian, parse_sparsity(sparsity)), hessian)
    found = prune_weight(weight, hessian, sparsity, method="sparsegpt")
    assert relative_error(weight, found.weight, hessian) == pytest.approx(expected, rel=1e-3)
    assert found.relative_error == pytest.approx(expected, rel=1e-3)


def test_the_textbook_of_the_large_layer_is_the_definition_too():
    weight, hessian = random_layer(4, 64)
    expected, _ = run_oracle(weight, hessian, "2:4")
    torch.testing.assert_close(textbook(weight, hessian, NM(2, 4), 16), expected, rtol=1e-8, atol=1e-10)


# The baselines


@pytest.mark.parametrize("sparsity", PATTERNS)
def test_magnitude_keeps_the_largest_weights_as_they_are(sparsity):
    weight, hessian = random_layer(6, WIDTH)
    mask = brute_layer_mask(weight.abs(), parse_sparsity(sparsity))
    found = prune_weight(weight, hessian, sparsity, method="magnitude", block_size=BLOCK)
    assert torch.equal(found.mask, mask)
    assert torch.equal(found.weight, torch.where(mask, weight, 0.0))


@pytest.mark.parametrize("sparsity", PATTERNS)
def test_wanda_keeps_the_largest_products_of_weight_and_input_norm_in_each_row(sparsity):
    weight, hessian = random_layer(6, WIDTH)
    pattern = parse_sparsity(sparsity)
    saliency = weight.double().abs() * hessian.double().diagonal().sqrt()
    mask = brute_layer_mask(saliency, pattern if isinstance(pattern, NM) else replace(pattern, per_row=True))
    found = prune_weight(weight, hessian, sparsity, method="wanda", block_size=BLOCK)
    assert torch.equal(found.mask, mask)
    assert torch.equal(found.weight, torch.where(mask, weight, 0.0))


# What every method promises


@pytest.mark.parametrize("sparsity", ["2:4", "3:4", "16:32", "0.5", "0.37"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_dtype_is_kept_and_zeros_stand_exactly_where_the_mask_says(method, dtype, sparsity):
    weight, hessian = random_layer(10, 64, seed=5)
    before = weight.to(dtype)
    found = prune_weight(before.clone(), hessian, sparsity, method=method)
    assert found.weight.dtype == dtype
    assert found.weight.is_contiguous()
    assert found.mask.dtype == torch.bool
    assert torch.equal(found.weight != 0, found.mask)
    wanda_of_a_fraction = method.startswith("wanda") and ":" not in sparsity
    assert_pattern(found.weight, f"{sparsity}/row" if wanda_of_a_fraction else sparsity)


@pytest.mark.parametrize("sparsity", ["2:4", "0.6"])
@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_left_alone_and_the_same_input_gives_the_same_bits(method, sparsity):
    weight, hessian = random_layer(8, 64)
    weight_before, hessian_before = weight.clone(), hessian.clone()
    first, second = (prune_weight(weight, hessian, sparsity, method=method) for _ in range(2))
    assert torch.equal(weight, weight_before)
    assert torch.equal(hessian, hessian_before)
    assert torch.equal(first.weight, second.weight)
    assert (first.loss, first.relative_error) == (second.loss, second.relative_error)


@pytest.mark.parametrize("sparsity", ["2:4", "0.6"])
@pytest.mark.parametrize("method", METHODS)
def test_reported_errors_are_their_definitions(method, sparsity):
    weight, hessian = random_layer(8, 64)
    found = prune_weight(weight, hessian, sparsity, method=method)
    difference = (weight - found.weight).double()
    assert found.loss == pytest.approx(float((difference @ hessian.double() @ difference.T).trace()), rel=1e-4)
    assert found.relative_error == pytest.approx(relative_error(weight, found.weight, hessian), rel=1e-4)
    assert found.damping == 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_returns_identical_bits(method, dtype):
    weight, hessian = random_layer(8, 32)
    found = prune_weight(weight.to(dtype), hessian, 0.0, method=method)
    assert torch.equal(found.weight, weight.to(dtype))
    assert found.mask.all()
    assert found.relative_error == 0


@pytest.mark.parametrize("method", METHODS)
def test_arithmetic_is_float64_on_request(method):
    weight, hessian = random_layer(8, 64)
    exact = prune_weight(weight.double(), hessian.double(), "2:4", method=method, dtype=torch.float64)
    single = prune_weight(weight.double(), hessian.double(), "2:4", method=method)
    assert exact.relative_error == pytest.approx(relative_error(weight, exact.weight, hessian), rel=1e-12)
    assert exact.relative_error == pytest.approx(single.relative_error, rel=1e-2)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("method", METHODS)
def test_the_scale_of_the_hessian_does_not_matter(method, scale):
    weight, hessian = random_layer(8, 64)
    plain = prune_weight(weight, hessian, "2:4", method=method)
    scaled = prune_weight(weight, hessian * scale, "2:4", method=method)
    assert torch.equal(plain.mask, scaled.mask)
    torch.testing.assert_close(plain.weight, scaled.weight, rtol=1e-3, atol=1e-4)
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-4)


@settings(max_examples=30)
@given(
    rows=st.integers(8, 24),
    groups=st.integers(8, 16),
    sparsity=st.sampled_from(["2:4", "1:4", "3:4", "0.5", "0.75"]),
    seed=st.integers(0, 10_000),
)
def test_sparsegpt_never_loses_more_than_magnitude(rows, groups, sparsity, seed):
    weight, hessian = random_layer(rows, 4 * groups, seed)
    ours = prune_weight(weight, hessian, sparsity, method="sparsegpt")
    theirs = prune_weight(weight, hessian, sparsity, method="magnitude")
    assert ours.relative_error <= theirs.relative_error


# Dead inputs


@pytest.mark.parametrize("method", ["sparsegpt", "sparsegpt+refit", "wanda", "wanda+refit", "admm"])
@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
def test_weights_of_dead_inputs_go_first(method, sparsity):
    weight, hessian = random_layer(8, 32)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[0, 3, 5, 16, 18, 31]] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = prune_weight(weight * (1 + 99 * dead), hessian, sparsity, method=method)
    assert not found.mask[:, dead].any()
    assert torch.isfinite(found.weight).all()
    assert_pattern(found.weight, sparsity)


@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
def test_sparsegpt_with_dead_inputs_is_the_definition(sparsity):
    weight, hessian = random_layer(8, 32)
    hessian[[2, 9]] = 0
    hessian[:, [2, 9]] = 0
    expected, mask = run_oracle(weight, hessian, sparsity)
    found = prune_weight(weight.double(), hessian, sparsity, method="sparsegpt", dtype=torch.float64)
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_never_saw_anything_still_gets_its_pattern(method):
    weight, _ = random_layer(4, 8)
    found = prune_weight(weight, torch.zeros(8, 8), "2:4", method=method)
    assert_pattern(found.weight, "2:4")
    assert found.relative_error == 0


# Damping


def test_damping_that_was_needed_is_reported():
    weight, hessian = random_layer(4, 16)
    lowest = float(torch.linalg.eigvalsh(hessian.double())[0])
    mean = float(hessian.diagonal().mean())
    shifted = hessian - (lowest + 0.05 * mean) * torch.eye(16)  # smallest eigenvalue below -0.01 of the mean diagonal
    found = prune_weight(weight, shifted, "2:4", method="sparsegpt", damping=0.01)
    assert found.damping in (pytest.approx(0.1), pytest.approx(1.0))
    assert_pattern(found.weight, "2:4")


# What is refused


@pytest.mark.parametrize(
    ("weight", "hessian", "options", "fragments"),
    [
        (torch.ones(4, 6), torch.eye(6), {}, ("6", "groups of 4")),
        (torch.ones(4, 8), torch.eye(6), {}, ("8", "[6, 6]")),
        (torch.ones(4, 8), torch.ones(8), {}, ("[8]",)),
        (torch.ones(8), torch.eye(8), {}, ("out_features",)),
        (torch.ones(4, 8, dtype=torch.int8), torch.eye(8), {}, ("int8",)),
        (torch.full((4, 8), float("nan")), torch.eye(8), {}, ("NaN",)),
        (torch.full((4, 8), float("inf")), torch.eye(8), {}, ("infinite",)),
        (torch.ones(4, 8), torch.full((8, 8), float("nan")), {}, ("NaN",)),
        (torch.ones(4, 8), torch.eye(8), {"block_size": 6}, ("block size 6", "2:4")),
        (torch.ones(4, 8), torch.eye(8), {"block_size": 0}, ("block size 0",)),
        (torch.ones(4, 8), torch.eye(8), {"method": "obc"}, ("obc", "sparsegpt")),
        (torch.ones(4, 8), -torch.eye(8), {}, ("not positive definite",)),
        (torch.ones(4, 8), torch.eye(8), {"dtype": torch.bfloat16}, ("float32", "bfloat16")),
    ],
)
def test_what_cannot_be_pruned_is_refused_in_one_line(weight, hessian, options, fragments):
    with refused(*fragments):
        prune_weight(weight, hessian, "2:4", **{"method": "sparsegpt", **options})


@pytest.mark.parametrize(
    ("weight", "hessian"),
    [
        (torch.ones(4, 6), torch.eye(6)),
        (torch.ones(4, 8), -torch.eye(8)),
        (torch.full((4, 8), float("nan")), torch.eye(8)),
        (torch.ones(4, 8), torch.full((8, 8), float("inf"))),
    ],
)
def test_refusals_carry_the_layers_name(weight, hessian):
    with refused("blocks.3.fc2"):
        prune_weight(weight, hessian, "2:4", method="sparsegpt", name="blocks.3.fc2")


def test_half_precision_overflow_is_never_returned_in_silence():
    weight, hessian = random_layer(8, 32)
    half = (weight / weight.abs().max() * 60000).half()
    try:
        found = prune_weight(half, hessian, "1:4", method="sparsegpt", name="fc1")
    except SparseGPTError as error:
        assert "fc1" in str(error)
    else:
        assert torch.isfinite(found.weight).all()


def test_layers_of_one_input_share_its_hessian():
    weight, hessian = random_layer(12, 32)
    shared = DampedHessian(hessian, 0.01)
    for part in weight.split(4):
        alone = prune_weight(part, hessian, "2:4")
        together = prune_layer(part, shared, NM(2, 4), METHODS["admm"])
        assert torch.equal(alone.weight, together.weight)


@pytest.mark.parametrize("method", METHODS)
def test_a_modules_own_parameter_is_pruned_without_keeping_gradients(method):
    weight, hessian = random_layer(4, 16)
    expected = prune_weight(weight, hessian, "2:4", method=method)
    parameter = torch.nn.Parameter(weight.clone())
    found = prune_weight(parameter, hessian.requires_grad_(), "2:4", method=method)
    assert torch.equal(found.weight, expected.weight)
    assert not found.weight.requires_grad
    assert torch.equal(parameter, weight)
