"""Quick products: bounded rounding, exact where they must be, and never where they would not be quick."""

import pytest
import torch

from sparsegpt.solvers import products
from sparsegpt.solvers.products import Multiplier, quick_multiplier

from .support import QUICK_DTYPES


@pytest.fixture
def factors():
    """A symmetric matrix with a large diagonal, as Hessians have, and another factor of mixed scales."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(24, 24, generator=generator)
    other = torch.randn(5, 24, generator=generator) * torch.tensor([1.0, 1e-3, 1e4, 1.0, 0.0])[:, None]
    return matrix + matrix.T + 30 * torch.eye(24), other


@pytest.fixture(params=QUICK_DTYPES)
def quick_dtype(request, monkeypatch):
    monkeypatch.setattr(products, "QUICK_WIDTH", 0)
    monkeypatch.setattr(products, "_quick_dtype", lambda device_type: request.param)
    return request.param


def rounding(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The most by which rounding moves each entry of a left factor; int8 has a scale for each row."""
    if dtype == torch.bfloat16:
        return factor.abs() * 2.0**-8
    return (factor.abs().amax(1, keepdim=True) / 254).expand_as(factor)


def test_products_are_rounded_by_no_more_than_their_factors_are(factors, quick_dtype):
    matrix, other = (factor.double() for factor in factors)
    multiplier = quick_multiplier(factors[0])
    moved, moved_other = rounding(matrix - matrix.diag().diag(), quick_dtype), rounding(other, quick_dtype)
    if quick_dtype == torch.bfloat16:
        moved += rounding(matrix.diag().diag(), quick_dtype)  # the diagonal is rounded too
    bound = moved_other @ (matrix.abs() + moved).T + other.abs() @ moved.T
    exact = other @ matrix
    bound += rounding(exact.abs() + bound, torch.bfloat16)  # the result may be in bfloat16 first
    for ours in (multiplier.after(factors[1]), multiplier.times(factors[1].T).T):
        assert ours.dtype == torch.float32
        assert ((ours - exact).abs() <= bound * 1.001).all()
        assert not torch.equal(ours.double(), exact)
        assert (ours[4] == 0).all()  # a row without a scale


def test_a_fine_product_loses_nothing_of_the_matrix(factors, quick_dtype):
    """The other factor is exact in every dtype and picks single entries, so that nothing else is rounded."""
    matrix, _ = factors
    picked = torch.eye(24)[:5]
    multiplier = quick_multiplier(matrix)
    torch.testing.assert_close(multiplier.after_finely(picked, matrix), matrix[:5], rtol=2.0**-16, atol=0)
    assert not torch.allclose(multiplier.after(picked), matrix[:5], rtol=2.0**-16, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(factors, quick_dtype, bad):
    matrix, other = factors
    other[0, 3] = bad
    multiplier = quick_multiplier(matrix)
    for ours in (multiplier.after(other), multiplier.times(other.T).T):
        assert not ours[0].isfinite().any()
        assert ours[1:].isfinite().all()


@pytest.mark.parametrize("reason", ["float64", "narrow", "slow machine", "not asked for", "too wide"])
def test_products_are_full_where_rounding_is_wrong_or_saves_nothing(factors, reason, quick_dtype, monkeypatch):
    matrix, other = factors
    if reason == "float64":
        matrix, other = matrix.double(), other.double()
    if reason == "narrow":
        monkeypatch.setattr(products, "QUICK_WIDTH", 25)
    if reason == "slow machine":
        monkeypatch.setattr(products, "_quick_dtype", lambda device_type: None)
    if reason == "too wide":
        if quick_dtype != torch.int8:
            pytest.skip("only sums of integers have a limit")
        monkeypatch.setattr(products, "INT8_WIDTH", 23)
    multiplier = Multiplier(matrix) if reason == "not asked for" else quick_multiplier(matrix)
    assert torch.equal(multiplier.after(other), other @ matrix)
    assert torch.equal(multiplier.after_finely(other, matrix), other @ matrix)
    assert torch.equal(multiplier.times(other.T), matrix @ other.T)


def test_the_widest_sums_of_integers_fit():
    assert products.INT8_WIDTH * 127**2 < 2**31 <= (products.INT8_WIDTH + 1) * 127**2
