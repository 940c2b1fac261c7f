"""Calls of the library run one after another in one go, by threads that are started once (program.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.cpu.build import load_library
from sparsegpt.kernels.cpu.library import ARGUMENTS, Call, at_best_level, find_function, threads_for

_POINTERS, _SIZES = 11, 5  # at most, of a call


class _Call(ctypes.Structure):
    """A call as program.cpp reads it."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("pointers", "sizes", "reals", "wholes", "waits")),
        ("pointer", ctypes.c_int64 * _POINTERS),
        ("size", ctypes.c_int64 * _SIZES),
        *((name, ctypes.c_int32) for name in ("whole", "threads", "level")),
        ("real", ctypes.c_float),
    )


_WORDS = ctypes.sizeof(_Call) // 8


class Program:
    """Calls [(waits, call), ...] on tensors [...], with the threads that torch now has. waits: for all calls before it.

    Tensors of a call may be exchanged: `places` says where a tensor's address stands, `words[place]` is that address.
    Raises SparseGPTError without a library, and for a function whose arguments a program does not take.
    """

    def __init__(self, calls: Sequence[tuple[bool, Call]]) -> None:
        self.threads = torch.get_num_threads()
        self._held = [call for _, call in calls]  # the tensors must live
        self._calls = (_Call * len(calls))(*(_in_words(waits, call) for waits, call in calls))
        self.words = (ctypes.c_int64 * (_WORDS * len(calls))).from_buffer(self._calls)
        self._function = find_function("sparse24_program")
        self._arguments = (ctypes.addressof(self._calls), len(calls), self.threads)

    def run(self) -> None:
        """Run the calls."""
        self._function(*self._arguments)

    def places(self, tensor: Tensor, calls: range) -> tuple[int, ...]:
        """[...] -> the places in `words` that hold its address, in calls with these numbers."""
        address = tensor.data_ptr()
        first = [_WORDS * index + _Call.pointer.offset // 8 for index in calls]
        return tuple(
            place for start in first for place in range(start, start + _POINTERS) if self.words[place] == address
        )

    def place_of_size(self, index: int, number: int) -> int:
        """The place of a call's size, by its number."""
        return _WORDS * index + _Call.size.offset // 8 + number


def _in_words(waits: bool, call: Call) -> _Call:
    library = load_library()
    if library is None:
        raise SparseGPTError("a program of calls needs the CPU library, and there is no compiler to build it")
    name, tensors, numbers, weights = call
    function, level = at_best_level(name)
    address = ctypes.cast(function, ctypes.c_void_p).value
    kinds = ARGUMENTS[name.split("_")[1]][len(tensors) : -2]
    sizes, reals, wholes = (
        [value for value, its in zip(numbers, kinds, strict=True) if its is kind]
        for kind in (ctypes.c_int64, ctypes.c_float, ctypes.c_int)
    )
    made = _Call(address, len(tensors), len(sizes), len(reals), len(wholes), waits)
    made.pointer[: len(tensors)] = [tensor.data_ptr() for tensor in tensors]
    made.size[: len(sizes)] = sizes
    made.real, made.whole = sum(reals), sum(wholes)  # one of a kind, or none
    made.threads, made.level = threads_for(weights), level
    if not library.sparse24_takes(ctypes.byref(made)):
        raise SparseGPTError(f"a program takes no call of {name}: its signature is not in program.cpp")
    return made
