"""The compiled library and how its functions are called through ctypes.

The paths (AVX-512 with and without bfloat16 products, AVX2, plain) are in the C++ sources; `LEVELS` names them, the
machine's best is chosen at run time. AMX tiles, for many tokens beside AVX-512 with bfloat16 products, serve once they
have been tried against torch's product. Without a compiler there is no library, and everything runs through torch on
decompressed weights."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.cpu.build import load_library
from sparsegpt.kernels.format.pack import WORD_COLUMNS

logger = logging.getLogger("sparsegpt.kernels")

LEVELS = ("plain", "avx2", "avx512", "avx512_bf16", "amx")
NO_COMPILER = "the CPU kernel needs a C++ compiler (c++, g++, clang++ or $CXX)"
NOTHING = torch.empty(0, device="cpu")  # has the address 0
_ADDRESS = Tensor.data_ptr
# Rows, columns and tokens that a product on tiles is tried with: none whole tiles; and what two roundings may cost.
_TRIED, _ROUNDING = (40, 1120, 150), 1e-2
_SMALL = 1 << 16  # weights: below this a second thread costs more than it saves
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
# What `call` takes: the name of a function, tensors [...] contiguous on the CPU, sizes, how many weights it reads. A
# plain tuple, as every small product makes one.
Call = tuple[str, tuple[Tensor, ...], tuple[float, ...], int]
# By the second word of a function's name: addresses, sizes, and at the end threads and level.
ARGUMENTS: dict[str, list[Any]] = {
    "matmul": [_POINTER] * 5 + [_LONG] * 3 + [_INT] * 2,
    "swiglu": [_POINTER] * 6 + [_LONG] * 3 + [_INT] * 2,
    "integer": [_POINTER] * 6 + [_LONG] * 4 + [_INT] * 3,
    "masked": [_POINTER] * 11 + [_LONG] * 4 + [_INT] * 2,
    "expand": [_POINTER] * 5 + [_LONG] * 4 + [_INT] * 2,
    "dense": [_POINTER] * 4 + [_LONG] * 3 + [_INT] * 2,
    "norm": [_POINTER] * 3 + [_LONG] * 2 + [_FLOAT] + [_INT] * 2,
    "residual": [_POINTER] * 5 + [_LONG] * 2 + [_FLOAT] + [_INT] * 2,
    "attend": [_POINTER] * 8 + [_LONG] * 5 + [_FLOAT] + [_INT] * 2,
    "gate": [_POINTER] * 3 + [_LONG] + [_INT] * 2,
    "read": [_POINTER] * 2 + [_LONG] + [_INT] * 2,
    "unpack": [_POINTER] * 3 + [_LONG] * 3 + [_INT] * 2,
    "huge": [_POINTER, _LONG],
    "program": [_POINTER, _LONG, _INT],
}


@cache
def machine_level() -> str | None:
    """The best path of this machine, or None without a library; tiles are beside it (`tiles_work`)."""
    library = load_library()
    return None if library is None else LEVELS[library.sparse24_level()]


@cache
def tiles_work() -> bool:
    """Whether there are AMX tiles, and a product on them is torch's own; said once in the log where it is not."""
    library = load_library()
    if library is None or not library.sparse24_has_tiles():
        return False
    rows, columns, tokens = _TRIED
    generator = torch.Generator().manual_seed(0)
    sizes = ((rows, columns // 2), (tokens, columns))
    values, inputs = (torch.randn(*size, generator=generator).bfloat16() for size in sizes)
    first_two = torch.full((rows, columns // 32), 0x44444444, dtype=torch.int32)  # of every four, as in pack.py
    outputs = torch.empty(tokens, rows, dtype=torch.bfloat16)
    tensors = (values, first_two, inputs, NOTHING, outputs)
    find_function("sparse24_matmul_bf16")(*map(_ADDRESS, tensors), rows, columns, tokens, 1, LEVELS.index("amx"))
    expected = inputs.float().unflatten(1, (-1, 4))[..., :2].flatten(1) @ values.float().T
    error = float((outputs.float() - expected).norm() / expected.norm())
    if not error < _ROUNDING:
        logger.warning("AMX tiles give wrong products here (relative error %.2g): they are not used", error)
    return error < _ROUNDING


def call(name: str, tensors: tuple[Tensor, ...], sizes: tuple[float, ...], weights: int, level: str | None) -> None:
    """[...], ...: run a function of the library on tensors, with threads that fit so many weights.

    tensors: contiguous, on the CPU, unchecked, handed over as addresses, NOTHING as null. level: a path
    of LEVELS, None for the machine's. Raises SparseGPTError for a path that the machine does not have.
    """
    # a small product costs a few microseconds, so each step here counts: map, and a cache with one key
    function, number = at_best_level(name) if level is None else (find_function(name), level_number(level))
    function(*map(_ADDRESS, tensors), *sizes, threads_for(weights), number)


def threads_for(weights: int) -> int:
    """How many threads a call that reads so many weights is worth."""
    return 1 if weights < _SMALL else torch.get_num_threads()


@cache
def at_best_level(name: str) -> tuple[Any, int]:
    """A function of the library and the number of the machine's path."""
    return find_function(name), level_number(best_level())


def best_level() -> str:
    """The best path of this machine, tiles counted; "plain" without a library."""
    return "amx" if tiles_work() else machine_level() or "plain"


@cache
def find_function(name: str) -> Any:
    """A function of the library, or None without one."""
    library = load_library()
    if library is None:
        return None
    function = getattr(library, name)
    function.argtypes = ARGUMENTS[name.split("_")[1]]
    function.restype = None
    return function


def whole_words(inputs: Tensor, columns: int) -> Tensor:
    """[..., K] -> [..., Kp], padded with zeros as packed weights of `columns` = K are."""
    missing = -columns % WORD_COLUMNS
    return functional.pad(inputs, (0, missing)) if missing else inputs


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
    best = LEVELS.index(best_level())
    if level not in LEVELS or LEVELS.index(level) > best:
        raise SparseGPTError(
            f"CPU path: expected one of {', '.join(LEVELS[: best + 1])} on this machine; found {level}"
        )
    return LEVELS.index(level)
