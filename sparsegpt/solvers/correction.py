"""Error correction: ask a layer to undo what pruning upstream has already changed.

Earlier pruning turned the layer's input from x (dense model) into x'. Aiming at the dense output, T = argmin
sum |W x - T x'|^2 with a ridge pulling T toward W, gives T = W + W D (H + damping)^-1 with D = sum (x - x') x'^T. A
projection that is added to the residual stream can also undo the drift of the stream itself, r - r', by adding
R = sum (r - r') x'^T. With shares a and b of the two:

    T = W + (a W D + b R) (H + damping)^-1

While nothing upstream is pruned, D = R = 0 and T is W. The idea of aligning to the dense activations with a mixed
target appears in Qronos and GPTAQ for quantisation (arXiv:2505.11695, arXiv:2504.02692).

Dimension key: T tokens, R out_features, C in_features.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from sparsegpt.solvers.hessian import DampedHessian, exact_product
from sparsegpt.solvers.products import pieces
from sparsegpt.solvers.refit import row_losses

# How far a correction may move a row, in lengths of the row. In models of 6 and 15 million parameters, at 2:4 and 70%,
# rows move by 1.1 at most.
GROWTH = 3.0


class DriftAccumulator:
    """Running sums over tokens: `inputs` D [C, C] for the layer's input, `residual` R [R, C] for the stream."""

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.residual: Tensor | None = None

    def add_inputs(self, dense: Tensor, pruned: Tensor) -> None:
        """[..., C] each: add sum (x - x') x'^T for the dense and the pruned inputs."""
        self.inputs = _add_drift(self.inputs, dense, pruned, pruned)

    def add_residual(self, dense: Tensor, pruned: Tensor, inputs: Tensor) -> None:
        """[..., R], [..., R], [..., C]: add sum (r - r') x'^T for the residual streams and the pruned inputs."""
        self.residual = _add_drift(self.residual, dense, pruned, inputs)

    def over(self, total: Callable[[Tensor], Tensor]) -> None:
        """Become the sum of what several have gathered. total: [...] -> the sum of theirs, in the same memory."""
        for part in (self.inputs, self.residual):
            if part is not None:
                total(part)

    def of_rows(self, rows: slice) -> "DriftAccumulator":
        """What of the sums concerns these rows of the weight, in the same memory."""
        part = DriftAccumulator()
        part.inputs, part.residual = self.inputs, None if self.residual is None else self.residual[rows]
        return part

    def release(self) -> None:
        """Free the sums: every pull that they give is known."""
        self.inputs = self.residual = None


def drift_pull(weight: Tensor, drift: DriftAccumulator, error_share: float, residual_share: float) -> Tensor:
    """Weight [R, C] -> a W D + b R, [R, C] in its dtype and new memory; a, b: the two shares, each from 0 to 1."""
    if drift.inputs is not None and error_share:
        pull_RC = (weight @ drift.inputs.to(weight.dtype)).mul_(error_share)
    else:
        pull_RC = weight.new_zeros(weight.shape)
    if drift.residual is not None and residual_share:
        pull_RC.add_(drift.residual, alpha=residual_share)
    return pull_RC


def corrected_target(weight: Tensor, hessian: DampedHessian, pull: Tensor) -> Tensor:
    """Weight [R, C] in any dtype, pull [R, C] -> T = W + pull (H + damping)^-1, [R, C] in the memory of the pull.

    Raises SparseGPTError, naming the layer, where no damping makes the Hessian positive definite.
    """
    for rows in pieces(pull):
        torch.add(weight[rows], hessian.solve(pull[rows]), out=pull[rows])
    return pull


def mean_length(weight: Tensor) -> float:
    """Weight [R, C] -> the mean length of its rows."""
    return float(torch.cat([weight[rows].float().norm(dim=1) for rows in pieces(weight)]).mean())


