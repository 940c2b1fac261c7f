"""Minimising a function of orthonormal matrices.

Adam on the gradient's skew part A = R^T G - G^T R; each step R <- R (I + A)^-1 (I - A), the Cayley map, stays
orthonormal (Wen & Yin 2013, Mathematical Programming 142). The gradient may be of a part of the function, drawn anew.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Adam's decay of the mean and of the square; the first is for gradients that vary with the rows that are looked at.
MOMENTS = (0.9, 0.95)
# Steps until the full rate; it falls linearly to 0 from there.
WARM_UP = 5


@dataclass(frozen=True)
class Schedule:
    """steps: of the learning. rate: radians by which the first full step turns a pair of axes, at most."""

    steps: int = 60
    rate: float = 0.02


def learn_basis(
    objective: Callable[[Tensor], Tensor], start: Tensor, schedule: Schedule, *, fixes_ones: bool = False
) -> Tensor:
    """Minimise objective(basis) over orthonormal bases [..., D, D], beginning at `start`; returns the last one.

    objective: to a scalar, anew at every call; may be noisy; where it has no finite gradient `start` is returned.
    fixes_ones: keep the vector of ones where it is.
    """
    basis, identity = start.clone(), torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
    mean, square = torch.zeros_like(basis), torch.zeros_like(basis)
    for step in range(schedule.steps):
        tangent = _tangent(objective, basis)
        if not torch.isfinite(tangent).all():  # weights or inputs whose squares leave the range of the arithmetic
            return start.double()
        mean = MOMENTS[0] * mean + (1 - MOMENTS[0]) * tangent
        square = MOMENTS[1] * square + (1 - MOMENTS[1]) * tangent.square()
        direction = mean / (1 - MOMENTS[0] ** (step + 1))
        direction /= (square / (1 - MOMENTS[1] ** (step + 1))).sqrt() + torch.finfo(basis.dtype).tiny
        rate = schedule.rate * min(1.0, (step + 1) / WARM_UP) * (1 - step / schedule.steps)
        turn = rate / 2 * (_without_ones(direction) if fixes_ones else direction)
        basis = basis @ torch.linalg.solve(identity + turn, identity - turn)
    return _orthonormal(basis)


def _tangent(objective: Callable[[Tensor], Tensor], basis: Tensor) -> Tensor:
    """[..., D, D]: the gradient's part along the orthonormal matrices, in the basis itself; skew-symmetric."""
    with torch.enable_grad():
        leaf = basis.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(leaf), leaf)
    product: Tensor = basis.mT @ gradient
    return product - product.mT


def _without_ones(skew: Tensor) -> Tensor:
    """P A P with P = I - 1 1^T / D: its turns leave the vector of ones where it is."""
    without_rows = skew - skew.mean(-2, keepdim=True)
    return without_rows - without_rows.mean(-1, keepdim=True)


def _orthonormal(basis: Tensor) -> Tensor:
    """The nearest orthonormal matrix, in float64: what rounding has added up over the steps is gone."""
    left, _, right = torch.linalg.svd(basis.double())
    nearest: Tensor = left @ right
    return nearest
