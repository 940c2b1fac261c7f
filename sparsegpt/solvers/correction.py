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

import torch
from torch import Tensor

from sparsegpt.solvers.hessian import DampedHessian, exact_product
from sparsegpt.solvers.products import pieces


class DriftAccumulator:
    """Running sums over tokens: `inputs` D [C, C] for the layer's input, `residual` R [R, C] for the stream."""

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.residual: Tensor | None = None

    def add_inputs(self, dense: Tensor, pruned: Tensor) -> None:
        """Add sum (x - x') x'^T for dense and pruned inputs [..., C]."""
        self.inputs = _add_drift(self.inputs, dense, pruned, pruned)

    def add_residual(self, dense: Tensor, pruned: Tensor, inputs: Tensor) -> None:
        """Add sum (r - r') x'^T for the residual streams [..., R] and the layer's pruned inputs [..., C]."""
        self.residual = _add_drift(self.residual, dense, pruned, inputs)

    def release(self) -> None:
        """Let the sums go: every pull that they give is known."""
        self.inputs = self.residual = None


def drift_pull(weight: Tensor, drift: DriftAccumulator, error_share: float, residual_share: float) -> Tensor:
    """a W D + b R in new memory, for weight [R, C] and in its dtype; a, b are the two shares in [0, 1]."""
    if drift.inputs is not None and error_share:
        pull_RC = (weight @ drift.inputs.to(weight.dtype)).mul_(error_share)
    else:
        pull_RC = weight.new_zeros(weight.shape)
    if drift.residual is not None and residual_share:
        pull_RC.add_(drift.residual, alpha=residual_share)
    return pull_RC


def corrected_target(weight: Tensor, hessian: DampedHessian, pull: Tensor) -> Tensor:
    """T = W + pull (H + damping)^-1 for weight [R, C], any dtype, and pull [R, C], whose memory the result takes."""
    for rows in pieces(pull):
        torch.add(weight[rows], hessian.solve(pull[rows]), out=pull[rows])
    return pull


def _add_drift(total: Tensor | None, dense: Tensor, pruned: Tensor, inputs: Tensor) -> Tensor:
    """total + sum over tokens of (dense - pruned) inputs^T, in float32; the difference is taken before any sum."""
    difference_TR, inputs_TC = (dense.float() - pruned.float()).flatten(0, -2), inputs.float().flatten(0, -2)
    if total is None:
        total = inputs_TC.new_zeros(difference_TR.shape[1], inputs_TC.shape[1])
    for rows in pieces(total):
        total[rows] += exact_product(difference_TR[:, rows].T, inputs_TC)
    return total
