"""Mask and weights together, by the alternating direction method of multipliers.

After ALPS (Meng et al. 2024, arXiv:2406.07831) and Boza 2024 (arXiv:2401.02938). With columns scaled by sqrt(diag H),
so that H has a unit diagonal, alternate
    W <- argmin tr((T - W) H (T - W)^T) + rho ||W - Z + V||^2  =  T + rho (Z - V - T) (H + rho)^-1
    Z <- projection of W + V to the pattern
    V <- V + W - Z
with rising rho, then refit the kept weights exactly. Written with T taken out, one iteration is one product, and the
inverse changes only when rho does: no eigendecomposition is needed.

The schedule is measured (geometric mean of the relative error, 18 layers of a 15M-parameter Llama): 30 iterations from
rho 0.1, times 1.3 every 3, reach 0.0345 at 2:4 and 0.0165 at 50%; 12 iterations from 0.3, times 1.5 every 4, reach
0.0347 and 0.0164 at less than half the cost. SparseGPT reaches 0.0465 and 0.0238.

Dimension key: R out_features, C in_features.
"""

import torch
from torch import Tensor

from sparsegpt.hessian import DampedHessian
from sparsegpt.masks import layer_mask
from sparsegpt.solvers.refit import refit, row_losses
from sparsegpt.solvers.sparsegpt import sparsegpt
from sparsegpt.sparsity import Sparsity

ITERATIONS = 12
RHO, RHO_GROWTH, RHO_PERIOD = 0.3, 1.5, 4
# The projection is close to the optimum on its mask; more steps change the loss by less than 0.1%.
REFIT_ITERATIONS = 8


def admm(weight: Tensor, hessian: DampedHessian, pattern: Sparsity, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Prune weight [R, C] under the Hessian [C, C]. Returns (weight, mask).

    Non-convex as it is, the search can end above SparseGPT's loss on some layer; the better of the two is returned.
    block_size: of that SparseGPT pass.
    """
    mask = search_mask(weight, hessian, pattern)
    found = refit(weight.masked_fill(~mask, 0), mask, weight, hessian.damped, iterations=REFIT_ITERATIONS)
    swept, swept_mask = sparsegpt(weight, hessian, pattern, block_size=block_size)
    if _loss(weight - found, hessian) <= _loss(weight - swept, hessian):
        return found, mask
    return swept, swept_mask


def search_mask(weight: Tensor, hessian: DampedHessian, pattern: Sparsity) -> Tensor:
    """The mask that the alternation ends with, bool [R, C]."""
    scale_C = hessian.damped.diagonal().sqrt()
    scaled_CC = hessian.damped / torch.outer(scale_C, scale_C)
    target_RC = weight * scale_C
    sparse_RC, dual_RC = target_RC.masked_fill(~layer_mask(target_RC.abs(), pattern), 0), torch.zeros_like(target_RC)
    rho = RHO
    for iteration in range(ITERATIONS):
        if iteration and iteration % RHO_PERIOD == 0:
            rho *= RHO_GROWTH
            dual_RC /= RHO_GROWTH  # V is the multiplier divided by rho
        if iteration % RHO_PERIOD == 0:
            inverse_CC = _regularised_inverse(scaled_CC, rho)
        dense_RC = torch.addmm(target_RC, sparse_RC - dual_RC - target_RC, inverse_CC, alpha=rho)
        dual_RC += dense_RC
        mask_RC = layer_mask(dual_RC.abs(), pattern)
        sparse_RC = dual_RC.masked_fill(~mask_RC, 0)
        dual_RC -= sparse_RC
    return mask_RC


def _regularised_inverse(matrix: Tensor, rho: float) -> Tensor:
    """(matrix + rho)^-1 for a positive definite matrix with unit diagonal: rho keeps it far from singular."""
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix.diagonal_scatter(matrix.diagonal() + rho)))


def _loss(error: Tensor, hessian: DampedHessian) -> float:
    return float(row_losses(error, hessian.raw).sum())