def hold_back(weight: Tensor, target: Tensor, usual: float) -> tuple[int, float]:
    """Weight [R, C], target [R, C] -> (rows held back, largest growth asked); the target is changed in place.

    usual: the mean length of the layer's rows, of which these may be some. A row moves by at most GROWTH times its
    length, or the usual one where that is more. A correction beyond that is no repair: the layer cannot undo drift of
    another scale than its own outputs.
    """
    lengths_R = torch.cat([weight[rows].to(target.dtype).norm(dim=1) for rows in pieces(target)])
    bound_R = lengths_R.clamp_min(usual).clamp_min(torch.finfo(target.dtype).tiny)
    held, most = 0, 0.0
    for rows in pieces(target):
        original_RC = weight[rows].to(target.dtype)
        growth_R = (target[rows] - original_RC).norm(dim=1) / bound_R[rows]
        most = max(most, float(growth_R.max()))
        if (beyond_R := growth_R > GROWTH).any():
            share_R = torch.where(beyond_R, GROWTH / growth_R, 1.0)
            target[rows] = torch.lerp(original_RC, target[rows], share_R[:, None])
            held += int(beyond_R.sum())
    return held, most


@dataclass(frozen=True)
class Remainder:
    """What a layer leaves of drift and its own error together, less what the dense weight leaves; see `remainder`.

    found: of the weights that were found. lost: of the target's energy, of_target; of_weight: the weight's energy. The
    sum of two is that of their rows together.
    """

    found: float = 0.0
    lost: float = 0.0
    of_target: float = 0.0
    of_weight: float = 0.0

    @property
    def plain(self) -> float:
        """What plain pruning would leave, estimated from how much of the target was lost; no weights leave it all."""
        return min(1.0, self.lost / self.of_target) * self.of_weight if self.of_target > 0 else 0.0

    def __add__(self, other: "Remainder") -> "Remainder":
        return Remainder(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def remainder(weight: Tensor, target: Tensor, pruned: Tensor, hessian: DampedHessian) -> Remainder:
    """Weight, target and pruned weight [R, C], Hessian [C, C] -> what is left, on the layer's own statistics.

    With D = T - W, E = W' - W and the pull P = D (H + damping) the drift that is left changes by

        tr(E H E^T) - 2 <P, E>

    It is 0 for the dense weight, negative where drift is undone, and with D = 0 the loss of plain pruning.
    """
    damping_C = hessian.damped_diagonal - hessian.raw.diagonal()
    found = lost = of_target = of_weight = 0.0
    for rows in pieces(target):
        original_RC = weight[rows].to(target.dtype)
        asked_RC, made_RC = target[rows] - original_RC, pruned[rows].to(target.dtype) - original_RC
        product_RC = asked_RC @ hessian.raw
        own = float(row_losses(made_RC, hessian.raw).sum())
        found += own - 2 * float(((product_RC + asked_RC * damping_C) * made_RC).sum())
        asked = float((product_RC * asked_RC).sum())
        lost += own - 2 * float((product_RC * made_RC).sum()) + asked
        energy = float(row_losses(original_RC, hessian.raw).sum())
        of_weight += energy
        of_target += energy + 2 * float((product_RC * original_RC).sum()) + asked
    return Remainder(found, lost, of_target, of_weight)


def _add_drift(total: Tensor | None, dense: Tensor, pruned: Tensor, inputs: Tensor) -> Tensor:
    """[R, C], [..., R], [..., R], [..., C] -> total + sum over tokens of (dense - pruned) inputs^T, float32 [R, C]."""
    # The difference is taken before any sum: of two large sums the small drift would be rounding.
    difference_TR, inputs_TC = (dense.float() - pruned.float()).flatten(0, -2), inputs.float().flatten(0, -2)
    if total is None:
        total = inputs_TC.new_zeros(difference_TR.shape[1], inputs_TC.shape[1])
    for rows in pieces(total):
        total[rows] += exact_product(difference_TR[:, rows].T, inputs_TC)
    return total
