"""One layer pruned by any method: `prune_weight` is the public function, `prune_layer` the driver's.

The layer problem: minimise tr((W - W') H (W - W')^T) over W' of the wanted pattern.
Dimension key: R out_features, C in_features.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.grid import Grid, parse_grid
from sparsegpt.quantization import Integers
from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.solvers.methods import Method, parse_method
from sparsegpt.solvers.refit import refit, row_losses
from sparsegpt.solvers.rounding import Quantizer, parse_quantizer
from sparsegpt.sparsity import BLOCK_SIZE, Sparsity, check_block_size, parse_sparsity


@dataclass(frozen=True)
class Rounding:
    """How kept weights become integers."""

    grid: Grid
    quantizer: Quantizer

    @classmethod
    def of(cls, grid: str | Grid | None, quantizer: str) -> "Rounding | None":
        """A grid as `parse_grid` takes it, None for none, and a key of QUANTIZERS. Raises SparseGPTError."""
        found = parse_grid(grid)
        return None if found is None else cls(found, parse_quantizer(quantizer))


@dataclass(frozen=True)
class Pruned:
    """One pruned layer: weight [R, C], exactly zero where mask, bool [R, C], is False. True = kept.

    weight: in the dtype it came in. loss: tr((W - W') H (W - W')^T). energy: tr(W H W^T). damping: what the Hessian
    really needed. integers: what the weight is made of, where it is on a grid.
    """

    weight: Tensor
    mask: Tensor
    loss: float
    energy: float
    damping: float
    integers: Integers | None = None

    @property
    def relative_error(self) -> float:
        """loss / energy, without unit."""
        return self.loss / self.energy if self.energy > 0 else 0.0


@torch.no_grad()
def prune_weight(
    weight: Tensor,
    hessian: Tensor,
    sparsity: str | float | Sparsity,
    *,
    method: str | Method = "admm",
    damping: float = 0.01,
    block_size: int = BLOCK_SIZE,
    dtype: torch.dtype = torch.float32,
    grid: str | Grid | None = None,
    quantizer: str = "gptq",
    name: str = "layer",
) -> Pruned:
    """Weight [R, C], Hessian [C, C] -> Pruned: one linear layer by any method.

    weight: [out_features, in_features], any float dtype, which the result keeps. hessian: [in, in] = sum over tokens of
    x x^T, any positive scale, on the weight's device. sparsity: "2:4", "50%", 0.5 or a pattern object. method: a key of
    METHODS, a Method, or "module:name". damping: fraction of mean(diag H) added to the diagonal. block_size: columns
    that share one threshold when sparsegpt prunes a fraction. dtype: of the arithmetic. grid: integers to round
    kept weights to, such as "int4:128"; sparsity 0 rounds alone. quantizer: a key of QUANTIZERS. name: how error
    messages call the layer. Neither tensor is changed, and no gradients are kept.
    Raises SparseGPTError, naming the layer, for shapes that do not fit, values that are not finite, and a Hessian that
    no step of damping makes positive definite; for a sparsity or method that is not known, and a quantizer that is for
    whole models; and for what a method of
    one's own returns, unless it fits.
    """
    pattern, solver = parse_sparsity(sparsity), parse_method(method)
    _check_shapes(weight, hessian, pattern, block_size, name)
    if dtype not in (torch.float32, torch.float64):
        raise SparseGPTError(f"{name}: the solvers compute in float32 or float64, not in {dtype}")
    rounding = Rounding.of(grid, quantizer)
    if rounding is not None:
        rounding.grid.check(pattern)
        if rounding.quantizer.scales_inputs:
            raise SparseGPTError(
                f"{name}: quantizer {quantizer!r} scales what comes before a layer too: prune a whole model with it",
                settings=("quantizer",),
            )
    damped = DampedHessian(hessian, damping, dtype=dtype, name=name)
    return prune_layer(weight, damped, pattern, solver, block_size, rounding=rounding)


@torch.no_grad()
def prune_layer(
    weight: Tensor,
    hessian: DampedHessian,
    pattern: Sparsity,
    method: Method,
    block_size: int = BLOCK_SIZE,
    *,
    target: Tensor | None = None,
    rounding: Rounding | None = None,
) -> Pruned:
    """Weight [R, C], Hessian [C, C] -> Pruned: `prune_weight` for checked arguments, the Hessian shared by layers.

    target: [R, C], what the kept weights should imitate instead of `weight` (error correction); None: `weight` itself.
    rounding: how the kept weights become integers.
    The losses that are reported compare with `weight`.
    Raises SparseGPTError, naming the layer, where the result does not fit the weight's dtype, where no step of damping
    makes the Hessian positive definite, and for what a method of one's own returns, unless it fits.
    """
    original_RC = weight.to(hessian.raw.dtype)
    target_RC = original_RC if target is None else target.to(hessian.raw.dtype)
    if pattern.zeros == 0 and target is None and rounding is None:
        return Pruned(weight.clone(), torch.ones_like(weight, dtype=torch.bool), 0.0, 0.0, hessian.requested_damping)
    if rounding is None:
        weight_RC, mask = _prune(target_RC, hessian, pattern, method, block_size)
        integers, result = None, weight_RC.to(weight.dtype)
    else:
        integers, mask = _prune_and_round(target_RC, hessian, pattern, method, block_size, rounding)
        result = integers.decode(weight.dtype)
    loss = float(row_losses(original_RC - result.to(original_RC.dtype), hessian.raw).sum())
    if not math.isfinite(loss):
        raise SparseGPTError(
            f"{hessian.name}: pruned weights do not fit {weight.dtype} or the Hessian overflows; "
            "use float32 or bfloat16",
            settings=("dtype",),
        )
    energy = float(row_losses(original_RC, hessian.raw).sum())
    return Pruned(result, mask, loss, energy, hessian.damping, integers)


def _prune(
    target: Tensor, hessian: DampedHessian, pattern: Sparsity, method: Method, block_size: int
) -> tuple[Tensor, Tensor]:
    weight_RC, mask = method.prune(target, hessian, pattern, block_size=block_size)
    if method.refit:
        weight_RC = refit(weight_RC, mask, target, hessian.damped)
    return weight_RC, mask


def _prune_and_round(
    target: Tensor, hessian: DampedHessian, pattern: Sparsity, method: Method, block_size: int, rounding: Rounding
) -> tuple[Integers, Tensor]:
    """One sweep for both where method and quantizer can; else the mask first."""
    start, mask = target, None
    if pattern.zeros == 0:
        mask = torch.ones_like(target, dtype=torch.bool)
    elif not (method.joint and rounding.quantizer.chooses_masks):
        with hessian.keeping_factor():
            start, mask = _prune(target, hessian, pattern, method, block_size)
    return rounding.quantizer.run(start, mask, target, hessian, pattern, rounding.grid, block_size=block_size)


def _check_shapes(weight: Tensor, hessian: Tensor, pattern: Sparsity, block_size: int, name: str) -> None:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise SparseGPTError(
            f"{name}: expected a float weight [out_features, in_features], found {weight.dtype} {tuple(weight.shape)}"
        )
    width = weight.shape[1]
    if hessian.shape != (width, width):
        raise SparseGPTError(
            f"{name}: a weight with {width} input features needs a Hessian [{width}, {width}], "
            f"found {list(hessian.shape)}"
        )
    if hessian.device != weight.device:
        raise SparseGPTError(f"{name}: weight is on {weight.device} but the Hessian on {hessian.device}; move one")
    if not torch.isfinite(weight).all():
        raise SparseGPTError(f"{name}: weight contains NaN or infinite values; the checkpoint is damaged")
    pattern.check(width, name)
    check_block_size(block_size, pattern)
