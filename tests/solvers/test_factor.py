"""Triangular factors and inverses against torch's own, for every size of strip."""

import pytest
import torch

from sparsegpt.solvers import factor as factor_module
from sparsegpt.solvers.factor import cholesky_in_place, inverse_factor, invert_lower, square_lower
from tests.support import damped, random_layer


def lower_triangle(size: int) -> torch.Tensor:
    """Well conditioned, float64."""
    below = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril(-1)
    return 0.3 * below + torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_inverse_factor_is_upper_and_squares_to_the_inverse(size):
    matrix = damped(random_layer(1, size)[1])
    factor = inverse_factor(matrix.clone())  # whose memory it uses up
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(matrix), rtol=1e-9, atol=1e-12)


def test_inverse_factor_of_an_indefinite_matrix_is_none():
    assert inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]])) is None


@pytest.mark.parametrize("column", [0, 4, 8])
def test_a_matrix_that_turns_indefinite_in_any_strip_has_no_factor(column, monkeypatch):
    monkeypatch.setattr(factor_module, "STRIP", 3)
    matrix = damped(random_layer(1, 9)[1])
    matrix[column, column] = -1
    assert cholesky_in_place(matrix) is None


@pytest.mark.parametrize("strip", [1, 3, 256])
@pytest.mark.parametrize("size", [1, 2, 5, 16, 33])
def test_cholesky_in_place_is_torchs(size, strip, monkeypatch):
    monkeypatch.setattr(factor_module, "STRIP", strip)
    matrix = damped(random_layer(1, size)[1])
    lower = matrix.clone()
    assert cholesky_in_place(lower) is lower
    assert torch.equal(lower, lower.tril())
    torch.testing.assert_close(lower, torch.linalg.cholesky(matrix), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("strip", [1, 3, 256])
@pytest.mark.parametrize("size", [1, 2, 5, 16, 33])
def test_square_of_a_triangle_is_the_product(size, strip, monkeypatch):
    monkeypatch.setattr(factor_module, "STRIP", strip)
    lower = lower_triangle(size)
    torch.testing.assert_close(square_lower(lower.clone()), lower.T @ lower, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strip", [1, 3, 256])
@pytest.mark.parametrize("base", [1, 2, 3, 128])
@pytest.mark.parametrize("size", [1, 2, 5, 16, 33])
def test_triangular_inverse(size, base, strip, monkeypatch):
    monkeypatch.setattr(factor_module, "STRIP", strip)
    lower = lower_triangle(size)
    inverse = lower.clone()
    invert_lower(inverse, base)
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse @ lower, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-10)
