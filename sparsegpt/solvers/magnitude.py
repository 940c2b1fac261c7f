"""Magnitude pruning: drop the smallest |w|, look at no data. The baseline that every other method must beat."""

from torch import Tensor

from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.solvers.masks import layer_mask
from sparsegpt.sparsity import Sparsity


def magnitude(weight: Tensor, hessian: DampedHessian, pattern: Sparsity, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Saliency |w|; one threshold for the layer, or the n largest of each group.

    weight: [R, C]. Returns (weight, mask), the kept weights unchanged. hessian and block_size are not used.
    """
    mask = layer_mask(weight.abs(), pattern)
    return weight.masked_fill(~mask, 0), mask
