"""Wanda (Sun et al. 2023, arXiv:2306.11695): drop the smallest |w_ij| * ||x_j||, row by row; no weight update."""

from torch import Tensor

from sparsegpt.solvers.hessian import DampedHessian


def wanda(weight: Tensor, hessian: DampedHessian) -> Tensor:
    """[R, C], Hessian [C, C] -> saliency |w_ij| sqrt(H_jj) [R, C]."""
    return weight.abs() * hessian.raw.diagonal().sqrt()
