"""Packed weights of any pattern on a CPU, values as they were or integers; sums in float32 (bitmask.cpp).

    run          outputs = inputs W^T + bias                           bfloat16 and float32
    run_swiglu   silu(inputs Wg^T) * (inputs Wu^T)                     the same
    unpack_fast  W itself                                              bfloat16, float16, float32; int8 and int4 in two

Weights are settled ones (`Bitmask.settled`): the library goes by their offsets.
Dimension key: N out_features, K in_features."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.cpu import library
from sparsegpt.kernels.cpu.build import load_library
from sparsegpt.kernels.format.bitmask import Bitmask, unpack_bitmask
from sparsegpt.kernels.format.bitmask_integers import QuantizedBitmask, dequantize_bitmask
from sparsegpt.kernels.format.pack import WORD_COLUMNS, padded_columns

Masked = Bitmask | QuantizedBitmask
_NOTHINGS = (library.NOTHING,) * 4

_BF16, _F16, _F32 = torch.bfloat16, torch.float16, torch.float32
# By the bits of integers, None for values as they were, and the dtype of inputs or of the dense weight.
_MATMUL = {
    (None, _BF16): "sparse24_masked_bf16",
    (None, _F32): "sparse24_masked_f32",
    (8, _BF16): "sparse24_masked_int8_bf16",
    (4, _BF16): "sparse24_masked_int4_bf16",
    (8, _F32): "sparse24_masked_int8_f32",
    (4, _F32): "sparse24_masked_int4_f32",
}
_UNPACK = {
    (None, _BF16): "sparse24_expand_16",
    (None, _F16): "sparse24_expand_16",
    (None, _F32): "sparse24_expand_32",
    (8, _BF16): "sparse24_expand_int8_bf16",
    (4, _BF16): "sparse24_expand_int4_bf16",
    (8, _F32): "sparse24_expand_int8_f32",
    (4, _F32): "sparse24_expand_int4_f32",
}


def refusal(weight: Masked) -> str | None:
    """[N, K] -> why the CPU kernel cannot serve the weight, or None."""
    reason = library.misplaced(*_tensors(weight))
    if reason is not None:
        return reason
    if not _is_settled(weight):
        return "the CPU kernel needs an offset for each row; settle the weight first"
    if _kind(weight) not in _MATMUL:
        return f"the CPU kernel computes in bfloat16 and float32; the weight is {weight.dtype}"
    return None if load_library() is not None else library.NO_COMPILER


def prepare(weight: Masked) -> Masked:
    """[N, K] -> the weight itself, its memory moved in place to huge pages where the system allows (a hint)."""
    library.to_huge_pages(*_tensors(weight)[:2])
    return weight


def run(weight: Masked, inputs: Tensor, bias: Tensor | None, *, level: str | None = None) -> Tensor:
    """inputs [..., K] contiguous, bias [N] contiguous -> [..., N], all of the weight's dtype; unchecked.

    Raises SparseGPTError for a `level` that the machine does not have (`library.call`).
    """
    outputs = inputs.new_empty(*inputs.shape[:-1], weight.shape[0])
    library.call(*product(weight, library.whole_words(inputs, weight.shape[1]), bias, outputs), level)
    return outputs


def product(weight: Masked, inputs: Tensor, bias: Tensor | None, outputs: Tensor) -> library.Call:
    """The call of `run` for inputs [..., Kp], padded with zeros to whole words, and outputs [..., N]."""
    return _call(_NOTHINGS, weight, inputs, bias, outputs)


def run_swiglu(gate: Masked, up: Masked, inputs: Tensor, *, level: str | None = None) -> Tensor:
    """inputs [..., K] contiguous, of the weights' dtype -> silu(inputs gate^T) * (inputs up^T) [..., N]; unchecked.

    Raises SparseGPTError where gate and up have not one shape and kind of values, and as `run`.
    """
    if gate.shape != up.shape or _kind(gate) != _kind(up) or _group(gate) != _group(up):
        raise SparseGPTError(f"swiglu: gate {gate.shape} and up {up.shape} must have one shape, dtype and group size")
    outputs = inputs.new_empty(*inputs.shape[:-1], up.shape[0])
    library.call(*gated_product(gate, up, library.whole_words(inputs, up.shape[1]), outputs), level)
    return outputs


def gated_product(gate: Masked, up: Masked, inputs: Tensor, outputs: Tensor) -> library.Call:
    """The call of `run_swiglu` for inputs [..., Kp], padded with zeros to whole words, and outputs [..., N]."""
    return _call(_tensors(gate), up, inputs, None, outputs)


def unpack_fast(weight: Masked, *, out: Tensor | None = None, level: str | None = None) -> Tensor:
    """Packed -> dense [N, K]: the format's torch twin through the library where it can, otherwise the twin itself.

    `out` [N, K] contiguous, of the dtype and device of the weight, takes the result instead of a new tensor.
    """
    readable = library.misplaced(*_tensors(weight)) is None and _is_settled(weight)
    name = _UNPACK.get(_kind(weight)) if readable else None
    if name is None or library.find_function(name) is None:
        dense = unpack_bitmask(weight) if isinstance(weight, Bitmask) else dequantize_bitmask(weight)
        return dense if out is None else out.copy_(dense)
    rows, columns = weight.shape
    dense = torch.empty(rows, columns, dtype=weight.dtype) if out is None else out
    sizes = (rows, padded_columns(columns), columns, _group(weight))
    library.call(name, (*_tensors(weight), dense), sizes, rows * columns, level)
    return dense


def _call(
    gate: tuple[Tensor, ...], weight: Masked, inputs: Tensor, bias: Tensor | None, outputs: Tensor
) -> library.Call:
    rows, columns = weight.shape
    padded = padded_columns(columns)
    tensors = (*gate, *_tensors(weight), inputs, library.NOTHING if bias is None else bias, outputs)
    sizes = (rows, padded, inputs.numel() // padded, _group(weight))
    return _MATMUL[_kind(weight)], tensors, sizes, rows * columns


def _tensors(weight: Masked) -> tuple[Tensor, ...]:
    """Values or integers, mask, offsets, and scales or nothing."""
    if isinstance(weight, Bitmask):
        return weight.values, weight.mask, weight.offsets, library.NOTHING
    return weight.integers, weight.mask, weight.offsets, weight.scales


def _is_settled(weight: Masked) -> bool:
    return len(weight.offsets) == weight.shape[0] + 1 and weight.offsets.dtype == torch.int64


def _bits(weight: Masked) -> int | None:
    return None if isinstance(weight, Bitmask) else weight.bits


def _kind(weight: Masked) -> tuple[int | None, torch.dtype]:
    return _bits(weight), weight.dtype


def _group(weight: Masked) -> int:
    """Columns of a scale."""
    return WORD_COLUMNS if isinstance(weight, Bitmask) else weight.group_size
