"""Wanda (Sun et al. 2023, arXiv:2306.11695): drop the smallest |w_ij| * ||x_j||, row by row; no weight update."""

from dataclasses import replace

from torch import Tensor

from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.solvers.masks import layer_mask
from sparsegpt.sparsity import NM, Sparsity


def wanda(weight: Tensor, hessian: DampedHessian, pattern: Sparsity, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Saliency |w_ij| sqrt(H_jj), compared within a row (unstructured) or within a group of a row (n:m).

    weight: [R, C]. Returns (weight, mask), the kept weights unchanged. block_size is not used.
    """
    saliency = weight.abs() * hessian.raw.diagonal().sqrt()
    mask = layer_mask(saliency, pattern if isinstance(pattern, NM) else replace(pattern, per_row=True))
    return weight.masked_fill(~mask, 0), mask
