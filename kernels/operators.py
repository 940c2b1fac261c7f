"""Products of packed models as operators of torch: what torch.compile and torch.export put in their graphs.

    sparsegpt::packed_linear   x W^T + b on a packed weight, through the kernel that its layer would choose
    sparsegpt::packed_weight   W itself [N, K], for the gradient of the input
    sparsegpt::dense_linear    x W^T + b on a dense weight, through the CPU kernel where that is quicker

Their results depend on their arguments alone: a graph serves every layer of one shape, and an exported program runs
wherever `sparsegpt.kernels.linear` is imported. Layers call the kernels themselves, which saves some 15 us a call, as
long as an input is plain memory and nobody but autograd watches (`is_plain`)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils import _python_dispatch
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

# By the first tensor of a weight, for as long as that lives: the layer that it belongs to; one made for it here, on
# aliases, as with the key itself inside a value the dictionary would never let go.
_owners = WeakTensorKeyDictionary()
_made = WeakTensorKeyDictionary()


def is_plain(input: Tensor) -> bool:
    """Whether a kernel may go by the address of an input and return its result unseen.

    Not for tensors of other classes, wrapped by a transform or lazily negated, nor while somebody compiles, traces,
    intercepts what is computed (fake tensors, say) or takes forward derivatives.
    """
    # what torch 2.11 to 2.13 keeps to itself: of the public ways to ask each costs a multiple, or there is none
    return (
        not torch.compiler.is_compiling()
        and type(input) in (Tensor, nn.Parameter)
        and not input.is_neg()
        and not _python_dispatch.is_in_torch_dispatch_mode()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    )


def has_tangent(input: Tensor) -> bool:
    """Whether forward derivatives are taken through an input."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(input).tangent is not None


def introduce(layer: PackedLinear) -> None:
    """Have the operators go through this very layer, with what it has prepared, for its tensors while it lives."""
    _owners[layer.operands[0]] = weakref.ref(layer)


def autocast_device(tensor: Tensor) -> str:
    """What to ask autocast for; of a device that it does not know (meta) it changes nothing."""
    kind = tensor.device.type
    return kind if torch.amp.is_autocast_available(kind) else "cpu"


def _packed_linear(input: Tensor, weight: list[Tensor], bias: Tensor | None, kernels: str, *form: int) -> Tensor:
    parts = weight if bias is None else [*weight, bias]
    owner, made = _owners.get(weight[0]), _made.get(weight[0])
    for layer in (None if owner is None else owner(), made):
        if layer is not None and layer.kernels == kernels and layer.form == form:
            plan = layer.plan(input.dtype)
            if _same(plan.parts, parts):
                break
    else:
        aliases, alias = [part.detach() for part in weight], None if bias is None else bias.detach()
        layer = _made[weight[0]] = _layer(aliases, alias, kernels, *form)
        plan = layer.plan(input.dtype)
    outputs: Tensor = plan.multiply(layer.fitting(input, plan.parts, plan.dtype, plan.autocast))
    return outputs


def _same(parts: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether tensors, or what they are aliases of, are the same ones."""
    if len(parts) != len(others):
        return False
    return all(part is other or part.data_ptr() == other.data_ptr() for part, other in zip(parts, others, strict=True))


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


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, _, *ctx.form = inputs
    ctx.save_for_backward(*weight)


def _input_grads(ctx: Any, grads: Tensor) -> tuple[Any, ...]:
    """Gradients [..., out_features] of the output -> [..., in_features], those of the input; nothing else trains."""
    weight = list(ctx.saved_tensors)
    weight_NK = packed_weight(weight, grads.dtype, *ctx.form)
    with torch.autocast(autocast_device(weight_NK), enabled=False):
        return grads @ weight_NK, [None] * len(weight), None, None, *(None for _ in ctx.form)


def _outputs(input: Tensor, rows: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], rows)


def _packed_linear_shape(input: Tensor, weight: list[Tensor], *_: Any) -> Tensor:
    return _outputs(input, weight[0].shape[0])


def _packed_weight_shape(weight: list[Tensor], dtype: torch.dtype, in_features: int, *_: int) -> Tensor:
    return weight[0].new_empty(weight[0].shape[0], in_features, dtype=dtype)


def _dense_linear_shape(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _outputs(input, weight.shape[0])


_LIBRARY.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_weight", _packed_weight, "CompositeExplicitAutograd")
_LIBRARY.impl("dense_linear", _dense_linear, "CompositeExplicitAutograd")
torch.library.register_fake("sparsegpt::packed_linear", _packed_linear_shape)
torch.library.register_fake("sparsegpt::packed_weight", _packed_weight_shape)
torch.library.register_fake("sparsegpt::dense_linear", _dense_linear_shape)
torch.library.register_autograd("sparsegpt::packed_linear", _input_grads, setup_context=_save_weight)
