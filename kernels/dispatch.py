"""Which kernel computes x W^T for a packed 2:4 weight: routes, the measured table, and the choice.

    few tokens, and many where one wins there: the sparse route that won on this kind of device, dtype and size
    else: dense, the library's matmul on the weight decompressed for the call (on a CPU block by block of rows, so that
        the dense weight never leaves the cache; on a GPU it is decompressed once and kept, 25/16 of the dense memory,
        and 9/16 more for each sparse route that has a form of its own)
    asked for by `resident`: as above, but the dense weight is decompressed once and kept on a CPU as well, 25/16 of the
        dense memory in 16 bits; then many tokens cost what they cost the dense model

Dense is always a candidate. A sparse route is chosen by itself only where a row of the table says that it was faster
(measured.py). The shipped table has no row of a GPU yet: there the automatic choice is dense until `sparsegpt tune` has
measured, and the sparse routes are taken when asked for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError

from . import cpu, semi_structured
from .fragments import Fragments, to_fragments
from .measured import ANY, Measured, Step, find, in_words
from .pack import Packed24

# Why kernels cannot multiply in a dtype on a device, or None.
Refusal = Callable[[torch.device, torch.dtype], str | None]

_TILE_ROWS = 64
_CPU_SWIGLU_TOKENS = 1  # 1.02 to 1.07 times two products and torch's silu; from 8 tokens on it was slower
BLOCK_BYTES = 1 << 23  # of dense weight decompressed at a time on a CPU: what a last-level cache holds


@dataclass(frozen=True)
class Route:
    """One way to multiply.

    Attributes:
        refusal: why this route cannot serve a weight (device, dtype, shape, missing tool), or None.
        prepare: the state kept beside the weight, made on first use.
        run: (state, inputs [T, K] contiguous, bias [N] or None) -> outputs [T, N].
        swiglu: (state of gate, state of up, inputs [T, K] contiguous) -> silu(x gate^T) * (x up^T) [T, N], where the
            route has such a kernel; used up to `swiglu_tokens` tokens.
        any_shape: run and swiglu take contiguous inputs [..., K] of any number of dimensions.
    """

    refusal: Callable[[Any], str | None]  # Any: a packed weight, or the form that a layer of integers has
    prepare: Callable[[Any], Any]
    run: Callable[[Any, Tensor, Tensor | None], Tensor]
    swiglu: Callable[[Any, Any, Tensor], Tensor] | None = None
    any_shape: bool = False
    swiglu_tokens: int = ANY


@dataclass(frozen=True)
class Choice:
    """Which route serves how many tokens: ascending steps, the last without a limit. `why` is a clause for the user."""

    steps: tuple[Step, ...]
    why: str

    def route(self, tokens: int) -> str:
        """The route for so many tokens."""
        for limit, route in self.steps:  # asked for every product: a generator would cost more
            if tokens <= limit:
                return route
        return self.steps[-1][1]

    def __str__(self) -> str:
        return f"{in_words(self.steps)} ({self.why})"


def asked_for(name: str, weight: Any, routes: Mapping[str, Route]) -> Choice:
    """One route for every call; raises SparseGPTError for one that cannot serve this weight."""
    reason = routes[name].refusal(weight)
    if reason is not None:
        raise SparseGPTError(f"kernels={name}: {reason}; use --kernels auto or dense")
    return Choice(((ANY, name),), "asked for")


def choose(weight: Packed24, kernels: str = "auto") -> Choice:
    """The route for a weight.

    Raises:
        SparseGPTError: `kernels` is not one of KERNELS, or names a route that cannot serve this weight.
    """
    if kernels in ("auto", "resident"):
        measured = find(weight.values.device, weight.values.dtype, "", weight.shape[0] * weight.shape[1])
        return from_measured(measured, weight, ROUTES, "dense" if kernels == "auto" else kernels)
    if kernels not in ROUTES:
        raise SparseGPTError(f"kernels: expected one of {', '.join(KERNELS)}; found {kernels!r}")
    return asked_for(kernels, weight, ROUTES)


def from_measured(measured: Measured | None, weight: Any, routes: Mapping[str, Route], dense: str = "dense") -> Choice:
    """The choice that a row of measurements gives; a route that cannot serve this weight leaves its place to dense."""
    if measured is None:
        able = any(route.refusal(weight) is None for name, route in routes.items() if name not in ("dense", "resident"))
        why = (
            "no kernel measured here yet; `python -m sparsegpt tune` measures" if able else "no sparse kernel serves it"
        )
        return Choice(((ANY, dense),), why)
    steps: list[Step] = []
    for limit, name in measured.closed(dense):
        serves = name in routes and routes[name].refusal(weight) is None
        route = name if serves else dense
        if steps and steps[-1][1] == route:
            steps.pop()
        steps.append((limit, route))
    if len(steps) == 1 and steps[0][1] == dense:
        return Choice(tuple(steps), f"no sparse kernel was faster on {measured.path}")
    gain = ""
    if measured.winner in {route for _, route in steps}:
        gain = f"{measured.ratio} times the library's dense product "
    return Choice(tuple(steps), f"measured {gain}on {measured.path}")


def dense_weight(weight: Packed24) -> Tensor:
    """The decompressed weight [N, K]."""
    return cpu.unpack_fast(weight)


def _prepare_dense(weight: Packed24) -> Packed24 | Tensor:
    return weight if weight.values.device.type == "cpu" else dense_weight(weight)


def block_rows(row_bytes: int) -> int:
    """Rows decompressed at a time: whole tiles of the library's product, which loses on odd numbers of rows."""
    return max(1, BLOCK_BYTES // max(1, row_bytes) // _TILE_ROWS) * _TILE_ROWS


def _run_dense(weight: Packed24 | Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Tensor):
        return functional.linear(inputs, weight, bias)
    rows, columns = weight.shape
    block = block_rows(columns * inputs.itemsize)
    if rows <= block:
        return functional.linear(inputs, dense_weight(weight), bias)
    outputs = inputs.new_empty(inputs.shape[0], rows)
    buffer = inputs.new_empty(block, columns)
    for start in range(0, rows, block):
        part = slice(start, min(start + block, rows))
        packed = Packed24(weight.values[part], weight.meta[part], (part.stop - start, columns))
        weight_NK = cpu.unpack_fast(packed, out=buffer[: part.stop - start])
        outputs[:, part] = functional.linear(inputs, weight_NK, None if bias is None else bias[part])
    return outputs


def refuse_portable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the portable Triton kernels cannot multiply in `dtype` on a device, or None."""
    if device.type not in ("cuda", "xpu"):
        return f"Triton kernels need a GPU; the weight is on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return "bfloat16 in Triton needs compute capability 8.0 (Ampere) or newer; load the model in float16"
    return None


def _run_portable(weight: Packed24, inputs: Tensor, bias: Tensor | None) -> Tensor:
    from . import portable

    return portable.matmul(weight, inputs, bias)


def _swiglu_portable(gate: Packed24, up: Packed24, inputs: Tensor) -> Tensor:
    from . import portable

    return portable.swiglu(gate, up, inputs)


def _gluon_refusal(instruction: str, module: str) -> Refusal:
    """What a module of Gluon kernels says, which is imported only where there is a GPU and Triton."""

    def refuse(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda" or importlib.util.find_spec("triton") is None:
            return f"{instruction} needs an NVIDIA GPU and Triton; the weight is on {device.type}"
        reason: str | None = importlib.import_module(f".{module}", __package__).refuse(device, dtype)
        return reason

    return refuse


refuse_mma_sp = _gluon_refusal("mma.sp", "mma_sp")


def _run_mma_sp(weight: Fragments, inputs: Tensor, bias: Tensor | None) -> Tensor:
    from . import mma_sp

    return mma_sp.matmul(weight, inputs, bias)


def _swiglu_mma_sp(gate: Fragments, up: Fragments, inputs: Tensor) -> Tensor:
    from . import mma_sp

    return mma_sp.swiglu(gate, up, inputs)


def _run_wgmma_sp(weight: Fragments, inputs: Tensor, bias: Tensor | None) -> Tensor:
    from . import wgmma_sp

    return wgmma_sp.matmul(weight, inputs, bias)


def _asks(refuse: Refusal) -> Callable[[Packed24], str | None]:
    return lambda weight: refuse(weight.values.device, weight.values.dtype)


ROUTES: dict[str, Route] = {
    "dense": Route(lambda weight: None, _prepare_dense, _run_dense),
    "resident": Route(lambda weight: None, dense_weight, _run_dense),
    "cpu": Route(cpu.refusal, cpu.prepare, cpu.run, cpu.run_swiglu, any_shape=True, swiglu_tokens=_CPU_SWIGLU_TOKENS),
    "portable": Route(_asks(refuse_portable), lambda weight: weight, _run_portable, _swiglu_portable),
    "mma_sp": Route(_asks(refuse_mma_sp), to_fragments, _run_mma_sp, _swiglu_mma_sp),
    "wgmma_sp": Route(_asks(_gluon_refusal("wgmma.sp", "wgmma_sp")), to_fragments, _run_wgmma_sp),
    "cutlass": Route(semi_structured.refuse_cutlass, semi_structured.prepare_cutlass, semi_structured.run_cutlass),
    "cusparselt": Route(
        semi_structured.refuse_cusparselt, semi_structured.prepare_cusparselt, semi_structured.run_cusparselt
    ),
}
KERNELS = ("auto", *ROUTES)
