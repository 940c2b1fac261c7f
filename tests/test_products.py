"""Quick products: bounded rounding, exact where they must be, and never where they would not be quick."""

import pytest
import torch

from sparsegpt.solvers import products
from sparsegpt.solvers.products import Multiplier

BFLOAT16_ROUNDING = 2.0**-8


@pytest.fixture
def factors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 24, generator=generator), torch.randn(5, 24, generator=generator)


@pytest.fixture
def quick_machine(monkeypatch):
    monkeypatch.setattr(products, "QUICK_WIDTH", 0)
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda _: True)


def test_products_are_rounded_by_no_more_than_their_factors_are(factors, quick_machine):
    matrix, other = factors
    multiplier = Multiplier(matrix)
    for ours, exact, size in (
        (multiplier.after(other), other.double() @ matrix.double(), other.abs() @ matrix.abs()),
        (multiplier.times(other.T), matrix.double() @ other.double().T, matrix.abs() @ other.abs().T),
    ):
        assert ours.dtype == torch.float32
        assert ((ours - exact).abs() <= 3 * BFLOAT16_ROUNDING * size).all()
        assert not torch.equal(ours.double(), exact)


def test_a_fine_product_loses_nothing_of_the_matrix(factors, quick_machine):
    """The other factor is exact in bfloat16 and picks single entries, so that nothing else is rounded."""
    matrix, _ = factors
    picked = torch.eye(24)[:5]
    assert torch.allclose(
        Multiplier(matrix).after_finely(picked, matrix), matrix[:5], rtol=BFLOAT16_ROUNDING**2, atol=0
    )
    assert not torch.allclose(Multiplier(matrix).after(picked), matrix[:5], rtol=BFLOAT16_ROUNDING**2, atol=0)


@pytest.mark.parametrize("reason", ["float64", "narrow", "slow machine", "not asked for"])
def test_products_are_full_where_rounding_is_wrong_or_saves_nothing(factors, reason, quick_machine, monkeypatch):
    matrix, other = factors
    if reason == "float64":
        matrix, other = matrix.double(), other.double()
    if reason == "narrow":
        monkeypatch.setattr(products, "QUICK_WIDTH", 25)
    if reason == "slow machine":
        monkeypatch.setattr(products, "_multiplies_bfloat16", lambda _: False)
    multiplier = Multiplier(matrix, quick=reason != "not asked for")
    assert torch.equal(multiplier.after(other), other @ matrix)
    assert torch.equal(multiplier.after_finely(other, matrix), other @ matrix)
    assert torch.equal(multiplier.times(other.T), matrix @ other.T)
