"""Torch twins of the fused kernels: what each of them computes, in plain words and float32.

    linear   y = activation(x W^T + b)
    swiglu   y = silu(x Wg^T) * (x Wu^T)                        (Shazeer 2020, arXiv:2002.05202)
    activations: none, relu, relu2 (squared, So et al. 2021, arXiv:2109.08668), silu, gelu (tanh form)

Decompressed is by the formats' own twins: `pack.unpack`, `quantized.dequantize`, `bitmask.unpack_bitmask` and
`bitmask_integers.dequantize_bitmask`.
Dimension key: T tokens, N out_features, K in_features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.bitmask import Bitmask, unpack_bitmask
from sparsegpt.kernels.format.bitmask_integers import QuantizedBitmask, dequantize_bitmask
from sparsegpt.kernels.format.pack import Packed24, unpack
from sparsegpt.kernels.format.quantized import Quantized24, dequantize

Packed = Packed24 | Quantized24 | Bitmask | QuantizedBitmask

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "silu": functional.silu,
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
}


def linear(weight: Packed, inputs: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """inputs [T, K] -> activation(inputs weight^T + bias) [T, N] in the dtype of the inputs."""
    outputs = inputs.float() @ _dense(weight).T
    return ACTIVATIONS[activation](outputs if bias is None else outputs + bias.float()).to(inputs.dtype)


def swiglu(gate: Packed, up: Packed, inputs: Tensor) -> Tensor:
    """inputs [T, K] -> silu(inputs gate^T) * (inputs up^T) [T, N] in the dtype of the inputs."""
    gated = functional.silu(inputs.float() @ _dense(gate).T)
    return (gated * (inputs.float() @ _dense(up).T)).to(inputs.dtype)


def check_operands(weight: Packed, inputs: Tensor, bias: Tensor | None = None, activation: str = "none") -> None:
    """Raises SparseGPTError unless inputs [T, K] and bias [N] fit the weight, and there is such an activation."""
    if activation not in ACTIVATIONS:
        raise SparseGPTError(f"activation: expected one of {', '.join(ACTIVATIONS)}; found {activation!r}")
    rows, columns = weight.shape
    if inputs.ndim != 2 or inputs.shape[1] != columns or (bias is not None and tuple(bias.shape) != (rows,)):
        found = f"{tuple(inputs.shape)}, bias {None if bias is None else tuple(bias.shape)}"
        raise SparseGPTError(f"weight {weight.shape} expects inputs [T, {columns}] and bias [{rows}]; found {found}")
    if weight.device != inputs.device:
        raise SparseGPTError(f"weight on {weight.device}, inputs on {inputs.device}: move one of them")
    if isinstance(weight, Packed24 | Bitmask) and weight.values.dtype != inputs.dtype:
        raise SparseGPTError(f"weight in {weight.values.dtype}, inputs in {inputs.dtype}: cast one of them")


def _dense(weight: Packed) -> Tensor:
    if isinstance(weight, Packed24):
        return unpack(weight).float()
    if isinstance(weight, Quantized24):
        return unpack(dequantize(weight, torch.float32))
    if isinstance(weight, Bitmask):
        return unpack_bitmask(weight).float()
    return dequantize_bitmask(replace(weight, dtype=torch.float32))
