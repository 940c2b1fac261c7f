"""Routes for packed 2:4 weights with int8 or int4 values, multiplied in the dtype of the inputs.

cpu        C++, bfloat16 inputs, AVX-512: reads the integers
portable   Triton, int8 and int4            mma_sp   sparse tensor cores, int4
dense      the weight dequantised for the call, block by block of rows; serves everything"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels import cpu
from sparsegpt.kernels.dispatch.dense import BLOCK_BYTES, dense_weight
from sparsegpt.kernels.dispatch.measured import find
from sparsegpt.kernels.dispatch.route import Choice, Route, asked_for, from_measured
from sparsegpt.kernels.format.quantized import Quantized24, Typed24, dequantize
from sparsegpt.kernels.gpu.refusals import refuse_mma_sp, refuse_portable


def choose_integer(weight: Typed24, kernels: str = "auto") -> Choice:
    """The route for an integer weight; raises SparseGPTError for one that cannot serve it."""
    if kernels == "auto":
        whole = weight.weight
        measured = find(whole.words.device, weight.dtype, f"int{whole.bits}", whole.shape[0] * whole.shape[1])
        return from_measured(measured, weight, INTEGER_ROUTES)
    if kernels not in INTEGER_ROUTES:
        raise SparseGPTError(f"kernels={kernels} does not take int{weight.weight.bits} values; use --kernels auto")
    return asked_for(kernels, weight, INTEGER_ROUTES)


def dense_integer(weight: Typed24) -> Tensor:
    """The dense weight [N, K] in the dtype that it is multiplied in."""
    return dense_weight(dequantize(weight.weight, weight.dtype))


def _run_dense(weight: Typed24, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Blocks of rows, so that the dense weight is never whole in memory."""
    (rows, columns), whole = weight.shape, weight.weight
    block = max(1, BLOCK_BYTES // max(1, 4 * columns))  # float32 on the way
    outputs = inputs.new_empty(inputs.shape[0], rows)
    for start in range(0, rows, block):
        part = slice(start, min(start + block, rows))
        fields = (whole.words[part], whole.scales[part], whole.meta[part], (part.stop - start, columns))
        dense_NK = dense_weight(dequantize(Quantized24(*fields, whole.bits, whole.group_size), weight.dtype))
        outputs[:, part] = functional.linear(inputs, dense_NK, None if bias is None else bias[part])
    return outputs


def _refuse_portable(weight: Typed24) -> str | None:
    return refuse_portable(weight.weight.words.device, weight.dtype)


def _run_portable(weight: Typed24, inputs: Tensor, bias: Tensor | None) -> Tensor:
    from sparsegpt.kernels.gpu import portable

    return portable.matmul_integer(weight.weight, inputs, bias)


def _refuse_mma_sp(weight: Typed24) -> str | None:
    reason = refuse_mma_sp(weight.weight.words.device, weight.dtype)
    if reason is None and (weight.weight.bits != 4 or weight.weight.group_size % 128):
        return "mma.sp takes int4 values with a group_size divisible by 128"
    return reason


def _prepare_mma_sp(weight: Typed24) -> Any:
    from sparsegpt.kernels.gpu import mma_sp_int4

    return mma_sp_int4.prepare(weight.weight)


def _run_mma_sp(state: Any, inputs: Tensor, bias: Tensor | None) -> Tensor:
    from sparsegpt.kernels.gpu import mma_sp_int4

    return mma_sp_int4.matmul(state, inputs, bias)


def _run_cpu(weight: Typed24, inputs: Tensor, bias: Tensor | None) -> Tensor:
    return cpu.run_integer(weight.weight, inputs, bias)


INTEGER_ROUTES: dict[str, Route] = {
    "dense": Route(lambda weight: None, lambda weight: weight, _run_dense),
    "cpu": Route(
        lambda weight: cpu.refuse_integer(weight.weight, weight.dtype), lambda weight: weight, _run_cpu, any_shape=True
    ),
    "portable": Route(_refuse_portable, lambda weight: weight, _run_portable),
    "mma_sp": Route(_refuse_mma_sp, _prepare_mma_sp, _run_mma_sp),
}
