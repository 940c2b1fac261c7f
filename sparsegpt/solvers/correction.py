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

from torch import Tensor

from sparsegpt.hessian import DampedHessian, exact_product


class DriftAccumulator:
    """Running sums over tokens: `inputs` D [C, C] for the layer's input, `residual` R [R, C] for the stream."""

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.residual: Tensor | None = None

    def add_inputs(self, dense: Tensor, pruned: Tensor) -> None:
        """Add sum (x - x') x'^T for dense and pruned inputs [..., C]."""
        product = _drift_product(dense, pruned, pruned)
        self.inputs = product if self.inputs is None else self.inputs.add_(product)

    def add_residual(self, dense: Tensor, pruned: Tensor, inputs: Tensor) -> None:
        """Add sum (r - r') x'^T for the residual streams [..., R] and the layer's pruned inputs [..., C]."""
        product = _drift_product(dense, pruned, inputs)
        self.residual = product if self.residual is None else self.residual.add_(product)

    def release(self) -> None:
        """Let the sums go: every target that needs them is known."""
        self.inputs = self.residual = None


def corrected_target(
    weight: Tensor, hessian: DampedHessian, drift: DriftAccumulator, error_share: float, residual_share: float
) -> Tensor:
    """T = W + (a W D + b R) (H + damping)^-1 for weight [R, C]; a, b are the two shares in [0, 1]."""
    original_RC = weight.to(hessian.raw.dtype)
    pull_RC = original_RC.new_zeros(original_RC.shape)
    if drift.inputs is not None and error_share:
        pull_RC += error_share * (original_RC @ drift.inputs.to(original_RC.dtype))
    if drift.residual is not None and residual_share:
        pull_RC += residual_share * drift.residual.to(original_RC.dtype)
    return original_RC + hessian.solve(pull_RC)


def _drift_product(dense: Tensor, pruned: Tensor, inputs: Tensor) -> Tensor:
    """Sum over tokens of (dense - pruned) inputs^T, in float32; the difference is taken before anything is summed."""
    difference_TR = (dense.float() - pruned.float()).flatten(0, -2)
    return exact_product(difference_TR.T, inputs.float().flatten(0, -2))
