"""Magnitude pruning: drop the smallest |w|, look at no data. The baseline that every other method must beat."""

from torch import Tensor

from sparsegpt.solvers.hessian import DampedHessian


def magnitude(weight: Tensor, hessian: DampedHessian) -> Tensor:
    """[R, C] -> saliency |w| [R, C]. The Hessian is not used."""
    return weight.abs()
