"""The compiled library and how its functions are called through ctypes.

The paths (AVX-512 with and without bfloat16 products, AVX2, plain) are in the C++ sources; `LEVELS` names them, the
machine's best is chosen at run time. Without a compiler there is no library, and everything runs through torch on
decompressed weights."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.cpu.build import load_library

LEVELS = ("plain", "avx2", "avx512", "avx512_bf16")
NO_COMPILER = "the CPU kernel needs a C++ compiler (c++, g++, clang++ or $CXX)"
NOTHING = torch.empty(0, device="cpu")  # has the address 0
_ADDRESS = Tensor.data_ptr
_SMALL = 1 << 16  # weights: below this a second thread costs more than it saves
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
# By the second word of a function's name: addresses, sizes, and at the end threads and level.
_ARGUMENTS = {
    "matmul": [_POINTER] * 5 + [_LONG] * 3 + [_INT] * 2,
    "swiglu": [_POINTER] * 6 + [_LONG] * 3 + [_INT] * 2,
    "integer": [_POINTER] * 6 + [_LONG] * 4 + [_INT] * 3,
    "masked": [_POINTER] * 11 + [_LONG] * 4 + [_INT] * 2,
    "expand": [_POINTER] * 5 + [_LONG] * 4 + [_INT] * 2,
    "dense": [_POINTER] * 4 + [_LONG] * 3 + [_INT] * 2,
    "norm": [_POINTER] * 3 + [_LONG] * 2 + [_FLOAT] + [_INT] * 2,
    "unpack": [_POINTER] * 3 + [_LONG] * 3 + [_INT] * 2,
    "huge": [_POINTER, _LONG],
}


@cache
def machine_level() -> str | None:
    """The best path of this machine, or None without a library."""
    library = load_library()
    return None if library is None else LEVELS[library.sparse24_level()]


def call(name: str, tensors: tuple[Tensor, ...], sizes: tuple[float, ...], weights: int, level: str | None) -> None:
    """[...], ...: run a function of the library on tensors, with threads that fit so many weights.

    tensors: contiguous, on the CPU, unchecked, handed over as addresses, NOTHING as null. level: a path
    of LEVELS, None for the machine's. Raises SparseGPTError for a path that the machine does not have.
    """
    # a small product costs a few microseconds, so each step here counts: map, and a cache with one key
    function, number = at_best_level(name) if level is None else (find_function(name), level_number(level))
    function(*map(_ADDRESS, tensors), *sizes, 1 if weights < _SMALL else torch.get_num_threads(), number)


@cache
def at_best_level(name: str) -> tuple[Any, int]:
    """A function of the library and the number of the machine's path."""
    return find_function(name), level_number(machine_level() or "plain")


@cache
def find_function(name: str) -> Any:
    """A function of the library, or None without one."""
    library = load_library()
    if library is None:
        return None
    function = getattr(library, name)
    function.argtypes = _ARGUMENTS[name.split("_")[1]]
    function.restype = None
    return function


def to_huge_pages(*tensors: Tensor) -> None:
    """[...], ...: have the memory of CPU tensors moved in place to huge pages where the system allows, a hint."""
    function = find_function("sparse24_huge_pages")
    for tensor in tensors if function is not None else ():
        function(tensor.data_ptr(), tensor.nbytes)


def misplaced(*tensors: Tensor) -> str | None:
    """[...], ... -> why the library cannot read the tensors of a weight, or None."""
    for tensor in tensors:
        if not tensor.is_cpu:
            return f"the CPU kernel needs the weight on the CPU; it is on {tensor.device.type}"
        if not tensor.is_contiguous():
            return f"the CPU kernel needs a contiguous weight; found strides {tensor.stride()}"
    return None


def level_number(level: str) -> int:
    """The number of a path in the library. Raises SparseGPTError for one that the machine does not have."""
    best = LEVELS.index(machine_level() or "plain")
    if level not in LEVELS or LEVELS.index(level) > best:
        raise SparseGPTError(
            f"CPU path: expected one of {', '.join(LEVELS[: best + 1])} on this machine; found {level}"
        )
    return LEVELS.index(level)
