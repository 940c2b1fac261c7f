"""A model's modules exchanged for packed ones of the same sizes, still empty, and packed ones for dense ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.checkpoint.model_names import Bank, ModelNames
from sparsegpt.kernels.checkpoint.packed_config import IntegerValues, PackedConfig, members, stack_name
from sparsegpt.kernels.layers.dense_layers import unquicken_dense
from sparsegpt.kernels.layers.experts import PackedExperts
from sparsegpt.kernels.layers.linear import PackedLinear, Sparse24Linear, packed_layers
from sparsegpt.kernels.layers.quantized_linear import Quantized24Linear
from sparsegpt.model.experts import is_conv1d


def install_packed(model: Any, packing: PackedConfig) -> None:
    """Put empty packed layers, on the meta device, where the packed weights of a folder belong.

    Raises SparseGPTError when the model has no place for one of them, or one of another size.
    """
    names = ModelNames(model)
    banks: dict[Bank, dict[str, tuple[int, ...]]] = defaultdict(dict)
    linears: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    for name, shape in packing.modules.items():
        tensor = stack_name(name) if name in packing.stacked else f"{next(members(name, shape))}.weight"
        place = names.place(tensor)
        if place is not None and place.bank is not None and "*" in name:
            banks[place.bank][name.rpartition(".")[2]] = shape
        elif place is not None and place.module is not None and _size(place.module) is not None:
            linears[place.parameter.removesuffix(".weight")] = (place.module, shape)
        else:
            raise SparseGPTError(f"packed module {name}: {type(model).__name__} has no such Linear; unpack the folder")
    for path, (module, shape) in linears.items():
        model.set_submodule(path, _empty_linear(path, module, shape, packing.values))
    for bank, shapes in banks.items():
        _install_bank(model, bank, shapes, packing.values)


def remove_packed(model: nn.Module, dtype: torch.dtype) -> None:
    """Put dense modules of the original kinds, with the decompressed weights, in the place of packed ones.

    What stayed dense is of its original kind again too.
    """
    unquicken_dense(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedExperts):
            model.set_submodule(name, module.dense(dtype))
    for name, layer in packed_layers(model).items():
        model.set_submodule(name, _dense_layer(layer, dtype))


def _install_bank(model: Any, bank: Bank, shapes: Mapping[str, tuple[int, ...]], values: IntegerValues | None) -> None:
    """Give a projection of experts packed layers of these shapes {part: (E, N, K)}."""
    experts = model.get_submodule(bank.experts)
    if not isinstance(experts, PackedExperts):
        experts = PackedExperts(bank.experts, experts)
        model.set_submodule(bank.experts, experts)
    weight = getattr(experts, bank.projection)
    count, *size = weight.mT.shape if experts.form.transposed else weight.shape
    packed = [shapes.get(part, (0, 0, 0)) for part in bank.parts]
    rows = sum(shape[1] for shape in packed)
    if any((shape[0], rows, shape[2]) != (count, *size) for shape in packed):
        raise SparseGPTError(
            f"{bank.experts}.{bank.projection}: packed as {dict(shapes)}, the model's config says {tuple(weight.shape)}"
        )

    def layer(_: int, part: str) -> PackedLinear:
        made = _empty_layer(shapes[part][1:], False, weight.dtype, values)
        made.transposed = bank.transposed
        return made

    experts.take(bank.projection, bank.parts, layer, stacked=bank.stacked)


def _empty_linear(name: str, module: nn.Module, shape: tuple[int, ...], values: IntegerValues | None) -> PackedLinear:
    """A packed layer for a Linear or Conv1D."""
    if _size(module) != shape:
        raise SparseGPTError(f"{name}: packed as {shape}, the model's config says {module}")
    layer = _empty_layer(shape, module.bias is not None, module.weight.dtype, values)  # type: ignore[arg-type]
    layer.transposed = is_conv1d(module)
    return layer


def _size(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a Linear or Conv1D; None for other modules."""
    if is_conv1d(module):
        return module.nf, module.nx  # type: ignore[return-value]
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None


def _empty_layer(shape: tuple[int, ...], bias: bool, dtype: torch.dtype, values: IntegerValues | None) -> PackedLinear:
    """A packed layer of a dense shape (N, K) on the meta device, to be loaded."""
    size = (shape[1], shape[0], bias)
    if values is None:
        return Sparse24Linear(*size, dtype=dtype, device="meta")
    return Quantized24Linear(*size, bits=values.bits, group_size=values.group_size, dtype=dtype, device="meta")


def _dense_layer(layer: PackedLinear, dtype: torch.dtype) -> nn.Module:
    """The Linear or Conv1D that a packed layer stands for."""
    weight = layer.weight.to(dtype)
    if layer.transposed:
        from transformers.pytorch_utils import Conv1D

        dense: nn.Module = Conv1D(layer.out_features, layer.in_features)
        weight = weight.T.contiguous()
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return dense
