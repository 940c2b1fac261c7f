"""What multiplies by a packed 2:4 weight with int8 or int4 values, in the dtype of the inputs.

    dense      the library's matmul on the weight dequantised for the call, block by block of rows; serves everything
    cpu        C++, bfloat16 inputs, AVX2 or AVX-512: reads the integers
    portable   Triton, int8 and int4            mma_sp   sparse tensor cores, int4

The dense weight is kept nowhere: integers are chosen to save memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsegpt.kernels.cpu import integer24 as on_cpu
from sparsegpt.kernels.cpu.packed24 import unpack_fast
from sparsegpt.kernels.dispatch.dense import dense_route, nowhere
from sparsegpt.kernels.dispatch.route import Route, Table
from sparsegpt.kernels.format.quantized import Quantized24, dequantize
from sparsegpt.kernels.gpu.refusals import refuse_mma_sp, refuse_portable


def _rows_of(weight: Quantized24, rows: slice, out: Tensor | None) -> Tensor:
    return unpack_fast(dequantize(weight.rows(rows), weight.dtype), out=out)


def _refuse_portable(weight: Quantized24) -> str | None:
    return refuse_portable(weight.device, weight.dtype)


def _run_portable(weight: Quantized24, inputs: Tensor, bias: Tensor | None) -> Tensor:
    from sparsegpt.kernels.gpu import portable

    return portable.matmul_integer(weight, inputs, bias)


def _refuse_mma_sp(weight: Quantized24) -> str | None:
    reason = refuse_mma_sp(weight.device, weight.dtype)
    if reason is None and (weight.bits != 4 or weight.group_size % 128):
        return "mma.sp takes int4 values with a group_size divisible by 128"
    return reason


def _prepare_mma_sp(weight: Quantized24) -> Any:
    from sparsegpt.kernels.gpu import mma_sp_int4

    return mma_sp_int4.prepare(weight)


def _run_mma_sp(state: Any, inputs: Tensor, bias: Tensor | None) -> Tensor:
    from sparsegpt.kernels.gpu import mma_sp_int4

    return mma_sp_int4.matmul(state, inputs, bias)


INTEGER24 = Table(
    rows_of=_rows_of,
    values=lambda weight: f"int{weight.bits}",
    routes={
        "dense": dense_route(_rows_of, nowhere, on_the_way=4),  # q * scale in float32
        "cpu": Route(on_cpu.refusal, lambda weight: weight, on_cpu.run, any_shape=True, call=on_cpu.product),
        "portable": Route(_refuse_portable, lambda weight: weight, _run_portable),
        "mma_sp": Route(_refuse_mma_sp, _prepare_mma_sp, _run_mma_sp),
    },
)
