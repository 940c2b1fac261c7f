"""Questions that a layer asks before a kernel serves it: of its input, of autocast, of a module's own code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch


def is_plain(input: Tensor) -> bool:
    """[...] -> whether a kernel may go by the address of an input and return its result unseen.

    Not for tensors of other classes, wrapped by a transform or lazily negated, nor while somebody compiles, traces,
    intercepts what is computed (fake tensors, say) or takes forward derivatives.
    """
    # what torch 2.11 to 2.13 keeps to itself: of the public ways to ask each costs a multiple, or there is none
    return (
        not torch.compiler.is_compiling()
        and type(input) in (Tensor, nn.Parameter)
        and not input.is_neg()
        and not _python_dispatch.is_in_torch_dispatch_mode()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    )


def has_tangent(input: Tensor) -> bool:
    """[...] -> whether forward derivatives are taken through an input."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(input).tangent is not None


def autocast_device(tensor: Tensor) -> str:
    """[...] -> the kind of device to ask autocast about; "cpu" for one that it does not know, such as meta."""
    kind = tensor.device.type
    return kind if torch.amp.is_autocast_available(kind) else "cpu"


def same_code(forward: Any, reference: Any) -> bool:
    """Whether two functions are the same instructions on the same names and constants, docstrings aside."""
    code, expected = getattr(forward, "__code__", None), reference.__code__
    if code is None or _constants(forward) != _constants(reference):
        return False
    return all(getattr(code, part) == getattr(expected, part) for part in ("co_code", "co_names", "co_varnames"))


def _constants(function: Any) -> tuple[Any, ...]:
    first, *others = function.__code__.co_consts or (None,)
    return (None if first == function.__doc__ else first, *others)
