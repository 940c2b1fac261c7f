"""Mask and weights together, by the alternating direction method of multipliers.

After ALPS (Meng et al. 2024, arXiv:2406.07831) and Boza 2024 (arXiv:2401.02938). From SparseGPT's result, with scaled
columns, alternate

    Z <- projection of S to the pattern
    W <- argmin tr((T - W) H (T - W)^T) + rho ||W - (2 Z - S)||^2  =  T + rho (2 Z - S - T) (H + rho)^-1
    S <- S + a (W - Z)                                             (over-relaxation, a falling to 1)

with one rho, then refit the kept weights. S is the sum of the weights and the scaled dual variable, which is S - Z
(so Eckstein & Bertsekas 1992, with a below 2; the first step may go further, as only four are taken). The scale of a
column lies between Wanda's and SparseGPT's, sqrt(H_jj) and 1 / sqrt((H^-1)_jj). Written with T taken out, one iteration
is one product with one inverse. As it only has to lead to a mask, it is a quick product (`solvers.products`) with a
projection whose count may be off a bit; the last projection is exact.

Dimension key: R out_features, C in_features. Weights of the search lie as [C, R].
"""

import torch
from torch import Tensor

from sparsegpt.solvers.factor import cholesky_in_place, invert_lower, square_lower
from sparsegpt.solvers.hessian import DampedHessian, ScaledHessian
from sparsegpt.solvers.masks import layer_mask, rough_projection
from sparsegpt.solvers.products import Multiplier, multiplier, pieces, quick_dtype
from sparsegpt.solvers.refit import descend, row_losses
from sparsegpt.solvers.sparsegpt import sweep
from sparsegpt.sparsity import NM, Sparsity
from sparsegpt.strips import transposed

# The schedule was found by coordinate descent over layers of a 15M- and a 135M-parameter Llama. Scale of a column:
# Wanda's sqrt(H_jj) to this power times SparseGPT's 1 / sqrt((H^-1)_jj) to the rest of 1.
SCALE = 0.4
RHO = 1.0
RELAXATIONS = (2.6, 1.4, 1.3, 1.0)
REFIT_ITERATIONS = 4
# Share of SparseGPT's loss, as its errors add it up, that may be rounding.
ROUNDING = 0.01
# A refit in rounded products whose result has more than this times the loss that its steps foretell was led astray; on
# 60 real layers it is 1.0005 at most.
ASTRAY = 1.005


