"""Products with packed 2:4 weights on a CPU, and what else a token takes: C++ kernels, built on demand, called
through ctypes.

    matmul          outputs [T, N] = inputs [T, K] weight^T + bias       bfloat16 and float32, sums in float32
    swiglu          silu(inputs gate^T) * (inputs up^T)                  the same
    matmul_integer  as matmul, int8 or int4 values with group scales     bfloat16 inputs, AVX-512
    matmul_dense    as matmul, a dense weight                            bfloat16
    rms_norm        inputs / sqrt(mean(inputs^2) + epsilon) * weight     bfloat16 and float32

The paths (AVX-512 with and without bfloat16 products, AVX2, plain) are in the C++ sources; `LEVELS` names them, the
machine's best is chosen at run time. Without a compiler there is no library, and everything runs through torch on
decompressed weights."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.cpu.build import load_library
from sparsegpt.kernels.format.pack import Packed24, padded_columns, unpack
from sparsegpt.kernels.format.quantized import Quantized24

LEVELS = ("plain", "avx2", "avx512", "avx512_bf16")
INTEGER_LEVELS = ("avx512", "avx512_bf16")
_NO_COMPILER = "the CPU kernel needs a C++ compiler (c++, g++, clang++ or $CXX)"
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_MATMUL = {torch.bfloat16: "sparse24_matmul_bf16", torch.float32: "sparse24_matmul_f32"}
_SWIGLU = {torch.bfloat16: "sparse24_swiglu_bf16", torch.float32: "sparse24_swiglu_f32"}
_NORM = {torch.bfloat16: "sparse24_norm_bf16", torch.float32: "sparse24_norm_f32"}
_UNPACK = {
    torch.bfloat16: "sparse24_unpack_16",
    torch.float16: "sparse24_unpack_16",
    torch.float32: "sparse24_unpack_32",
}
_ARGUMENTS = {
    "matmul": [_POINTER] * 5 + [_LONG] * 3 + [_INT] * 2,
    "swiglu": [_POINTER] * 6 + [_LONG] * 3 + [_INT] * 2,
    "integer": [_POINTER] * 6 + [_LONG] * 4 + [_INT] * 3,
    "dense": [_POINTER] * 4 + [_LONG] * 3 + [_INT] * 2,
    "norm": [_POINTER] * 3 + [_LONG] * 2 + [_FLOAT] + [_INT] * 2,
    "unpack": [_POINTER] * 3 + [_LONG] * 3 + [_INT] * 2,
    "huge": [_POINTER, _LONG],
}
NORM_DTYPES = tuple(_NORM)
# Tokens up to which `matmul_dense` was timed and faster than torch; where a CPU multiplies bfloat16, torch does well.
DENSE_TOKENS = {"avx2": 1024, "avx512": 1024}
_SMALL = 1 << 16  # weights: below this a second thread costs more than it saves


def refusal(weight: Packed24) -> str | None:
    """Why the CPU kernel cannot serve a weight, or None."""
    reason = _misplaced(weight.values, weight.meta)
    if reason is not None:
        return reason
    if weight.values.dtype not in _MATMUL:
        return f"the CPU kernel computes in bfloat16 and float32; the weight is {weight.values.dtype}"
    return None if load_library() is not None else _NO_COMPILER


def refuse_integer(weight: Quantized24, dtype: torch.dtype) -> str | None:
    """Why the CPU kernel for integer values cannot serve a weight with inputs of `dtype`, or None."""
    reason = _misplaced(weight.words, weight.scales, weight.meta)
    if reason is not None:
        return reason
    if dtype != torch.bfloat16:
        return f"the CPU kernel for integer values computes in bfloat16; the layer is {dtype}"
    if load_library() is None:
        return _NO_COMPILER
    return None if machine_level() in INTEGER_LEVELS else "the CPU kernel for integer values needs AVX-512"


def _misplaced(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        if not tensor.is_cpu:
            return f"the CPU kernel needs the weight on the CPU; it is on {tensor.device.type}"
        if not tensor.is_contiguous():
            return f"the CPU kernel needs a contiguous weight; found strides {tensor.stride()}"
    return None


@cache
def machine_level() -> str | None:
    """The best path of this machine, or None without a library."""
    library = load_library()
    return None if library is None else LEVELS[library.sparse24_level()]


def dense_tokens() -> int:
    """Tokens up to which `matmul_dense` serves dense linears on this machine; 0 where torch does as well."""
    return DENSE_TOKENS.get(machine_level() or "", 0)


def prepare(weight: Packed24) -> Packed24:
    """The weight itself, its memory moved in place to huge pages where the system allows (a hint, once a weight)."""
    to_huge_pages(weight.values, weight.meta)
    return weight


def to_huge_pages(*tensors: Tensor) -> None:
    """Have the memory of CPU tensors moved in place to huge pages where the system allows: a hint."""
    function = _function("sparse24_huge_pages")
    for tensor in tensors if function is not None else ():
        function(tensor.data_ptr(), tensor.nbytes)


def matmul(weight: Packed24, inputs: Tensor, bias: Tensor | None = None, *, level: str | None = None) -> Tensor:
    """inputs [..., K] contiguous, of the dtype of the values -> [..., N]; `level` forces a path of LEVELS.

    Raises SparseGPTError when the kernel cannot serve the weight, or inputs or bias do not fit it.
    """
    _check(refusal(weight), weight.shape, weight.values.dtype, inputs, bias)
    return run(weight, inputs, bias, level=level)


def run(weight: Packed24, inputs: Tensor, bias: Tensor | None, *, level: str | None = None) -> Tensor:
    """`matmul` without its checks, which a layer makes once."""
    rows, columns = weight.shape
    inputs = _padded(inputs, columns)
    padded = inputs.shape[-1]
    outputs = inputs.new_empty(*inputs.shape[:-1], rows)
    _function(_MATMUL[weight.values.dtype])(
        weight.values.data_ptr(),
        weight.meta.data_ptr(),
        inputs.data_ptr(),
        None if bias is None else bias.data_ptr(),
        outputs.data_ptr(),
        rows,
        padded,
        inputs.numel() // padded,
        _threads(rows * columns),
        _level_number(level),
    )
    return outputs


def swiglu(gate: Packed24, up: Packed24, inputs: Tensor, *, level: str | None = None) -> Tensor:
    """silu(inputs gate^T) * (inputs up^T) for weights of one shape: inputs [..., K] contiguous.

    Raises SparseGPTError when the kernel cannot serve the weights, or the inputs do not fit them.
    """
    _check(refusal(gate) or refusal(up), up.shape, up.values.dtype, inputs, None)
    return run_swiglu(gate, up, inputs, level=level)


def run_swiglu(gate: Packed24, up: Packed24, inputs: Tensor, *, level: str | None = None) -> Tensor:
    """`swiglu` without those of its checks that a layer makes once."""
    if gate.shape != up.shape or gate.values.dtype != up.values.dtype:
        raise SparseGPTError(f"swiglu: gate {gate.shape} and up {up.shape} must have one shape and dtype")
    rows, columns = up.shape
    inputs = _padded(inputs, columns)
    padded = inputs.shape[-1]
    outputs = inputs.new_empty(*inputs.shape[:-1], rows)
    _function(_SWIGLU[up.values.dtype])(
        gate.values.data_ptr(),
        gate.meta.data_ptr(),
        up.values.data_ptr(),
        up.meta.data_ptr(),
        inputs.data_ptr(),
        outputs.data_ptr(),
        rows,
        padded,
        inputs.numel() // padded,
        _threads(2 * rows * columns),
        _level_number(level),
    )
    return outputs


def matmul_integer(
    weight: Quantized24, inputs: Tensor, bias: Tensor | None = None, *, level: str | None = None
) -> Tensor:
    """inputs [..., K] contiguous bfloat16 -> [..., N] bfloat16, for int8 or int4 values; `level` of INTEGER_LEVELS.

    Raises SparseGPTError when the kernel cannot serve the weight or has no such path for it, or inputs or bias do not
    fit it.
    """
    reason = refuse_integer(weight, inputs.dtype)
    if level not in (None, *INTEGER_LEVELS):
        reason = f"CPU path for integer values: expected one of {', '.join(INTEGER_LEVELS)}; found {level}"
    _check(reason, weight.shape, torch.bfloat16, inputs, bias)
    return run_integer(weight, inputs, bias, level=level)


def run_integer(weight: Quantized24, inputs: Tensor, bias: Tensor | None, *, level: str | None = None) -> Tensor:
    """`matmul_integer` without its checks, which a layer makes once."""
    rows, columns = weight.shape
    inputs = _padded(inputs, columns)
    padded = inputs.shape[-1]
    outputs = inputs.new_empty(*inputs.shape[:-1], rows)
    _function("sparse24_integer_bf16")(
        weight.words.data_ptr(),
        weight.scales.data_ptr(),
        weight.meta.data_ptr(),
        inputs.data_ptr(),
        None if bias is None else bias.data_ptr(),
        outputs.data_ptr(),
        rows,
        padded,
        inputs.numel() // padded,
        min(weight.group_size, padded),
        weight.bits,
        _threads(rows * columns),
        _level_number(level),
    )
    return outputs


def matmul_dense(weight: Tensor, inputs: Tensor, bias: Tensor | None = None, *, level: str | None = None) -> Tensor:
    """inputs [..., K] contiguous -> [..., N] for a dense weight [N, K] contiguous, all bfloat16.

    Raises SparseGPTError when there is no library, or the operands are not so.
    """
    reason = _misplaced(weight)
    if reason is None and weight.dtype != torch.bfloat16:
        reason = f"the CPU kernel for dense weights computes in bfloat16; the weight is {weight.dtype}"
    if reason is None and load_library() is None:
        reason = _NO_COMPILER
    _check(reason, (weight.shape[0], weight.shape[1]), torch.bfloat16, inputs, bias)
    return run_dense(weight, inputs, bias, level=level)


def run_dense(weight: Tensor, inputs: Tensor, bias: Tensor | None, *, level: str | None = None) -> Tensor:
    """`matmul_dense` without its checks."""
    rows, columns = weight.shape
    outputs = inputs.new_empty(*inputs.shape[:-1], rows)
    _function("sparse24_dense_bf16")(
        weight.data_ptr(),
        inputs.data_ptr(),
        None if bias is None else bias.data_ptr(),
        outputs.data_ptr(),
        rows,
        columns,
        inputs.numel() // columns,
        _threads(rows * columns),
        _level_number(level),
    )
    return outputs


def rms_norm(inputs: Tensor, weight: Tensor, epsilon: float, *, level: str | None = None) -> Tensor:
    """inputs [..., K] contiguous and weight [K], both bfloat16 or both float32 -> [..., K] (formula: norm.cpp).

    Raises SparseGPTError when there is no library, or the operands are not so.
    """
    reason = _misplaced(weight)
    if reason is None and (weight.ndim != 1 or weight.dtype not in _NORM):
        found = f"{tuple(weight.shape)} {weight.dtype}"
        reason = f"the CPU kernel for norms expects a weight [K], bfloat16 or float32; found {found}"
    if reason is None and load_library() is None:
        reason = _NO_COMPILER
    _check(reason, (weight.numel(), weight.numel()), weight.dtype, inputs, None)
    return run_norm(inputs, weight, epsilon, level=level)


def run_norm(inputs: Tensor, weight: Tensor, epsilon: float, *, level: str | None = None) -> Tensor:
    """`rms_norm` without its checks."""
    columns = weight.shape[0]
    outputs = inputs.new_empty(*inputs.shape)
    _function(_NORM[weight.dtype])(
        inputs.data_ptr(),
        weight.data_ptr(),
        outputs.data_ptr(),
        columns,
        inputs.numel() // columns,
        epsilon,
        _threads(inputs.numel()),
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
        _threads(rows * columns),
        _level_number(level),
    )
    return dense


def _check(reason: str | None, shape: tuple[int, int], dtype: torch.dtype, inputs: Tensor, bias: Tensor | None) -> None:
    """Refuse, for `reason` or because of their form, operands that the library would misread: it gets addresses."""
    if reason is not None:
        raise SparseGPTError(reason)
    (rows, columns), given = shape, [inputs] if bias is None else [inputs, bias]
    fit = inputs.shape[-1:] == (columns,) and (bias is None or bias.shape == (rows,))
    if not fit or any(not each.is_cpu or not each.is_contiguous() or each.dtype != dtype for each in given):
        found = ", ".join(f"{tuple(each.shape)} {each.dtype} {each.device} strides {each.stride()}" for each in given)
        raise SparseGPTError(
            f"the CPU kernel expects contiguous inputs [..., {columns}] and bias [{rows}] in {dtype}; found {found}"
        )


def _padded(inputs: Tensor, columns: int) -> Tensor:
    missing = padded_columns(columns) - columns
    return functional.pad(inputs, (0, missing)) if missing else inputs


def _threads(weights: int) -> int:
    return 1 if weights < _SMALL else torch.get_num_threads()


@cache
def _function(name: str | None) -> Any:
    """A function of the library, or None without one."""
    library = load_library() if name else None
    if library is None or name is None:
        return None
    function = getattr(library, name)
    function.argtypes = _ARGUMENTS[name.split("_")[1]]
    function.restype = None
    return function


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
