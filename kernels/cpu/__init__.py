"""Products with packed 2:4 weights on a CPU: a C++ kernel, built on demand, called through ctypes.

    outputs [T, N] = inputs [T, K] weight^T + bias,  bfloat16 and float32, sums in float32

The paths (AVX-512 bfloat16, AVX2, plain) are in `matmul24.cpp`; `LEVELS` names them, the machine's best is chosen at
run time. Without a compiler there is no library, and everything runs through torch on decompressed weights."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError

from ..pack import Packed24, padded_columns, unpack
from .build import load_library

LEVELS = ("plain", "avx2", "avx512_bf16")
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_MATMUL = {torch.bfloat16: "sparse24_matmul_bf16", torch.float32: "sparse24_matmul_f32"}
_UNPACK = {
    torch.bfloat16: "sparse24_unpack_16",
    torch.float16: "sparse24_unpack_16",
    torch.float32: "sparse24_unpack_32",
}
_SMALL = 1 << 16  # weights: below this a second thread costs more than it saves


def refusal(weight: Packed24) -> str | None:
    """Why the CPU kernel cannot serve a weight, or None."""
    if weight.values.device.type != "cpu":
        return f"the CPU kernel needs the weight on the CPU; it is on {weight.values.device.type}"
    if weight.values.dtype not in _MATMUL:
        return f"the CPU kernel computes in bfloat16 and float32; the weight is {weight.values.dtype}"
    return None if load_library() is not None else "the CPU kernel needs a C++ compiler (c++, g++, clang++ or $CXX)"


@cache
def machine_level() -> str | None:
    """The best path of this machine, or None without a library."""
    library = load_library()
    return None if library is None else LEVELS[library.sparse24_level()]


def matmul(weight: Packed24, inputs: Tensor, bias: Tensor | None = None, *, level: str | None = None) -> Tensor:
    """inputs [T, K] contiguous, of the dtype of the values -> [T, N]; `level` forces a path of LEVELS.

    Raises SparseGPTError when the kernel cannot serve the weight.
    """
    function = _function(_MATMUL.get(weight.values.dtype))
    if function is None:
        raise SparseGPTError(str(refusal(weight)))
    rows, columns = weight.shape
    padded = padded_columns(columns)
    if padded != columns:
        inputs = functional.pad(inputs, (0, padded - columns))
    outputs = inputs.new_empty(inputs.shape[0], rows)
    function(
        weight.values.data_ptr(),
        weight.meta.data_ptr(),
        inputs.data_ptr(),
        None if bias is None else bias.data_ptr(),
        outputs.data_ptr(),
        rows,
        padded,
        inputs.shape[0],
        1 if rows * columns < _SMALL else torch.get_num_threads(),
        _level_number(level),
    )
    return outputs


def unpack_fast(weight: Packed24, *, out: Tensor | None = None, level: str | None = None) -> Tensor:
    """`pack.unpack` through the library where it can, several times as fast; otherwise `pack.unpack` itself.

    `out` [N, K] contiguous, of the dtype and device of the values, takes the result instead of a new tensor.
    """
    rows, columns = weight.shape
    dense = weight.values.new_empty(rows, columns) if out is None else out
    name = _UNPACK.get(weight.values.dtype) if weight.values.device.type == "cpu" else None
    function = _function(name)
    if function is None or not weight.values.is_contiguous() or not weight.meta.is_contiguous():
        return dense.copy_(unpack(weight))
    function(
        weight.values.data_ptr(),
        weight.meta.data_ptr(),
        dense.data_ptr(),
        rows,
        padded_columns(columns),
        columns,
        1 if rows * columns < _SMALL else torch.get_num_threads(),
        _level_number(level),
    )
    return dense


@cache
def _function(name: str | None) -> ctypes._NamedFuncPointer | None:
    library = load_library() if name else None
    if library is None or name is None:
        return None
    function = getattr(library, name)
    arrays, sizes = (5, 3) if "matmul" in name else (3, 3)
    function.argtypes = [_POINTER] * arrays + [_LONG] * sizes + [_INT] * 2
    function.restype = None
    return function  # type: ignore[no-any-return]


@cache
def _level_number(level: str | None) -> int:
    best = LEVELS.index(machine_level() or "plain")
    if level is None:
        return best
    if level not in LEVELS or LEVELS.index(level) > best:
        raise SparseGPTError(
            f"CPU path: expected one of {', '.join(LEVELS[: best + 1])} on this machine; found {level}"
        )
    return LEVELS.index(level)
