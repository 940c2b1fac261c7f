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

from collections.abc import Callable

from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels import cpu
from sparsegpt.kernels.dispatch.dense import dense_weight, prepare_dense, run_dense
from sparsegpt.kernels.dispatch.measured import find
from sparsegpt.kernels.dispatch.route import Choice, Route, asked_for, from_measured
from sparsegpt.kernels.format.pack import Packed24
from sparsegpt.kernels.gpu import semi_structured
from sparsegpt.kernels.gpu.fragments import Fragments, to_fragments
from sparsegpt.kernels.gpu.refusals import Refusal, refuse_mma_sp, refuse_portable, refuse_wgmma_sp

_CPU_SWIGLU_TOKENS = 1  # 1.02 to 1.07 times two products and torch's silu; from 8 tokens on it was slower


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


def _run_portable(weight: Packed24, inputs: Tensor, bias: Tensor | None) -> Tensor:
    from sparsegpt.kernels.gpu import portable

    return portable.matmul(weight, inputs, bias)


def _swiglu_portable(gate: Packed24, up: Packed24, inputs: Tensor) -> Tensor:
    from sparsegpt.kernels.gpu import portable

    return portable.swiglu(gate, up, inputs)


def _run_mma_sp(weight: Fragments, inputs: Tensor, bias: Tensor | None) -> Tensor:
    from sparsegpt.kernels.gpu import mma_sp

    return mma_sp.matmul(weight, inputs, bias)


def _swiglu_mma_sp(gate: Fragments, up: Fragments, inputs: Tensor) -> Tensor:
    from sparsegpt.kernels.gpu import mma_sp

    return mma_sp.swiglu(gate, up, inputs)


def _run_wgmma_sp(weight: Fragments, inputs: Tensor, bias: Tensor | None) -> Tensor:
    from sparsegpt.kernels.gpu import wgmma_sp

    return wgmma_sp.matmul(weight, inputs, bias)


def _asks(refuse: Refusal) -> Callable[[Packed24], str | None]:
    return lambda weight: refuse(weight.values.device, weight.values.dtype)


ROUTES: dict[str, Route] = {
    "dense": Route(lambda weight: None, prepare_dense, run_dense),
    "resident": Route(lambda weight: None, dense_weight, run_dense),
    "cpu": Route(cpu.refusal, cpu.prepare, cpu.run, cpu.run_swiglu, any_shape=True, swiglu_tokens=_CPU_SWIGLU_TOKENS),
    "portable": Route(_asks(refuse_portable), lambda weight: weight, _run_portable, _swiglu_portable),
    "mma_sp": Route(_asks(refuse_mma_sp), to_fragments, _run_mma_sp, _swiglu_mma_sp),
    "wgmma_sp": Route(_asks(refuse_wgmma_sp), to_fragments, _run_wgmma_sp),
    "cutlass": Route(semi_structured.refuse_cutlass, semi_structured.prepare_cutlass, semi_structured.run_cutlass),
    "cusparselt": Route(
        semi_structured.refuse_cusparselt, semi_structured.prepare_cusparselt, semi_structured.run_cusparselt
    ),
}
KERNELS = ("auto", *ROUTES)
