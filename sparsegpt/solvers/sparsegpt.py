"""SparseGPT layer solver (Frantar & Alistarh 2023, arXiv:2301.00774, Algorithm 1).

U is the upper factor with U^T U = (H + damping)^-1. Columns are visited from left to right. A pruned weight leaves
the error e_j = w_j / U_jj in its column, and every column k to its right moves by -U_jk e_j, which keeps the layer's
output closest. Saliency is w_j^2 / U_jj^2, the loss that dropping w_j costs at that moment.

The order of the arithmetic is free as long as a column has received all updates from its left before it is used. So
the sweep works by halves, sweep(left), one matrix product from left to right, sweep(right), down to the unit whose
mask is chosen at once (a group of m for n:m, a block of `block_size` columns for a fraction), and from there to a few
columns: the updates are matrix products and not one rank-1 update a column. The numbers are Algorithm 1's. On a GPU
the last columns, a strip of up to 128, are one kernel (`solvers.fused`).

Dimension key: R out_features, C in_features, K columns of the current unit. Weights lie as [C, R], so that a column
of the layer is contiguous.
"""

import importlib.util

import torch
from torch import Tensor

from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.solvers.masks import group_mask, row_mask, unstructured_mask
from sparsegpt.sparsity import NM, Sparsity
from sparsegpt.strips import transposed

# Columns handled one by one; wider ranges are split in halves.
LEAF = 8


