"""`bench solver`: the textbook column loop beside this engine's sweep, and admm, on the same layers in one run.

The textbook is Algorithm 1 of the SparseGPT paper written down directly: full inverse between two factorisations, one
rank-1 update a column inside a block of 128, one product a block for what comes after it.
Dimension key: R out_features, C in_features, K columns of a block.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sparsegpt.solvers.admm import admm
from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.solvers.masks import nm_mask, unstructured_mask
from sparsegpt.solvers.refit import row_losses
from sparsegpt.solvers.sparsegpt import sparsegpt
from sparsegpt.sparsity import NM, Sparsity, parse_sparsity

T = TypeVar("T")

SIZES = ((768, 768), (2048, 2048), (4096, 4096), (8192, 2048))
PATTERNS = ("2:4", "0.5")
BLOCK = 128
DAMPING = 0.01
REPEATS = 3


@dataclass(frozen=True)
class SolverRow:
    """One layer and pattern. Seconds are the best of REPEATS; loss_ratio is ours over the textbook's."""

    rows: int
    columns: int
    pattern: str
    textbook_factor: float
    textbook_solve: float
    factor: float
    solve: float
    admm: float
    loss_ratio: float
    admm_loss_ratio: float

    @property
    def speedup(self) -> float:
        """Textbook over ours, factorisation included."""
        return (self.textbook_factor + self.textbook_solve) / (self.factor + self.solve)

    @property
    def solve_speedup(self) -> float:
        """Textbook over ours without the factorisation, which q, k and v share."""
        return self.textbook_solve / self.solve

    @property
    def admm_cost(self) -> float:
        """admm, factorisation included, over our sparsegpt."""
        return self.admm / (self.factor + self.solve)

    @property
    def admm_textbook_cost(self) -> float:
        """admm, factorisation included, over the textbook sparsegpt."""
        return self.admm / (self.textbook_factor + self.textbook_solve)


def bench_solver(
    device: torch.device,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    patterns: tuple[str, ...] = PATTERNS,
    repeats: int = REPEATS,
) -> Iterator[SolverRow]:
    """Time every size and pattern; rows [out_features, in_features] of random layers with correlated inputs."""
    for rows, columns in sizes:
        weight, hessian = random_layer(rows, columns, device)
        for text in patterns:
            yield _measure(weight, hessian, parse_sparsity(text), repeats)


def random_layer(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A Gaussian weight [R, C] and the Hessian [C, C] of 2 C correlated tokens with uneven scales."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator).to(device) / columns**0.5
    scales = torch.rand(columns, generator=generator).to(device) + 0.1
    tokens = torch.randn(2 * columns, columns, generator=generator).to(device)
    inputs = (tokens + 0.5 * tokens @ mix) * scales
    return torch.randn(rows, columns, generator=generator).to(device), inputs.T @ inputs


def _measure(weight: Tensor, hessian: Tensor, pattern: Sparsity, repeats: int) -> SolverRow:
    def best(work: Callable[[], T]) -> tuple[float, T]:
        return _best_time(work, weight.device, repeats)

    def factorise() -> DampedHessian:
        damped = DampedHessian(hessian, DAMPING)
        _ = damped.inverse_factor
        return damped

    textbook_factor, textbook_U = best(lambda: textbook_inverse_factor(hessian))
    textbook_solve, textbook = best(lambda: textbook_solve_layer(weight, textbook_U, pattern))
    factor, damped = best(factorise)
    solve, ours = best(lambda: sparsegpt(weight, damped, pattern, block_size=BLOCK)[0])
    admm_time, searched = best(lambda: admm(weight, factorise(), pattern, block_size=BLOCK)[0])
    losses = [float(row_losses(weight - pruned, hessian).sum()) for pruned in (textbook, ours, searched)]
    return SolverRow(
        rows=weight.shape[0],
        columns=weight.shape[1],
        pattern=str(pattern),
        textbook_factor=textbook_factor,
        textbook_solve=textbook_solve,
        factor=factor,
        solve=solve,
        admm=admm_time,
        loss_ratio=losses[1] / losses[0],
        admm_loss_ratio=losses[2] / losses[0],
    )


def _best_time(work: Callable[[], T], device: torch.device, repeats: int) -> tuple[float, T]:
    """Shortest wall seconds of `repeats` runs after one that warms up, and the last result."""
    best, result = float("inf"), work()
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        result = work()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def textbook_inverse_factor(hessian: Tensor) -> Tensor:
    """[C, C] -> upper Cholesky factor [C, C] of the damped inverse, by way of the inverse itself."""
    damped = hessian.diagonal_scatter(hessian.diagonal() + DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def textbook_solve_layer(weight: Tensor, U_CC: Tensor, pattern: Sparsity) -> Tensor:
    """Weight [R, C], U [C, C] -> pruned weight [R, C]: Algorithm 1, column by column."""
    weight_RC = weight.clone()
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        block_RK, U_KK = weight_RC[:, start:end].clone(), U_CC[start:end, start:end]
        errors_RK = torch.zeros_like(block_RK)
        mask_RK = torch.ones_like(block_RK, dtype=torch.bool)
        if not isinstance(pattern, NM):
            saliency_RK = (block_RK / U_KK.diagonal()).square()
            mask_RK = unstructured_mask(saliency_RK, round(pattern.fraction * saliency_RK.numel()))
        for j in range(end - start):
            if isinstance(pattern, NM) and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                mask_RK[:, group] = nm_mask((block_RK[:, group] / U_KK.diagonal()[group]).square(), pattern)
            pruned_R = block_RK[:, j].masked_fill(~mask_RK[:, j], 0)
            errors_RK[:, j] = (block_RK[:, j] - pruned_R) / U_KK[j, j]
            block_RK[:, j:] -= torch.outer(errors_RK[:, j], U_KK[j, j:])
            block_RK[:, j] = pruned_R
        weight_RC[:, start:end] = block_RK
        weight_RC[:, end:] -= errors_RK @ U_CC[start:end, end:]
    return weight_RC