def admm(weight: Tensor, hessian: DampedHessian, pattern: Sparsity, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Weight [R, C], Hessian [C, C] -> (weight [R, C], mask bool [R, C], True = kept).

    Where the Hessian is almost singular a refit in rounded products can go astray: it is then done again in full
    precision. Non-convex as it is, the search can end above SparseGPT's loss on some layer; the better of both results
    is returned. block_size: of that SparseGPT pass.
    Raises SparseGPTError, naming the layer, where no damping makes the Hessian positive definite.
    """
    swept, swept_mask, swept_loss = sweep(weight, hessian, pattern, block_size=block_size)
    rounded = quick_dtype(hessian.raw)
    for rounded_refit in dict.fromkeys((rounded, None)):
        found, mask, foretold = search(weight, hessian, pattern, swept, rounded, rounded_refit)
        error_RC = weight - found
        loss = _loss(error_RC, hessian)
        if loss + _damping_loss(error_RC, hessian) <= ASTRAY * foretold:
            break
    del error_RC
    # Its own loss costs SparseGPT another product: mostly what is known of it decides.
    at_least = (1 - ROUNDING) * swept_loss - _damping_loss(weight - swept, hessian)
    if loss <= at_least or loss <= _loss(weight - swept, hessian):
        return found, mask
    return swept, swept_mask


def search(
    weight: Tensor,
    hessian: DampedHessian,
    pattern: Sparsity,
    start: Tensor,
    rounded: torch.dtype | None = None,
    rounded_refit: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [R, C], Hessian [C, C], start [R, C] -> (weight [R, C], mask bool [R, C], loss []).

    The alternation from the sparse weights `start`, and the refit on its mask. rounded, rounded_refit: what products of
    each are rounded to (`products.multiplier`). loss: under the damped Hessian, as the steps of the refit have it.
    Raises SparseGPTError, naming the layer, where no damping makes the Hessian positive definite.
    """
    scale_C = hessian.damped_diagonal.pow(SCALE / 2) * hessian.inverse_diagonal.pow((SCALE - 1) / 2)
    hessian.release_factor()
    scaled = ScaledHessian(hessian, scale_C)
    sparse_RC, mask_RC = _alternate(weight, scale_C, scaled, pattern, start, rounded)
    steps = multiplier(scaled, rounded_refit)
    error_RC = (weight * scale_C).sub_(sparse_RC)
    residual_RC = steps.after_finely(error_RC, scaled)
    loss = torch.dot(error_RC.flatten(), residual_RC.flatten())
    del error_RC
    gained = descend(sparse_RC, mask_RC, residual_RC, steps, scaled.diagonal(), iterations=REFIT_ITERATIONS)
    return sparse_RC.div_(scale_C), mask_RC, loss - gained


def _alternate(
    weight: Tensor,
    scale_C: Tensor,
    scaled: ScaledHessian,
    pattern: Sparsity,
    start: Tensor,
    rounded: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Weight [R, C], scale [C], start [R, C] -> the last Z in scaled columns [R, C], and its mask bool [R, C]."""
    sparse_RC, mask_RC = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)
    resolvent = multiplier(_resolvent(scaled, RHO), rounded)
    for parts in _bound_together(weight, pattern):
        shifted = _scaled_columns(start, scale_C, parts)
        _iterate(_scaled_columns(weight, scale_C, parts), shifted, resolvent, pattern)
        for rows in parts:
            sparse_RC[rows] = transposed(shifted.pop(0))
        together = slice(parts[0].start, parts[-1].stop)
        mask_RC[together] = layer_mask(sparse_RC[together].abs(), pattern)
        # As in the sweep: quicker than masked_fill, and no -0.0.
        sparse_RC[together].mul_(mask_RC[together]).add_(0.0)
    return sparse_RC, mask_RC


def _bound_together(weight: Tensor, pattern: Sparsity) -> list[list[slice]]:
    """Pieces of rows in lists: all in one where a threshold is for the whole layer, else every piece for itself."""
    parts = pieces(weight)
    if isinstance(pattern, NM) or pattern.per_row or not parts:
        return [[rows] for rows in parts]
    return [parts]


def _scaled_columns(weight: Tensor, scale_C: Tensor, parts: list[slice]) -> list[Tensor]:
    """Rows of weight [R, C] with scaled columns, as [C, R]."""
    return [transposed(weight[rows] * scale_C) for rows in parts]


def _iterate(targets: list[Tensor], shifted: list[Tensor], resolvent: Multiplier, pattern: Sparsity) -> None:
    """The iterations on pieces [C, R] of the scaled targets T and of S, which is Z at first; S in place.

    resolvent: rho (H + rho)^-1 - 1, of which the product with 2 Z - S - T is what takes Z to 2 Z - S to W.
    """
    for iteration, relaxation in enumerate(RELAXATIONS):
        project = rough_projection(shifted, pattern) if iteration else torch.clone
        for target_CR, shifted_CR in zip(targets, shifted, strict=True):
            sparse_CR = project(shifted_CR)
            change_CR = shifted_CR.lerp(sparse_CR, 2).sub_(target_CR)
            # Z + (2 Z - S - T) times the resolvent is S + W - Z.
            shifted_CR.lerp_(resolvent.add_times(sparse_CR, change_CR), relaxation)


def _resolvent(matrix: ScaledHessian, rho: float) -> Tensor:
    """rho (matrix + rho)^-1 - 1 for a positive semi-definite matrix; in float64 where float32 cannot factor it."""
    shifted = _plus_diagonal(matrix[:], rho)
    lower = cholesky_in_place(shifted)
    if lower is None:
        lower = torch.linalg.cholesky(_plus_diagonal(matrix[:], rho).double())
    invert_lower(lower)
    return _plus_diagonal(square_lower(lower).mul_(rho), -1).to(matrix.dtype)


def _plus_diagonal(matrix: Tensor, value: float) -> Tensor:
    matrix.diagonal().add_(value)
    return matrix


def _damping_loss(error: Tensor, hessian: DampedHessian) -> Tensor:
    """What the damping, and the diagonal given to dead inputs, add to the loss of error [R, C]."""
    return error.square().sum(0) @ (hessian.damped_diagonal - hessian.raw.diagonal())


def _loss(error: Tensor, hessian: DampedHessian) -> float:
    return float(row_losses(error, hessian.raw).sum())
