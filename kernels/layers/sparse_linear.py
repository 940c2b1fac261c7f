"""A linear layer whose weight stays packed 2:4 with its values as they were (format/pack.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsegpt.kernels.dispatch.packed24 import PACKED24
from sparsegpt.kernels.format.pack import EMPTY_WORD, FloatValues, Packed24, pack, packed_shapes
from sparsegpt.kernels.layers.linear import PackedLinear, Plan
from sparsegpt.kernels.layers.schemas import introduce


class Sparse24Linear(PackedLinear):
    """[..., K] -> [..., N], `torch.nn.Linear` on a packed weight.

    Buffers: values [out, Kp / 2] floating point, meta [out, Kp / 32] int32, bias [out] or None. Inputs, outputs and
    bias have the dtype of `values`; under autocast inputs are cast to it. Created with zeros: load a state dict or use
    `from_linear`. Raises SparseGPTError for in_features not divisible by 4, and on use for a bias of another shape,
    dtype or device.
    """

    table = PACKED24
    values: Tensor
    meta: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kernels: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(FloatValues(), in_features, out_features, kernels)
        values_shape, meta_shape = packed_shapes((out_features, in_features))
        self.register_buffer("values", torch.zeros(values_shape, dtype=dtype, device=device))
        self.register_buffer("meta", torch.full(meta_shape, EMPTY_WORD, dtype=torch.int32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, kernels: str = "auto", name: str = "weight") -> Sparse24Linear:
        """Pack a dense 2:4 layer; raises SparseGPTError naming `name` and the first bad group otherwise."""
        return cls.from_packed(pack(linear.weight.detach(), name), linear.bias, kernels=kernels)

    @classmethod
    def from_packed(cls, packed: Packed24, bias: Tensor | None, *, kernels: str = "auto") -> Sparse24Linear:
        """A layer on the very tensors of a packed weight [N, K] and a bias [N] (no copy)."""
        rows, columns = packed.shape
        layer = cls(columns, rows, bias is not None, kernels=kernels, dtype=packed.dtype, device="meta")
        layer.values, layer.meta = packed.values, packed.meta
        layer.bias = None if bias is None else bias.detach()
        return layer

    @staticmethod
    def for_inputs(packed: Packed24, dtype: torch.dtype) -> Packed24:
        """Packed [N, K] -> the weight itself, whatever the inputs."""
        return packed

    def computes_in(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of `values`."""
        return self.values.dtype

    def plan(self, dtype: torch.dtype | None = None) -> Plan:
        """The plan, of one dtype whatever is asked: as the base class's, a tenth of a small product quicker."""
        # the dictionary itself: a buffer's attribute look-up costs a tenth of a small product
        plan, buffers = self._plan, self._buffers
        values, meta, bias = buffers["values"], buffers["meta"], buffers["bias"]
        last = meta if bias is None else bias
        if (
            plan is None
            or plan.parts[0] is not values
            or plan.parts[1] is not meta
            or plan.parts[-1] is not last
            or plan.written()
        ):
            assert values is not None and meta is not None
            packed = Packed24(values, meta, (self.out_features, self.in_features)).settled()
            parts = (values, meta) if bias is None else (values, meta, bias)
            choice = self.table.choose(packed, self._kernels)
            plan = self._plan = Plan(packed, parts, bias, values.dtype, choice, self.table)
            introduce(self)
        return plan
