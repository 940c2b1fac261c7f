"""Triangular factors and inverses of symmetric matrices, in the matrices' own memory.

The factor of an inverse. SparseGPT needs the upper U with U^T U = A^-1. With J the reversal of all columns and
J A J = L L^T, the matrix V = J L J is upper and A = V V^T, hence U = V^-1: one factorisation and one triangular
inverse, instead of two factorisations around a full inverse.

Dimension key: C rows and columns.
"""

import torch
from torch import Tensor

from sparsegpt.strips import strips

# Rows or columns of one product with a triangular matrix, whose zeros beyond the strip are left out.
STRIP = 256
# Below this width a triangle is inverted by the library.
INVERTED_AT_ONCE = 128
# Elements turned round, or rows looked at, with one temporary.
TURNED, SEEN = 1 << 18, 512


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """Symmetric [C, C] -> upper U [C, C] with U^T U = matrix^-1; None where the matrix is not positive definite.

    The matrix's own memory is used up: a wide layer's Hessian may be larger than its block's weights.
    """
    lower = cholesky_in_place(_reverse(matrix.contiguous()))
    if lower is None:
        return None
    invert_lower(lower)
    factor = _reverse(lower)
    return factor if all(torch.isfinite(rows).all() for rows in factor.split(SEEN)) else None


def cholesky_in_place(matrix: Tensor) -> Tensor | None:
    """Contiguous symmetric [C, C] -> lower L [C, C] with L L^T = matrix, in its own memory; None if not definite.

    A CPU works through strips of columns: torch clears the other triangle of what LAPACK returns element by element
    down the columns, which takes as long as the factorisation.
    """
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    for strip in strips(len(matrix), STRIP if matrix.device.type == "cpu" else max(1, len(matrix))):
        # Left-looking: a strip first takes what all finished columns give it, one product with few rows of them.
        panel, done = matrix[strip.start :, strip], slice(strip.start)
        panel.addmm_(matrix[strip.start :, done], matrix[strip, done].T, alpha=-1)
        corner, below = matrix[strip, strip], matrix[strip.stop :, strip]
        # LAPACK counts by columns: what it calls the upper factor of the transposed view is the lower one here.
        _, failed = torch.linalg.cholesky_ex(corner.T, upper=True, out=(corner.T, info))
        if failed:
            return None
        below.copy_(torch.linalg.solve_triangular(corner.T, below, upper=True, left=False))
        matrix[strip, strip.stop :] = 0
    return matrix


def invert_lower(lower: Tensor, base: int = INVERTED_AT_ONCE) -> None:
    """Lower triangular [C, C]: inverted in place, by halves, without multiplying by a triangle's zeros.

    base: the width up to which the library inverts.
    """
    size = lower.shape[0]
    if size <= base:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    top, bottom, corner = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    invert_lower(top, base)
    invert_lower(bottom, base)
    # [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]. B A^-1 needs of B the columns from a strip on, so strips
    # going forward may overwrite B; a product with D^-1 from the left needs the rows up to a strip: they go backward.
    for strip in strips(half, STRIP):
        corner[:, strip] = corner[:, strip.start :] @ top[strip.start :, strip]
    for strip in reversed(strips(size - half, STRIP)):
        torch.neg(bottom[strip, : strip.stop] @ corner[: strip.stop], out=corner[strip])


def square_lower(lower: Tensor) -> Tensor:
    """Lower triangular L [C, C] -> L^T L [C, C] in its own memory, without multiplying by its zeros."""
    # A strip needs the rows from its own on; earlier strips have written above them alone.
    for strip in strips(len(lower), STRIP):
        rest = lower[strip.start :]
        lower[strip, : strip.stop] = rest[:, strip].T @ rest[:, : strip.stop]
        lower[: strip.start, strip] = lower[strip, : strip.start].T
    return lower


def _reverse(matrix: Tensor) -> Tensor:
    """Contiguous [C, C] with both axes reversed, in place: its elements in reverse order."""
    flat = matrix.view(-1)
    half = len(flat) // 2
    for front in strips(half, TURNED):
        back = slice(len(flat) - front.stop, len(flat) - front.start)
        values = flat[front].clone()
        flat[front] = flat[back].flip(0)
        flat[back] = values.flip(0)
    return matrix
