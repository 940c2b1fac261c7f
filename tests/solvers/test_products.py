"""Quick products: bounded rounding, exact where they must be, and never where they would not be quick."""

import pytest
import torch

from sparsegpt.solvers import products
from sparsegpt.solvers.products import multiplier, quick_dtype
from tests.support import QUICK_DTYPES


@pytest.fixture
def factors():
    """A symmetric matrix with a large diagonal, as Hessians have, and another factor of mixed scales."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(24, 24, generator=generator)
    other = torch.randn(5, 24, generator=generator) * torch.tensor([1.0, 1e-3, 1e4, 1.0, 0.0])[:, None]
    return matrix + matrix.T + 30 * torch.eye(24), other


def rounding(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The most by which rounding moves each entry of a left factor; int8 has a scale for each row."""
    if dtype == torch.bfloat16:
        return factor.abs() * 2.0**-8
    return (factor.abs().amax(1, keepdim=True) / 254).expand_as(factor)


def times(products, right, start=0.0):
    """matrix @ right, and `start` everywhere, through `add_times`."""
    total = torch.full_like(right, start)
    assert products.add_times(total, right) is total
    return total


@pytest.mark.parametrize("dtype", QUICK_DTYPES)
def test_products_are_rounded_by_no_more_than_their_factors_are(factors, dtype):
    matrix, other = (factor.double() for factor in factors)
    rounded = multiplier(factors[0], dtype)
    moved, moved_other = rounding(matrix - matrix.diag().diag(), dtype), rounding(other, dtype)
    if dtype == torch.bfloat16:
        moved += rounding(matrix.diag().diag(), dtype)  # the diagonal is rounded too
    bound = moved_other @ (matrix.abs() + moved).T + other.abs() @ moved.T
    exact = other @ matrix
    bound += rounding(exact.abs() + bound, torch.bfloat16)  # the result may be in bfloat16 first
    for ours in (rounded.after(factors[1]), times(rounded, factors[1].T).T):
        assert ours.dtype == torch.float32
        assert ((ours - exact).abs() <= bound * 1.001).all()
        assert not torch.equal(ours.double(), exact)
        assert (ours[4] == 0).all()  # a row without a scale
    torch.testing.assert_close(times(rounded, factors[1].T, start=2.0).T, 2 + times(rounded, factors[1].T).T)


@pytest.mark.parametrize("dtype", QUICK_DTYPES)
def test_a_fine_product_loses_nothing_of_the_matrix(factors, dtype):
    """The other factor is exact in every dtype and picks single entries, so that nothing else is rounded."""
    matrix, _ = factors
    picked = torch.eye(24)[:5]
    rounded = multiplier(matrix, dtype)
    torch.testing.assert_close(rounded.after_finely(picked, matrix), matrix[:5], rtol=2.0**-16, atol=0)
    assert not torch.allclose(rounded.after(picked), matrix[:5], rtol=2.0**-16, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", QUICK_DTYPES)
def test_what_is_not_finite_stays_visible(factors, dtype, bad):
    matrix, other = factors
    other[0, 3] = bad
    rounded = multiplier(matrix, dtype)
    for ours in (rounded.after(other), times(rounded, other.T).T):
        assert not ours[0].isfinite().any()
        assert ours[1:].isfinite().all()


def test_products_that_are_not_rounded_are_those_of_torch(factors):
    matrix, other = factors
    full = multiplier(matrix, None)
    assert torch.equal(full.after(other), other @ matrix)
    assert torch.equal(full.after_finely(other, matrix), other @ matrix)
    # Added to a total, a sum may be taken in another order: float32's rounding of each term of it.
    rounding = 2.0**-20 * (matrix.abs() @ other.T.abs())
    for start in (0.0, 2.0):
        expected = start + matrix.double() @ other.T.double()
        assert ((times(full, other.T, start=start) - expected).abs() <= rounding + 2.0**-22 * start).all()


def test_products_are_rounded_only_where_that_is_right_and_saves_time(factors, monkeypatch):
    matrix, _ = factors
    monkeypatch.setattr(products, "QUICK_WIDTH", 24)
    for dtype in (torch.bfloat16, torch.int8, None):
        monkeypatch.setattr(products, "_quick_dtype", lambda device_type, dtype=dtype: dtype)
        assert quick_dtype(matrix) == dtype
        assert quick_dtype(matrix.double()) is None
        assert quick_dtype(matrix[1:, 1:]) is None
    monkeypatch.setattr(products, "_quick_dtype", lambda device_type: torch.int8)
    monkeypatch.setattr(products, "INT8_WIDTH", 23)
    assert quick_dtype(matrix) is None


def test_the_widest_sums_of_integers_fit():
    assert products.INT8_WIDTH * 127**2 < 2**31 <= (products.INT8_WIDTH + 1) * 127**2
