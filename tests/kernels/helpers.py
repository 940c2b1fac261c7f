"""Weights of the pattern, shared by the kernel tests."""

import torch
from torch import Tensor


def weight24(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A random weight [rows, columns] that keeps the two largest of every four; a few groups hold fewer."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(rows, columns // 4, 4, generator=generator)
    groups.scatter_(-1, groups.abs().argsort(-1)[..., :2], 0)
    groups[torch.rand(rows, columns // 4, generator=generator) < 0.05] = 0
    groups[..., 3].masked_fill_(torch.rand(rows, columns // 4, generator=generator) < 0.05, 0)
    return groups.view(rows, columns).to(dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def sparse_weight(rows: int, columns: int, zeros: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A random weight [rows, columns] with that share of zeros anywhere; with some, the first row is empty."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    weight.masked_fill_(torch.rand(rows, columns, generator=generator) < zeros, 0)
    if zeros:
        weight[:1] = 0
    return weight