def sparsegpt(weight: Tensor, hessian: DampedHessian, pattern: Sparsity, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Weight [R, C], Hessian [C, C] -> (weight [R, C], mask bool [R, C], True = kept).

    Kept weights are updated, the others exact zeros; both are new. block_size: columns that share one threshold when
    the pattern is a fraction; n:m does not depend on it.
    Raises SparseGPTError, naming the layer, where no damping makes the Hessian positive definite.
    """
    pruned, mask, _ = sweep(weight, hessian, pattern, block_size=block_size)
    return pruned, mask


def sweep(
    weight: Tensor, hessian: DampedHessian, pattern: Sparsity, *, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [R, C], Hessian [C, C] -> (weight [R, C], mask bool [R, C], loss []): `sparsegpt` with its loss.

    The loss is that under the damped Hessian: the sum of all squared errors e_j^2.
    """
    return _Sweep(transposed(weight), hessian, pattern, block_size).run()


class Columns:
    """Weights and errors, [C, R] each, and the matrix U [C, C] by which the error of a column moves to the right.

    A subclass says, as `_settle`, what becomes of a column that has received every update from its left.
    errors: their memory, which may be the weights' own where no weight is needed once it is settled; None: new.
    strip: columns that the fused kernel settles at once; 0: none.
    """

    def __init__(self, weight: Tensor, matrix: Tensor, *, errors: Tensor | None = None) -> None:
        self.weight_CR, self.U_CC = weight, matrix
        self.error_CR = torch.empty_like(weight) if errors is None else errors
        # Columns of both as tensors of their own: to index takes as long as to multiply.
        self.weights, self.errors = self.weight_CR.unbind(), self.error_CR.unbind()
        self.strip = 0

    def _eliminate(self, start: int, end: int) -> None:
        """Settle columns, moving their errors to the right within [start, end)."""
        if end - start > (self.strip or LEAF):
            middle = (start + end) // 2
            self._eliminate(start, middle)
            self._propagate(start, middle, end)
            self._eliminate(middle, end)
            return
        if self.strip:
            self._settle_strip(start, end)
            return
        for j in range(start, end):
            self._settle(j)
            if j + 1 < end:
                self.weight_CR[j + 1 : end].addr_(self.U_CC[j, j + 1 : end], self.errors[j], alpha=-1)

    def _settle(self, j: int) -> None:
        """Leave in error_CR what column j loses, and in weight_CR what stays."""
        raise NotImplementedError

    def _settle_strip(self, start: int, end: int) -> None:
        """The same for a strip of columns."""
        raise NotImplementedError

    def _propagate(self, start: int, middle: int, end: int) -> None:
        """Move the errors of columns [start, middle) to columns [middle, end)."""
        self.weight_CR[middle:end].addmm_(self.U_CC[start:middle, middle:end].T, self.error_CR[start:middle], alpha=-1)


class MaskSweep(Columns):
    """A left-to-right pass that chooses a mask unit by unit, bool [C, R], and settles the columns of each.

    weight: [C, R], used up.
    """

    def __init__(
        self,
        weight: Tensor,
        hessian: DampedHessian,
        pattern: Sparsity,
        block_size: int,
        *,
        errors: Tensor | None = None,
    ) -> None:
        super().__init__(weight, hessian.inverse_factor, errors=errors)
        self.kept_CR = torch.ones_like(self.weight_CR, dtype=torch.bool)
        self.inverse_diagonal_C1 = self.U_CC.diagonal().reciprocal()[:, None]
        # An input that never fired costs nothing: its weights go first.
        self.saliency_scale_C1 = self.inverse_diagonal_C1.masked_fill(hessian.dead[:, None], 0)
        self.pattern = pattern
        self.unit = pattern.m if isinstance(pattern, NM) else block_size

    def _sweep(self, start: int, end: int) -> None:
        """Choose masks and eliminate, for columns that have received every update from the left of `start`."""
        units = -(-(end - start) // self.unit)
        if units == 1:
            self._sweep_unit(start, end)
            return
        middle = start + self.unit * (units // 2)
        self._sweep(start, middle)
        self._propagate(start, middle, end)
        self._sweep(middle, end)

    def _sweep_unit(self, start: int, end: int) -> None:
        self.kept_CR[start:end] = self._choose_mask(start, end)
        self._eliminate(start, end)

    def _choose_mask(self, start: int, end: int) -> Tensor:
        saliency_KR = (self.weight_CR[start:end] * self.saliency_scale_C1[start:end]).square()
        if isinstance(self.pattern, NM):
            return group_mask(saliency_KR, self.pattern.n)
        # Counting from the layer's start keeps its total exact whatever the rounding of one block.
        members = 1 if self.pattern.per_row else self.weight_CR.shape[1]
        zeros = round(self.pattern.fraction * end * members) - round(self.pattern.fraction * start * members)
        if self.pattern.per_row:
            return row_mask(saliency_KR.T, zeros).T
        return unstructured_mask(saliency_KR, zeros)


class _Sweep(MaskSweep):
    """Algorithm 1: a pruned weight's error is all of it, a kept one leaves none."""

    def __init__(self, weight: Tensor, hessian: DampedHessian, pattern: Sparsity, block_size: int) -> None:
        super().__init__(weight, hessian, pattern, block_size)
        self.strip = _strip_width(self.weight_CR, pattern)
        if isinstance(pattern, NM):
            self.unit = pattern.m * max(1, self.strip // pattern.m)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight [R, C], mask bool [R, C] and loss []; the state is used up."""
        self._sweep(0, self.weight_CR.shape[0])
        loss = self.error_CR.square_().sum()
        del self.error_CR, self.errors
        # Six times faster on a CPU than masked_fill for a whole layer; adding 0.0 turns the product's -0.0 into 0.0.
        weight_CR = self.weight_CR.mul_(self.kept_CR).add_(0.0)
        return transposed(weight_CR), transposed(self.kept_CR), loss

    def _sweep_unit(self, start: int, end: int) -> None:
        if self.strip and isinstance(self.pattern, NM):
            self._sweep_strip(start, end, self.pattern.n, self.pattern.m)
            return
        self.kept_CR[start:end] = kept_KR = self._choose_mask(start, end)
        # 1 / U_jj where a weight goes and 0 where it stays; `_settle` makes errors of it.
        torch.mul(~kept_KR, self.inverse_diagonal_C1[start:end], out=self.error_CR[start:end])
        self._eliminate(start, end)

    def _settle(self, j: int) -> None:
        self.errors[j].mul_(self.weights[j])

    def _settle_strip(self, start: int, end: int) -> None:
        self._sweep_strip(start, end, 0, 0)

    def _sweep_strip(self, start: int, end: int, keep: int, group: int) -> None:
        """The fused kernel on columns [start, end), choosing `keep` of every `group` or following the mask (0)."""
        from sparsegpt.solvers.fused import sweep_strip

        columns = slice(start, end)
        scale_K = self.saliency_scale_C1[columns, 0].contiguous()
        sweep_strip(
            self.weight_CR[columns],
            self.error_CR[columns],
            self.kept_CR[columns],
            self.U_CC[columns, columns],
            scale_K,
            keep,
            group,
        )


def _strip_width(weight_CR: Tensor, pattern: Sparsity) -> int:
    """Columns that the fused kernel takes at once; 0 where it cannot be used: no GPU, not float32, very wide groups."""
    if not weight_CR.is_cuda or weight_CR.dtype != torch.float32 or importlib.util.find_spec("triton") is None:
        return 0
    from sparsegpt.solvers.fused import STRIP

    return 0 if isinstance(pattern, NM) and pattern.m > STRIP else STRIP
