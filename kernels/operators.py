"""Products of packed models as operators of torch: what torch.compile and torch.export put in their graphs.

    sparsegpt::packed_linear   x W^T + b on a packed weight, through the kernel that the layer would choose
    sparsegpt::packed_weight   W itself [N, K], for the gradient of the input
    sparsegpt::dense_linear    x W^T + b on a dense weight, through the CPU kernel where that is quicker

They depend on their arguments alone, so a graph serves every layer of one shape, and an exported program runs wherever
`sparsegpt.kernels.linear` is imported. Eager layers call the kernels without them, which saves some 6 us a call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from . import cpu
from .pack import Packed24
from .quantized import Quantized24, dequantize

if TYPE_CHECKING:
    from .linear import PackedLinear

_LIBRARY = torch.library.Library("sparsegpt", "DEF")
# weight: `PackedLinear.operands`; the integers: `PackedLinear.form`
_FORM = "int in_features, int bits, int group_size"
_LIBRARY.define(f"packed_linear(Tensor input, Tensor[] weight, Tensor? bias, str kernels, {_FORM}) -> Tensor")
_LIBRARY.define(f"packed_weight(Tensor[] weight, ScalarType dtype, {_FORM}) -> Tensor")
_LIBRARY.define("dense_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")

packed_linear: Any = torch.ops.sparsegpt.packed_linear.default
packed_weight: Any = torch.ops.sparsegpt.packed_weight.default
dense_linear: Any = torch.ops.sparsegpt.dense_linear.default

# First tensor of a weight -> what its layer was made for, and where the layer is: as long as that tensor lives.
_layers = WeakTensorKeyDictionary()


def autocast_device(tensor: Tensor) -> str:
    """What to ask autocast for; of a device that it does not know (meta) it changes nothing."""
    kind = tensor.device.type
    return kind if torch.amp.is_autocast_available(kind) else "cpu"


class PackedProduct(torch.autograd.Function):
    """`packed_linear` with a gradient for the input."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, bias: Tensor | None, kernels: str, form: tuple[int, int, int], *weight: Tensor
    ) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        ctx.save_for_backward(*weight)
        ctx.form = form
        output: Tensor = packed_linear(input, list(weight), bias, kernels, *form)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients [..., out_features] of the output -> those of the input."""
        weight_NK = packed_weight(list(ctx.saved_tensors), grads[0].dtype, *ctx.form)
        with torch.autocast(autocast_device(weight_NK), enabled=False):
            input_grads = grads[0] @ weight_NK
        return input_grads, None, None, None, *(None for _ in ctx.saved_tensors)


def introduce(layer: PackedLinear) -> None:
    """Have the operators go through this very layer, with what it has prepared, for its tensors while it lives."""
    _layers[layer.operands[0]] = (_key(layer.operands, layer.bias, layer.kernels, layer.form), weakref.ref(layer))


def _packed_linear(input: Tensor, weight: list[Tensor], bias: Tensor | None, kernels: str, *form: int) -> Tensor:
    key = _key(weight, bias, kernels, form)
    made_for, place = _layers.get(weight[0], (None, None))
    layer = place() if made_for == key else None
    if layer is None:  # an exported program's, say; aliases, as with the key in it the dictionary would never let go
        layer = _layer([part.detach() for part in weight], None if bias is None else bias.detach(), kernels, *form)
        _layers[weight[0]] = (key, lambda kept=layer: kept)
    plan, input = layer.planned(input)
    return plan.multiply(input)


def _key(weight: Sequence[Tensor], bias: Tensor | None, kernels: str, form: tuple[int, ...]) -> tuple[Any, ...]:
    return kernels, *form, None if bias is None else bias.data_ptr(), *map(Tensor.data_ptr, weight)


def _packed_weight(weight: list[Tensor], dtype: torch.dtype, *form: int) -> Tensor:
    packed = _packed(weight, *form)
    return cpu.unpack_fast(packed if isinstance(packed, Packed24) else dequantize(packed, dtype)).to(dtype)


def _dense_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from .dense_layers import serves_linear

    if serves_linear(input, weight, bias):
        return cpu.run_dense(weight, input.contiguous(), bias)
    return functional.linear(input, weight, bias)


def _layer(weight: list[Tensor], bias: Tensor | None, kernels: str, *form: int) -> PackedLinear:
    """A layer on these very tensors."""
    from .linear import Sparse24Linear
    from .quantized_linear import Quantized24Linear

    packed = _packed(weight, *form)
    if isinstance(packed, Packed24):
        return Sparse24Linear.from_packed(packed, bias, kernels=kernels)
    return Quantized24Linear.from_quantized(packed, bias, kernels=kernels)


def _packed(weight: list[Tensor], in_features: int, bits: int, group_size: int) -> Packed24 | Quantized24:
    shape = (weight[0].shape[0], in_features)
    if not bits:
        values, meta = weight
        return Packed24(values, meta, shape)
    words, scales, meta = weight
    return Quantized24(words, scales.view(torch.float16), meta, shape, bits, group_size)


def _outputs(input: Tensor, rows: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], rows)


for _name, _function, _result in (
    ("packed_linear", _packed_linear, lambda input, weight, *_: _outputs(input, weight[0].shape[0])),
    (
        "packed_weight",
        _packed_weight,
        lambda weight, dtype, columns, *_: weight[0].new_empty(weight[0].shape[0], columns, dtype=dtype),
    ),
    ("dense_linear", _dense_linear, lambda input, weight, _: _outputs(input, weight.shape[0])),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsegpt::{_name}", _result)
