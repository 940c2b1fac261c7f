"""What multiplies by a packed weight of any pattern: a bitmask, with its values as they were or as integers.

dense       the library's matmul on the weight decompressed for the call, block by block of rows; on a GPU kept where
            the values are as they were
resident    the same, kept on a CPU too
cpu         C++, bfloat16 and float32
portable    Triton"""

from __future__ import annotations

from torch import Tensor

from sparsegpt.kernels.cpu import bitmask as on_cpu
from sparsegpt.kernels.dispatch.dense import dense_route, everywhere, nowhere, off_cpu
from sparsegpt.kernels.dispatch.route import Route, Table
from sparsegpt.kernels.gpu.refusals import refuse_portable


def _rows_of(weight: on_cpu.Masked, rows: slice, out: Tensor | None) -> Tensor:
    return on_cpu.unpack_fast(weight.rows(rows), out=out)


def _refuse_portable(weight: on_cpu.Masked) -> str | None:
    return refuse_portable(weight.device, weight.dtype)


def _run_portable(weight: on_cpu.Masked, inputs: Tensor, bias: Tensor | None) -> Tensor:
    from sparsegpt.kernels.gpu import bitmask

    return bitmask.matmul(weight, inputs, bias)


def _swiglu_portable(gate: on_cpu.Masked, up: on_cpu.Masked, inputs: Tensor) -> Tensor:
    from sparsegpt.kernels.gpu import bitmask

    return bitmask.swiglu(gate, up, inputs)


_PORTABLE = Route(_refuse_portable, lambda weight: weight, _run_portable, _swiglu_portable)
_CPU = Route(
    on_cpu.refusal,
    on_cpu.prepare,
    on_cpu.run,
    on_cpu.run_swiglu,
    any_shape=True,
    call=on_cpu.product,
    gated_call=on_cpu.gated_product,
)

BITMASK = Table(
    rows_of=_rows_of,
    values=lambda weight: "bitmask",
    routes={
        "dense": dense_route(_rows_of, off_cpu),
        "resident": dense_route(_rows_of, everywhere),
        "cpu": _CPU,
        "portable": _PORTABLE,
    },
)

BITMASK_INTEGERS = Table(
    rows_of=_rows_of,
    values=lambda weight: f"bitmask int{weight.bits}",
    routes={
        "dense": dense_route(_rows_of, nowhere, on_the_way=4),  # q * scale in float32, where torch decompresses
        "cpu": _CPU,
        "portable": _PORTABLE,
    },
)
