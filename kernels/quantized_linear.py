"""A linear layer whose weight stays packed 2:4 with int8 or int4 values: y = x W^T + b, W = q * scale (quantized.py).

The layer computes in the dtype of its inputs. Routes, by device and dtype:

    cpu        C++, bfloat16 inputs, AVX-512: reads the integers
    portable   Triton, int8 and int4            mma_sp   sparse tensor cores, int4
    dense      the weight dequantised for the call, block by block of rows; serves everything

Scales lie in an int16 buffer as float16 bit patterns, so that casting a model leaves them alone. Storing integers
rounds to nearest: it is storage, not a quantising solver, and costs what rounding costs."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError

from . import cpu
from .dispatch import (
    BLOCK_BYTES,
    Choice,
    Route,
    asked_for,
    dense_weight,
    from_measured,
    refuse_mma_sp,
    refuse_portable,
)
from .linear import PackedLinear, Plan
from .measured import find
from .operators import introduce
from .pack import packed_shapes
from .quantized import Quantized24, dequantize

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Typed24:
    """An integer weight and the dtype that it is multiplied in."""

    weight: Quantized24
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the dense weight."""
        return self.weight.shape


class Quantized24Linear(PackedLinear):
    """`torch.nn.Linear` on a packed weight with integer values.

    Buffers: words [out, Kp / 2 * bits / 32] int32, scales [out, ceil(Kp / group_size)] int16 (float16 bits), meta
    [out, Kp / 32] int32, bias [out] or None. Inputs in bfloat16, float16 or float32 give outputs in their dtype.
    Created with zeros. Raises SparseGPTError for in_features not divisible by 4, other bits or a bad group_size.
    """

    words: Tensor
    scales: Tensor
    meta: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int,
        group_size: int = 128,
        kernels: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, kernels)
        self.bits, self.group_size = bits, group_size
        (_, kept), meta_shape = packed_shapes((out_features, in_features))
        words_shape, scales_shape = (out_features, kept * bits // 32), (out_features, -(-2 * kept // group_size))
        self.register_buffer("words", torch.zeros(words_shape, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.zeros(scales_shape, dtype=torch.int16, device=device))
        self.register_buffer("meta", torch.full(meta_shape, 0x44444444, dtype=torch.int32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        _ = self.quantized  # refuses what does not belong together

    @classmethod
    def from_quantized(cls, weight: Quantized24, bias: Tensor | None, *, kernels: str = "auto") -> Quantized24Linear:
        """A layer on these very tensors (no copy)."""
        (rows, columns), bits, group_size = weight.shape, weight.bits, weight.group_size
        layer = cls(columns, rows, bias is not None, bits=bits, group_size=group_size, kernels=kernels, device="meta")
        layer.words, layer.scales, layer.meta = weight.words, weight.scales.view(torch.int16), weight.meta
        layer.bias = None if bias is None else bias.detach()
        return layer

    @property
    def quantized(self) -> Quantized24:
        """The weight with its integers (the buffers themselves)."""
        shape = (self.out_features, self.in_features)
        scales = self.scales.view(torch.float16)
        return Quantized24(self.words, scales, self.meta, shape, self.bits, self.group_size)

    def extra_repr(self) -> str:
        """Shape, bias, bits and kernels, for printing."""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """words, scales and meta."""
        return self.words, self.scales, self.meta

    @property
    def form(self) -> tuple[int, int, int]:
        """in_features, bits, group_size."""
        return self.in_features, self.bits, self.group_size

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """That of the inputs."""
        return dtype

    def plan(self, dtype: torch.dtype | None = None) -> Plan:
        """The plan for a dtype, by default the bias's or bfloat16; raises SparseGPTError for one that it cannot be."""
        plan, bias = self._plan, self._buffers["bias"]
        parts = tuple(t for name in ("words", "scales", "meta", "bias") if (t := self._buffers[name]) is not None)
        same = plan is not None and len(parts) == len(plan.parts) and all(map(operator.is_, plan.parts, parts))
        if plan is None or not same or (dtype is not None and dtype != plan.dtype) or plan.written():
            if dtype is None:
                dtype = torch.bfloat16 if bias is None else bias.dtype
            if dtype not in _DTYPES:
                raise SparseGPTError(
                    f"a layer of int{self.bits} values takes bfloat16, float16 or float32; found inputs in {dtype}"
                )
            weight = Typed24(self.quantized.contiguous(), dtype)
            given = None if bias is None else bias.to(dtype)
            plan = Plan(weight, parts, given, dtype, choose_integer(weight, self.kernels), INTEGER_ROUTES, _dense)
            self._plan = plan
            introduce(self)
        return plan


def choose_integer(weight: Typed24, kernels: str = "auto") -> Choice:
    """The route for an integer weight; raises SparseGPTError for one that cannot serve it."""
    if kernels == "auto":
        whole = weight.weight
        measured = find(whole.words.device, weight.dtype, f"int{whole.bits}", whole.shape[0] * whole.shape[1])
        return from_measured(measured, weight, INTEGER_ROUTES)
    if kernels not in INTEGER_ROUTES:
        raise SparseGPTError(f"kernels={kernels} does not take int{weight.weight.bits} values; use --kernels auto")
    return asked_for(kernels, weight, INTEGER_ROUTES)


def _dense(weight: Typed24) -> Tensor:
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
    from . import portable

    return portable.matmul_integer(weight.weight, inputs, bias)


def _refuse_mma_sp(weight: Typed24) -> str | None:
    reason = refuse_mma_sp(weight.weight.words.device, weight.dtype)
    if reason is None and (weight.weight.bits != 4 or weight.weight.group_size % 128):
        return "mma.sp takes int4 values with a group_size divisible by 128"
    return reason


def _prepare_mma_sp(weight: Typed24) -> Any:
    from . import mma_sp_int4

    return mma_sp_int4.prepare(weight.weight)


def _run_mma_sp(state: Any, inputs: Tensor, bias: Tensor | None) -> Tensor:
    from . import mma_sp_int4

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
