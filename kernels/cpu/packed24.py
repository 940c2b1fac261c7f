"""Packed 2:4 weights on a CPU; sums in float32 (matmul24.cpp).

    run          outputs = inputs W^T + bias                           bfloat16 and float32
    run_swiglu   silu(inputs Wg^T) * (inputs Wu^T)                     bfloat16 and float32
    unpack_fast  W itself                                              bfloat16, float16 and float32

Dimension key: N out_features, K in_features."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.cpu import library
from sparsegpt.kernels.cpu.build import load_library
from sparsegpt.kernels.format.pack import Packed24, padded_columns, unpack

_MATMUL = {torch.bfloat16: "sparse24_matmul_bf16", torch.float32: "sparse24_matmul_f32"}
_SWIGLU = {torch.bfloat16: "sparse24_swiglu_bf16", torch.float32: "sparse24_swiglu_f32"}
_UNPACK = {
    torch.bfloat16: "sparse24_unpack_16",
    torch.float16: "sparse24_unpack_16",
    torch.float32: "sparse24_unpack_32",
}


def refusal(weight: Packed24) -> str | None:
    """[N, K] -> why the CPU kernel cannot serve the weight, or None."""
    reason = library.misplaced(weight.values, weight.meta)
    if reason is not None:
        return reason
    if weight.dtype not in _MATMUL:
        return f"the CPU kernel computes in bfloat16 and float32; the weight is {weight.dtype}"
    return None if load_library() is not None else library.NO_COMPILER


def prepare(weight: Packed24) -> Packed24:
    """[N, K] -> the weight itself, its memory moved in place to huge pages where the system allows (a hint)."""
    library.to_huge_pages(weight.values, weight.meta)
    return weight


def run(weight: Packed24, inputs: Tensor, bias: Tensor | None, *, level: str | None = None) -> Tensor:
    """inputs [..., K] contiguous, bias [N] contiguous -> [..., N], all of the weight's dtype; unchecked.

    Raises SparseGPTError for a `level` that the machine does not have (`library.call`).
    """
    outputs = inputs.new_empty(*inputs.shape[:-1], weight.shape[0])
    library.call(*product(weight, library.whole_words(inputs, weight.shape[1]), bias, outputs), level)
    return outputs


def product(weight: Packed24, inputs: Tensor, bias: Tensor | None, outputs: Tensor) -> library.Call:
    """The call of `run` for inputs [..., Kp], padded with zeros to whole words, and outputs [..., N]."""
    (rows, columns), values = weight.shape, weight.values
    padded = padded_columns(columns)
    tensors = (values, weight.meta, inputs, library.NOTHING if bias is None else bias, outputs)
    return _MATMUL[values.dtype], tensors, (rows, padded, inputs.numel() // padded), rows * columns


def run_swiglu(gate: Packed24, up: Packed24, inputs: Tensor, *, level: str | None = None) -> Tensor:
    """inputs [..., K] contiguous, of the weights' dtype -> silu(inputs gate^T) * (inputs up^T) [..., N]; unchecked.

    Raises SparseGPTError where gate and up have not one shape and dtype, and as `run`.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise SparseGPTError(f"swiglu: gate {gate.shape} and up {up.shape} must have one shape and dtype")
    outputs = inputs.new_empty(*inputs.shape[:-1], up.shape[0])
    library.call(*gated_product(gate, up, library.whole_words(inputs, up.shape[1]), outputs), level)
    return outputs


def gated_product(gate: Packed24, up: Packed24, inputs: Tensor, outputs: Tensor) -> library.Call:
    """The call of `run_swiglu` for inputs [..., Kp], padded with zeros to whole words, and outputs [..., N]."""
    rows, columns = up.shape
    padded = padded_columns(columns)
    tensors = (gate.values, gate.meta, up.values, up.meta, inputs, outputs)
    return _SWIGLU[up.dtype], tensors, (rows, padded, inputs.numel() // padded), 2 * rows * columns


def unpack_fast(weight: Packed24, *, out: Tensor | None = None, level: str | None = None) -> Tensor:
    """Packed -> dense [N, K]: `pack.unpack` through the library where it can, otherwise `pack.unpack` itself.

    `out` [N, K] contiguous, of the dtype and device of the weight, takes the result instead of a new tensor.
    """
    (rows, columns), values = weight.shape, weight.values
    name = _UNPACK.get(values.dtype) if values.is_cpu else None
    if (
        name is None
        or library.find_function(name) is None
        or not values.is_contiguous()
        or not weight.meta.is_contiguous()
    ):
        dense = unpack(weight)
        return dense if out is None else out.copy_(dense)
    dense = values.new_empty(rows, columns) if out is None else out
    library.call(name, (values, weight.meta, dense), (rows, padded_columns(columns), columns), rows * columns, level)
    return dense
