"""What multiplies by a packed 2:4 weight with its values as they were.

dense        the library's matmul on the decompressed weight: block by block of rows on a CPU; on a GPU kept, 25/16
             of the dense memory, and 9/16 more for each sparse route that has a form of its own
resident     the same, kept on a CPU too: then many tokens cost what they cost the dense model
cpu          C++, bfloat16 and float32
portable     Triton        mma_sp, wgmma_sp    sparse tensor cores
cutlass, cusparselt        torch's own kernels"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sparsegpt.kernels.cpu import packed24 as on_cpu
from sparsegpt.kernels.dispatch.dense import dense_route, everywhere, off_cpu
from sparsegpt.kernels.dispatch.route import Route, Table
from sparsegpt.kernels.format.pack import Packed24
from sparsegpt.kernels.gpu import semi_structured
from sparsegpt.kernels.gpu.fragments import Fragments, to_fragments
from sparsegpt.kernels.gpu.refusals import Refusal, refuse_mma_sp, refuse_portable, refuse_wgmma_sp

# The fused gated product gained over two products and torch's silu for one token, and lost from eight on.
_CPU_SWIGLU_TOKENS = 1


def _rows_of(weight: Packed24, rows: slice, out: Tensor | None) -> Tensor:
    return on_cpu.unpack_fast(weight.rows(rows), out=out)


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
    return lambda weight: refuse(weight.device, weight.dtype)


PACKED24 = Table(
    rows_of=_rows_of,
    values=lambda weight: "",
    routes={
        "dense": dense_route(_rows_of, off_cpu),
        "resident": dense_route(_rows_of, everywhere),
        "cpu": Route(
            on_cpu.refusal,
            on_cpu.prepare,
            on_cpu.run,
            on_cpu.run_swiglu,
            any_shape=True,
            swiglu_tokens=_CPU_SWIGLU_TOKENS,
            call=on_cpu.product,
            gated_call=on_cpu.gated_product,
        ),
        "portable": Route(_asks(refuse_portable), lambda weight: weight, _run_portable, _swiglu_portable),
        "mma_sp": Route(_asks(refuse_mma_sp), to_fragments, _run_mma_sp, _swiglu_mma_sp),
        "wgmma_sp": Route(_asks(refuse_wgmma_sp), to_fragments, _run_wgmma_sp),
        "cutlass": Route(semi_structured.refuse_cutlass, semi_structured.prepare_cutlass, semi_structured.run_cutlass),
        "cusparselt": Route(
            semi_structured.refuse_cusparselt, semi_structured.prepare_cusparselt, semi_structured.run_cusparselt
        ),
    },
)
