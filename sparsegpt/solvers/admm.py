"""Mask and weights together, by the alternating direction method of multipliers.

After ALPS (Meng et al. 2024, arXiv:2406.07831) and Boza 2024 (arXiv:2401.02938). With columns scaled by sqrt(diag H),
so that H has a unit diagonal, alternate
    W <- argmin tr((T - W) H (T - W)^T) + rho ||W - Z + V||^2  =  T + rho (Z - V - T) (H + rho)^-1
    Z <- projection of W + V to the pattern
    V <- V + W - Z
with rising rho, then refit the kept weights exactly. Written with T taken out, one iteration is one product.

Dimension key: R out_features, C in_features.
"""

import torch
from torch import Tensor

from sparsegpt.hessian import DampedHessian
from sparsegpt.masks import layer_mask
from sparsegpt.solvers.refit import refit
from sparsegpt.sparsity import Sparsity

ITERATIONS = 30
RHO, RHO_GROWTH, RHO_PERIOD = 0.1, 1.3, 3


def admm(weight: Tensor, hessian: DampedHessian, pattern: Sparsity, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Prune weight [R, C] under the Hessian. block_size is not used. Returns (weight, mask)."""
    scale_C = hessian.damped.diagonal().sqrt()
    scaled = hessian.damped / torch.outer(scale_C, scale_C)
    target_RC = weight * scale_C
    mask_RC = layer_mask(target_RC.abs(), pattern)
    sparse_RC = target_RC.masked_fill(~mask_RC, 0)
    dual_RC = torch.zeros_like(target_RC)
    rho = RHO
    for iteration in range(ITERATIONS):
        if iteration % RHO_PERIOD == 0:
            rho *= RHO_GROWTH if iteration else 1
            dual_RC /= RHO_GROWTH if iteration else 1
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled + rho * torch.eye(scaled.shape[0])))
        dense_RC = target_RC + rho * ((sparse_RC - dual_RC - target_RC) @ inverse)
        mask_RC = layer_mask((dense_RC + dual_RC).abs(), pattern)
        sparse_RC = (dense_RC + dual_RC).masked_fill(~mask_RC, 0)
        dual_RC += dense_RC - sparse_RC
    return refit(sparse_RC / scale_C, mask_RC, weight, hessian.damped), mask_RC
