"""Kept weights rounded to a grid of integers inside the sweep, and what is fitted anew on the integers.

Algorithm 1 with a grid (SparseGPT, arXiv:2301.00774, equation 7; without zeros it is GPTQ, arXiv:2210.17323): column j
becomes q_j, the nearest step of the grid where the weight is kept and 0 where it goes, and every column k to its right
moves by -U_jk (w_j - q_j) / U_jj. Where nothing is pruned, and where the sweep chooses the mask, columns go by falling
H_jj, the dearest first, while the groups that share a scale are those of the original order, as files keep them. On a
mask that is given they go as they lie, with the factor that has served to find it.

What the sweep could not know is then put right, group by group, on H itself: with the pull P = (T - W) H of the target,

    s <- s + (d . P) / (d H d)                   the least-squares scale of a group's steps d
    w_j <- the step nearest to w_j + P_j / H_jj     one column after the other

Neither step raises the loss (coordinate descent; for quantisation, Nair & Suggala 2024, arXiv:2406.17542).

Dimension key: R out_features, C in_features, G groups of a row, K columns of a group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from sparsegpt.errors import unknown
from sparsegpt.grid import Grid
from sparsegpt.quantization import Integers, Scales, encode, representable, search_scales
from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.solvers.sparsegpt import Columns, MaskSweep
from sparsegpt.sparsity import NM, Sparsity
from sparsegpt.strips import strips, transposed

# Passes of `polish`.
PASSES = 1


def gptq(
    start: Tensor,
    mask: Tensor | None,
    target: Tensor,
    hessian: DampedHessian,
    pattern: Sparsity,
    grid: Grid,
    *,
    block_size: int,
) -> tuple[Integers, Tensor]:
    """Start, target [R, C], mask bool [R, C], Hessian [C, C] -> (integers of [R, C], mask): the sweep, and `polish`.

    Scales are searched where errors cost most, by diag H. Raises SparseGPTError as `round_weight` and `search_scales`.
    """
    scales = search_scales(start, grid, importance=hessian.raw.diagonal(), name=hessian.name)
    turned = _swept(start, hessian, pattern, scales, block_size, mask)
    hessian.release_factor()
    _Descent(turned, target, hessian).run(PASSES)
    return turned.integers(), turned.mask() if mask is None else mask


def nearest(
    start: Tensor,
    mask: Tensor | None,
    target: Tensor,
    hessian: DampedHessian,
    pattern: Sparsity,
    grid: Grid,
    *,
    block_size: int,
    searched: bool = False,
) -> tuple[Integers, Tensor]:
    """Start [R, C], mask bool [R, C] -> (integers of [R, C], mask): every weight for itself. Zeros stay.

    searched: scales are searched where errors cost most, by diag H, which is what is left of AWQ once inputs are
    scaled; else they reach to the largest weight, without data.
    """
    assert mask is not None
    importance = hessian.raw.diagonal() if searched else None
    return encode(start, search_scales(start, grid, clip=searched, importance=importance, name=hessian.name)), mask


@dataclass(frozen=True)
class Quantizer:
    """A way to round a weight: start, mask, target [R, C], Hessian [C, C], pattern, grid -> (integers of [R, C], mask).

    chooses_masks: it can choose the mask meanwhile, as `sparsegpt` does, where it is given none. scales_inputs: before
    a block is rounded its linears' inputs are scaled (rotation/scaling.py).
    """

    run: Callable[..., tuple[Integers, Tensor]]
    chooses_masks: bool = False
    scales_inputs: bool = False


QUANTIZERS = {
    "gptq": Quantizer(gptq, chooses_masks=True),
    "rtn": Quantizer(nearest),
    "awq": Quantizer(partial(nearest, searched=True), scales_inputs=True),
}


def parse_quantizer(name: str) -> Quantizer:
    """The quantizer of this name. Raises SparseGPTError with the known names."""
    if name not in QUANTIZERS:
        raise unknown("quantizer", name, QUANTIZERS, settings=("quantizer",))
    return QUANTIZERS[name]


def round_weight(
    weight: Tensor,
    hessian: DampedHessian,
    pattern: Sparsity,
    scales: Scales,
    *,
    block_size: int,
    mask: Tensor | None = None,
) -> tuple[Integers, Tensor]:
    """Weight [R, C], Hessian [C, C], mask bool [R, C] -> (integers of [R, C], mask bool [R, C], True = kept).

    mask None: the sweep chooses it too, as `sparsegpt` does, with which block_size is shared. Integers are 0 where the
    mask is False. Raises SparseGPTError where no damping makes the Hessian positive definite.
    """
    turned = _swept(weight, hessian, pattern, scales, block_size, mask)
    return turned.integers(), turned.mask()


def polish(
    integers: Integers, mask: Tensor, target: Tensor, hessian: DampedHessian, *, passes: int = PASSES
) -> Integers:
    """Integers of [R, C], mask bool [R, C], target [R, C], Hessian [C, C] -> integers nearer to the target.

    Scales and integers of one group after the other are fitted anew; no step raises the loss under the damped Hessian.
    """
    turned = _Turned(integers.scales, transposed(mask), transposed(integers.steps.to(target.dtype)))
    _Descent(turned, target, hessian).run(passes)
    return turned.integers()


class _Turned:
    """Integers and their mask with columns in one piece: scale and bounds [G, R], kept bool and steps [C, R]."""

    def __init__(self, scales: Scales, kept: Tensor, steps: Tensor) -> None:
        self._scales, self.kept_CR, self.steps_CR = scales, kept, steps
        parts = (scales.scale, *scales.bounds)
        self.scale_GR, *self.bounds = (transposed(part.to(steps.dtype)) for part in parts)
        self.width = scales.grid.width(len(kept))

    def integers(self) -> Integers:
        """Integers of [R, C]."""
        scales = self._scales._replace(scale=transposed(self.scale_GR).float())
        return Integers(transposed(self.steps_CR.to(torch.int16)), scales)

    def mask(self) -> Tensor:
        """The mask, bool [R, C]."""
        return transposed(self.kept_CR)


def _swept(
    weight: Tensor,
    hessian: DampedHessian,
    pattern: Sparsity,
    scales: Scales,
    block_size: int,
    mask: Tensor | None,
) -> _Turned:
    """`round_weight`, as the descent takes it."""
    together = pattern.m if isinstance(pattern, NM) and mask is None else 1
    order = None if mask is not None and pattern.zeros else _order(hessian, together)
    return _RoundingSweep(weight, hessian, pattern, scales, order, block_size).run(mask)


def _order(hessian: DampedHessian, together: int) -> Tensor:
    """Columns [C] by falling diag H, `together` neighbours at a time."""
    energy_G = hessian.raw.diagonal().unflatten(0, (-1, together)).sum(1)
    first_G = energy_G.argsort(descending=True, stable=True) * together
    order_C: Tensor = (first_G[:, None] + torch.arange(together, device=first_G.device)).flatten()
    return order_C


class _Grid:
    """What rounds columns: scales [G, R] by group, with their least and largest steps.

    of_column: the group of each column. kept: bool [C, R], as far as it is known. steps: [C, R], to be written, 0 where
    pruned.
    """

    def __init__(
        self, scale: Tensor, bounds: Sequence[Tensor], of_column: list[int], kept: Tensor, steps: Tensor
    ) -> None:
        self._scale_GR, self._of_column = scale, of_column
        # Until a column is settled: 1 / scale, and 0 where a weight goes, so that its step is 0 too.
        self._steps_CR = steps
        self.keep(slice(0, len(kept)), kept)
        # Rows of these as tensors of their own: to index takes as long as to multiply.
        self._steps = steps.unbind()
        self._scales, self._least, self._most = (matrix.unbind() for matrix in (scale, *bounds))

    def keep(self, columns: slice, kept_KR: Tensor) -> None:
        """Take the mask of these columns, bool [K, R]."""
        runs = [(group, len(list(same))) for group, same in groupby(self._of_column[columns])]
        groups, lengths = zip(*runs, strict=True)
        # A run of columns at once: to gather the scales of all first takes as long again.
        pairs = zip(kept_KR.split(lengths), self._steps_CR[columns].split(lengths), strict=True)
        for group, (kept, inverse) in zip(groups, pairs, strict=True):
            torch.div(kept, self._scale_GR[group], out=inverse)

    def settle(self, j: int, wanted_R: Tensor, start_R: Tensor, error_R: Tensor) -> None:
        """Round column j [R] to where it wants to be; error [R]: what takes it back to its start."""
        group, steps_R = self._of_column[j], self._steps[j]
        steps_R.mul_(wanted_R).round_().clamp_(self._least[group], self._most[group])
        torch.addcmul(start_R, steps_R, self._scales[group], value=-1, out=error_R)


class _RoundingSweep(MaskSweep):
    """Algorithm 1 on a grid: of every weight the error is what rounding or pruning takes from it.

    order: of the columns, [C]; None: as they lie.
    """

    def __init__(
        self,
        weight: Tensor,
        hessian: DampedHessian,
        pattern: Sparsity,
        scales: Scales,
        order: Tensor | None,
        block_size: int,
    ) -> None:
        weight_CR, self.as_they_lie = transposed(weight), order is None
        if order is None:
            self.order_C = torch.arange(len(weight_CR), device=weight.device)
        else:
            self.order_C, weight_CR, hessian = order, weight_CR[order], hessian.ordered(order)
        super().__init__(weight_CR, hessian, pattern, block_size, errors=weight_CR)
        self.U_CC = self.U_CC * self.inverse_diagonal_C1
        self.scales = scales

    def run(self, mask: Tensor | None) -> _Turned:
        """Integers and mask; the state is used up."""
        if mask is not None:
            self.kept_CR = transposed(mask) if self.as_they_lie else transposed(mask)[self.order_C]
        turned = _Turned(self.scales, self.kept_CR, torch.empty_like(self.weight_CR))
        of_column = (self.order_C // turned.width).tolist()
        self.grid = _Grid(turned.scale_GR, turned.bounds, of_column, turned.kept_CR, turned.steps_CR)
        if mask is None:
            self._sweep(0, len(self.weight_CR))
        else:
            self._eliminate(0, len(self.weight_CR))
        if not self.as_they_lie:
            place_C = self.order_C.argsort()
            turned.steps_CR, turned.kept_CR = turned.steps_CR[place_C], turned.kept_CR[place_C]
        return turned

    def _choose_mask(self, start: int, end: int) -> Tensor:
        kept_KR = super()._choose_mask(start, end)
        self.grid.keep(slice(start, end), kept_KR)
        return kept_KR

    def _settle(self, j: int) -> None:
        self.grid.settle(j, self.weights[j], self.weights[j], self.errors[j])


class _GroupDescent(Columns):
    """Coordinate descent on the columns of a group, [K, R]; matrix: H of these columns, [K, K].

    U is -H over its diagonal: by how much a change of one weight moves what the others want. weight_CR is what columns
    want to be, starts what they were.
    """

    def __init__(self, start: Tensor, pull: Tensor, matrix: Tensor, grid: _Grid) -> None:
        diagonal_K = matrix.diagonal()
        wanted = torch.addcdiv(start, pull, diagonal_K[:, None])
        super().__init__(wanted, matrix / -diagonal_K, errors=wanted)
        self.starts, self.grid = start.unbind(), grid

    def run(self) -> Tensor:
        """Leave new steps in the grid's; return by how much the weights have fallen [K, R]."""
        self._eliminate(0, len(self.weight_CR))
        return self.error_CR

    def _settle(self, j: int) -> None:
        self.grid.settle(j, self.weights[j], self.starts[j], self.errors[j])


