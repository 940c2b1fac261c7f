"""A linear layer whose weight stays packed 2:4 with int8 or int4 values: y = x W^T + b, W = q * scale (quantized.py).

The layer computes in the dtype of its inputs. Scales lie in an int16 buffer as float16 bit patterns, so that casting a
model leaves them alone. Storing integers rounds to nearest: it is storage, not a quantising solver, and costs what
rounding costs."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.dispatch.integer24 import INTEGER_ROUTES, choose_integer, dense_integer
from sparsegpt.kernels.format.pack import packed_shapes
from sparsegpt.kernels.format.quantized import INTEGER_DTYPES, Quantized24, Typed24
from sparsegpt.kernels.layers.linear import PackedLinear, Plan
from sparsegpt.kernels.layers.schemas import introduce


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
            if dtype not in INTEGER_DTYPES:
                raise SparseGPTError(
                    f"a layer of int{self.bits} values takes bfloat16, float16 or float32; found inputs in {dtype}"
                )
            weight = Typed24(self.quantized.contiguous(), dtype)
            given = None if bias is None else bias.to(dtype)
            plan = Plan(
                weight, parts, given, dtype, choose_integer(weight, self.kernels), INTEGER_ROUTES, dense_integer
            )
            self._plan = plan
            introduce(self)
        return plan
