"""Packed 2:4 weights with int8 or int4 values on a CPU: outputs = inputs W^T + bias, W = q * scale (integer24.cpp).

Inputs and outputs in bfloat16, sums in float32; needs AVX2.
Dimension key: N out_features, K in_features."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsegpt.kernels.cpu import library
from sparsegpt.kernels.cpu.build import load_library
from sparsegpt.kernels.format.pack import padded_columns
from sparsegpt.kernels.format.quantized import Quantized24

LEVELS = ("avx2", "avx512", "avx512_bf16")


def refusal(weight: Quantized24) -> str | None:
    """[N, K] -> why the CPU kernel cannot serve the weight, or None."""
    reason = library.misplaced(weight.words, weight.scales, weight.meta)
    if reason is not None:
        return reason
    if weight.dtype != torch.bfloat16:
        return f"the CPU kernel for integer values computes in bfloat16; the layer is {weight.dtype}"
    if load_library() is None:
        return library.NO_COMPILER
    return None if library.machine_level() in LEVELS else "the CPU kernel for integer values needs AVX2"


def run(weight: Quantized24, inputs: Tensor, bias: Tensor | None, *, level: str | None = None) -> Tensor:
    """inputs [..., K] contiguous, bias [N] contiguous -> [..., N], all bfloat16; unchecked. `level`: one of LEVELS.

    Raises SparseGPTError for a `level` that the machine does not have (`library.call`).
    """
    outputs = inputs.new_empty(*inputs.shape[:-1], weight.shape[0])
    library.call(*product(weight, library.whole_words(inputs, weight.shape[1]), bias, outputs), level)
    return outputs


def product(weight: Quantized24, inputs: Tensor, bias: Tensor | None, outputs: Tensor) -> library.Call:
    """The call of `run` for inputs [..., Kp], padded with zeros to whole words, and outputs [..., N]."""
    rows, columns = weight.shape
    padded = padded_columns(columns)
    tensors = (weight.words, weight.scales, weight.meta, inputs, library.NOTHING if bias is None else bias, outputs)
    sizes = (rows, padded, inputs.numel() // padded, min(weight.group_size, padded), weight.bits)
    return "sparse24_integer_bf16", tensors, sizes, rows * columns
