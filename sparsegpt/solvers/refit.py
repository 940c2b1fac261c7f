"""Best weights on a fixed mask, by preconditioned conjugate gradients for all rows at once.

For one row with target t and kept set S the optimum solves H_SS w_S = (H t)_S. Instead of one factorisation a row, all
rows iterate together: a product with the operator is P -> (P H) masked, and the preconditioner is 1 / diag H (Jacobi).
Every iteration lowers each row's loss, so it can stop anywhere (Hestenes & Stiefel 1952; Saad, Iterative Methods,
algorithm 9.1).

Dimension key: R out_features, C in_features.
"""

import torch
from torch import Tensor

from sparsegpt.solvers.products import Multiplier, pieces
from sparsegpt.strips import strips

ITERATIONS = 15
TOLERANCE = 1e-6
# Columns of one product of `row_losses`.
LOSS_BLOCK = 256


def refit(
    weight: Tensor,
    mask: Tensor,
    target: Tensor,
    hessian: Tensor,
    *,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Weight [R, C], mask bool [R, C], target [R, C], Hessian [C, C] -> new weight [R, C], zero where not kept.

    Minimises tr((target - w) hessian (target - w)^T) from the start `weight`, for a positive semi-definite Hessian.
    Stops after `iterations` products with it, or once every row's preconditioned residual has fallen below `tolerance`
    of where it started. A row that rounding made worse keeps its start.
    """
    start_RC = weight.masked_fill(~mask, 0)
    weight_RC = start_RC.clone()
    multiplier = Multiplier(hessian)
    residual_RC = multiplier.after(target - start_RC)
    descend(weight_RC, mask, residual_RC, multiplier, hessian.diagonal(), iterations=iterations, tolerance=tolerance)
    worse_R = row_losses(target - weight_RC, hessian) > row_losses(target - start_RC, hessian)
    return torch.where(worse_R[:, None], start_RC, weight_RC)


def descend(
    weight: Tensor,
    mask: Tensor,
    residual: Tensor,
    multiplier: Multiplier,
    diagonal: Tensor,
    *,
    iterations: int,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Weight [R, C], mask bool [R, C], residual [R, C], diagonal [C] -> by how much the loss fell, a scalar [].

    The iterations of `refit` without its last look, in place on the weight, which is zero outside the mask. residual:
    (target - weight) hessian; used up. multiplier: the Hessian, which may be rounded: then a row can end above its
    start, far above where the Hessian was almost singular. All steps are relative to the residual, so that is worth all
    digits of the Hessian. diagonal: of the Hessian. What is returned is true if the multiplier was the Hessian.
    """
    jacobi_C = diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny).reciprocal()
    gained = diagonal.new_zeros(())
    for rows in pieces(weight):
        gained += _descend(weight[rows], mask[rows], residual[rows], multiplier, jacobi_C, iterations, tolerance)
    return gained


def _descend(
    weight_RC: Tensor,
    mask_RC: Tensor,
    residual_RC: Tensor,
    multiplier: Multiplier,
    jacobi_C: Tensor,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """[R, C] each, of some rows -> what their loss fell by: conjugate gradients in place on weights and residuals."""
    kept_RC = mask_RC.to(residual_RC.dtype)  # a product with booleans takes three times as long
    residual_RC.mul_(kept_RC)
    preconditioned_RC = residual_RC * jacobi_C
    direction_RC = preconditioned_RC.clone()
    energy_R = (residual_RC * preconditioned_RC).sum(1)
    floor_R = energy_R * tolerance**2
    gained_R = torch.zeros_like(energy_R)
    for left in reversed(range(iterations)):
        if (energy_R <= floor_R).all():
            break
        image_RC = multiplier.after(direction_RC).mul_(kept_RC)
        step_R = _ratio(energy_R, (direction_RC * image_RC).sum(1))
        gained_R += step_R * energy_R  # exact along a conjugate direction: the loss falls by (r^T p)^2 / (p^T H p)
        weight_RC.addcmul_(direction_RC, step_R[:, None])
        if not left:
            break  # nothing reads what follows
        residual_RC.addcmul_(image_RC, step_R[:, None], value=-1)
        torch.mul(residual_RC, jacobi_C, out=preconditioned_RC)
        next_energy_R = (residual_RC * preconditioned_RC).sum(1)
        direction_RC.mul_(_ratio(next_energy_R, energy_R)[:, None]).add_(preconditioned_RC)
        energy_R = next_energy_R
    return gained_R.sum()


def row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """Error [R, C], symmetric Hessian [C, C] -> diag(error hessian error^T), [R]: each row's share of the loss.

    Only the upper block triangle of the Hessian is multiplied; what is off the diagonal counts twice.
    """
    losses_R = error.new_zeros(len(error))
    for block in strips(error.shape[1], LOSS_BLOCK):
        product_RB = error[:, block] @ hessian[block, block]
        if block.start:
            product_RB.addmm_(error[:, : block.start], hessian[: block.start, block], alpha=2)
        losses_R += (product_RB * error[:, block]).sum(1)
    return losses_R


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """[R], [R] -> numerator / denominator [R], and 0 where a converged row leaves nothing to divide by."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
