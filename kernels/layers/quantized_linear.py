"""A linear layer whose weight stays packed 2:4 with int8 or int4 values: W = q * scale (format/quantized.py).

The layer computes in the dtype of its inputs. Scales lie in an int16 buffer as float16 bit patterns, so that casting a
model leaves them alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.dispatch.integer24 import INTEGER24
from sparsegpt.kernels.format.pack import EMPTY_WORD, packed_shapes
from sparsegpt.kernels.format.quantized import IntegerValues, Quantized24
from sparsegpt.kernels.layers.linear import PackedLinear

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of inputs


class IntegerLinear(PackedLinear):
    """[..., K] -> [..., N] with integer values: inputs in bfloat16, float16 or float32 give outputs in their dtype."""

    form: Any  # of integers

    @staticmethod
    def for_inputs(packed: Any, dtype: torch.dtype) -> Any:
        """Packed [N, K] -> it with the dtype of the inputs."""
        return replace(packed, dtype=dtype)

    def computes_in(self, dtype: torch.dtype | None) -> torch.dtype:
        """That of the inputs, by default the bias's or the weights'. Raises SparseGPTError for others than _DTYPES."""
        if dtype is None:
            dtype = self.form.dtype if self.bias is None else self.bias.dtype
        if dtype not in _DTYPES:
            raise SparseGPTError(f"a layer of {self.form} takes bfloat16, float16 or float32; found inputs in {dtype}")
        return dtype

    def bias_in(self, dtype: torch.dtype) -> Tensor | None:
        """The bias [N] cast to `dtype`."""
        return None if self.bias is None else self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Shape, bias, kernels, bits and group size, for printing."""
        return f"{super().extra_repr()}, {self.form}"


class Quantized24Linear(IntegerLinear):
    """[..., K] -> [..., N], `torch.nn.Linear` on a packed weight with integer values.

    Buffers: words [out, Kp / 2 * bits / 32] int32, scales [out, ceil(Kp / group_size)] int16 (float16 bits), meta
    [out, Kp / 32] int32, bias [out] or None. Created with zeros. Raises SparseGPTError for in_features not divisible
    by 4, other bits or a bad group_size.
    """

    table = INTEGER24
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
        form = IntegerValues(bits, group_size) if dtype is None else IntegerValues(bits, group_size, dtype)
        super().__init__(form, in_features, out_features, kernels)
        (_, kept), meta_shape = packed_shapes((out_features, in_features))
        words_shape, scales_shape = (out_features, kept * bits // 32), (out_features, -(-2 * kept // group_size))
        self.register_buffer("words", torch.zeros(words_shape, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.zeros(scales_shape, dtype=torch.int16, device=device))
        self.register_buffer("meta", torch.full(meta_shape, EMPTY_WORD, dtype=torch.int32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_packed(cls, packed: Quantized24, bias: Tensor | None, *, kernels: str = "auto") -> Quantized24Linear:
        """A layer on the very tensors of a packed weight [N, K] and a bias [N] (no copy)."""
        (rows, columns), settings = packed.shape, {"bits": packed.bits, "group_size": packed.group_size}
        layer = cls(columns, rows, bias is not None, **settings, kernels=kernels, dtype=packed.dtype, device="meta")
        layer.words, layer.scales, layer.meta = layer.form.tensors(packed)
        layer.bias = None if bias is None else bias.detach()
        return layer
