"""Products of packed models as operators of torch: what torch.compile and torch.export put in their graphs.

The operators (schemas.py) get their implementations here: the kernel, the shape of its result, the gradient. Results
depend on the arguments alone: a graph serves every layer of one shape, and an exported program runs wherever
`sparsegpt.kernels.layers` is imported. Layers call the kernels themselves, as going through an operator costs more than
a small product, as long as an input is plain memory and nobody but autograd watches (`plain.is_plain`).

Dimension key: N out_features, K in_features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from sparsegpt.kernels.cpu import dense as on_cpu
from sparsegpt.kernels.layers.dense_layers import serves_linear
from sparsegpt.kernels.layers.forms import form_of, layer_class
from sparsegpt.kernels.layers.linear import PackedLinear
from sparsegpt.kernels.layers.plain import autocast_device
from sparsegpt.kernels.layers.schemas import LIBRARY, OWNERS, packed_weight

# By the first tensor of a weight: a layer made for it here, on aliases, as with the key itself inside a value the
# dictionary would never let go.
_made = WeakTensorKeyDictionary()


def _packed_linear(
    input: Tensor, weight: list[Tensor], bias: Tensor | None, kernels: str, form: str, *shape: int
) -> Tensor:
    """[..., K] -> [..., N]."""
    parts = weight if bias is None else [*weight, bias]
    owner, made = OWNERS.get(weight[0]), _made.get(weight[0])
    for layer in (None if owner is None else owner(), made):
        if layer is not None and _like(layer, kernels, form, shape):
            plan = layer.plan(input.dtype)
            if _same(plan.parts, parts):
                break
    else:
        aliases, alias = [part.detach() for part in weight], None if bias is None else bias.detach()
        layer = _made[weight[0]] = _layer(aliases, alias, kernels, form, shape)
        plan = layer.plan(input.dtype)
    outputs: Tensor = plan.multiply(layer.fitting(input, plan.parts, plan.dtype, plan.device, plan.autocast))
    return outputs


def _like(layer: PackedLinear, kernels: str, form: str, shape: Sequence[int]) -> bool:
    """Whether a layer is what the arguments of a product say."""
    return (layer.kernels, layer.form_text, (layer.out_features, layer.in_features)) == (kernels, form, shape)


def _same(parts: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether tensors, or what they are aliases of, are the same ones."""
    if len(parts) != len(others):
        return False
    return all(part is other or part.data_ptr() == other.data_ptr() for part, other in zip(parts, others, strict=True))


def _layer(weight: list[Tensor], bias: Tensor | None, kernels: str, form: str, shape: tuple[int, ...]) -> PackedLinear:
    """A layer on these very tensors."""
    found = form_of(form)
    return layer_class(found).from_packed(found.packed(weight, (shape[0], shape[1])), bias, kernels=kernels)


def _packed_weight(weight: list[Tensor], dtype: torch.dtype, form: str, *shape: int) -> Tensor:
    """-> [N, K] in `dtype`."""
    found = form_of(form)
    kind, packed = layer_class(found), found.packed(weight, (shape[0], shape[1])).settled()
    return kind.table.dense(kind.for_inputs(packed, dtype)).to(dtype)


def _dense_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., K] -> [..., N]."""
    if serves_linear(input, weight, bias):
        return on_cpu.run(weight, input.contiguous(), bias)
    return functional.linear(input, weight, bias)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, _, *ctx.form = inputs
    ctx.save_for_backward(*weight)


def _input_grads(ctx: Any, grads: Tensor) -> tuple[Any, ...]:
    """Gradients [..., N] of the output -> [..., K], those of the input; nothing else trains."""
    weight = list(ctx.saved_tensors)
    weight_NK = packed_weight(weight, grads.dtype, *ctx.form)
    with torch.autocast(autocast_device(weight_NK), enabled=False):
        return grads @ weight_NK, [None] * len(weight), None, None, *(None for _ in ctx.form)


def _outputs(input: Tensor, rows: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], rows)


def _packed_linear_shape(
    input: Tensor, weight: list[Tensor], bias: Tensor | None, kernels: str, form: str, *shape: int
) -> Tensor:
    return _outputs(input, shape[0])


def _packed_weight_shape(weight: list[Tensor], dtype: torch.dtype, form: str, *shape: int) -> Tensor:
    return weight[0].new_empty(*shape, dtype=dtype)


def _dense_linear_shape(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _outputs(input, weight.shape[0])


LIBRARY.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")
LIBRARY.impl("packed_weight", _packed_weight, "CompositeExplicitAutograd")
LIBRARY.impl("dense_linear", _dense_linear, "CompositeExplicitAutograd")
torch.library.register_fake("sparsegpt::packed_linear", _packed_linear_shape)
torch.library.register_fake("sparsegpt::packed_weight", _packed_weight_shape)
torch.library.register_fake("sparsegpt::dense_linear", _dense_linear_shape)
torch.library.register_autograd("sparsegpt::packed_linear", _input_grads, setup_context=_save_weight)