class _Descent:
    """Scales and integers of all groups, one group after the other. residual_CR is what the target has beyond them."""

    def __init__(self, turned: _Turned, target: Tensor, hessian: DampedHessian) -> None:
        self.turned, self.scale_GR, self.steps_CR = turned, turned.scale_GR, turned.steps_CR
        self.matrix_CC, self.columns = hessian.damped, strips(target.shape[1], turned.width)
        self.residual_CR = transposed(target)
        for group, columns in enumerate(self.columns):
            self.residual_CR[columns].addcmul_(self.steps_CR[columns], self.scale_GR[group], value=-1)

    def run(self, passes: int) -> None:
        """Fit the integers, in place."""
        for _ in range(passes):
            for group, columns in enumerate(self.columns):
                self._visit(group, columns)

    def _visit(self, group: int, columns: slice) -> None:
        """Fit a group's scales, then its steps."""
        steps_KR, matrix_KC = self.steps_CR[columns], self.matrix_CC[columns]
        pull_KR = matrix_KC @ self.residual_CR
        self._fit_scale(group, columns, pull_KR)
        alone, of_column = slice(group, group + 1), [0] * len(steps_KR)
        start_KR, bounds = steps_KR * self.scale_GR[group], [bound[alone] for bound in self.turned.bounds]
        grid = _Grid(self.scale_GR[alone], bounds, of_column, self.turned.kept_CR[columns], steps_KR)
        self.residual_CR[columns] += _GroupDescent(start_KR, pull_KR, matrix_KC[:, columns], grid).run()

    def _fit_scale(self, group: int, columns: slice, pull_KR: Tensor) -> None:
        """The best scale of a group's steps, as far as it can be stored, where it lowers the loss; updates the pull."""
        steps_KR, scale_R = self.steps_CR[columns], self.scale_GR[group]
        image_KR = self.matrix_CC[columns, columns] @ steps_KR
        slope_R, curve_R = (steps_KR * pull_KR).sum(0), (steps_KR * image_KR).sum(0)
        wanted_R = scale_R + slope_R / curve_R.clamp_min(torch.finfo(curve_R.dtype).tiny)
        change_R = representable(wanted_R).to(scale_R.dtype) - scale_R
        # The loss changes by -2 c slope + c^2 curve: rounding of the scale may cost more than the fit gains.
        change_R.masked_fill_(~(change_R * (2 * slope_R - change_R * curve_R) > 0), 0)
        self.residual_CR[columns].addcmul_(steps_KR, change_R, value=-1)
        pull_KR.addcmul_(image_KR, change_R, value=-1)
        scale_R += change_R
