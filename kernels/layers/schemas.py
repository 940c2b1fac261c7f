"""The operators' names and signatures, and which layer a weight belongs to: what layers and operators both know.

    sparsegpt::packed_linear   x W^T + b on a packed weight, through the kernel that its layer would choose
    sparsegpt::packed_weight   W itself [N, K], for the gradient of the input
    sparsegpt::dense_linear    x W^T + b on a dense weight, through the CPU kernel where that is quicker

What they compute is in operators.py, which is imported with every layer."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

LIBRARY = torch.library.Library("sparsegpt", "DEF")
# weight: `PackedLinear.operands`; form: `PackedLinear.form_text`
_FORM = "str form, int out_features, int in_features"
LIBRARY.define(f"packed_linear(Tensor input, Tensor[] weight, Tensor? bias, str kernels, {_FORM}) -> Tensor")
LIBRARY.define(f"packed_weight(Tensor[] weight, ScalarType dtype, {_FORM}) -> Tensor")
LIBRARY.define("dense_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")

packed_linear: Any = torch.ops.sparsegpt.packed_linear.default
packed_weight: Any = torch.ops.sparsegpt.packed_weight.default
dense_linear: Any = torch.ops.sparsegpt.dense_linear.default

# The layer that a weight belongs to, by the weight's first tensor, for as long as that lives.
OWNERS = WeakTensorKeyDictionary()


class OnTensors(Protocol):
    """A layer that computes with these tensors."""

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The tensors of its weight [N, K]."""
        ...


def introduce(layer: OnTensors) -> None:
    """Have the operators use this very layer, with what it has prepared, for its tensors while it lives."""
    OWNERS[layer.operands[0]] = weakref.ref(layer)
