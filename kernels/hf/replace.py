"""A model's modules exchanged for packed ones of the same sizes, still empty, and packed ones for dense ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.checkpoint.model_names import Bank, ModelNames
from sparsegpt.kernels.checkpoint.packed_config import PackedConfig, members, stack_name
from sparsegpt.kernels.layers.dense_layers import unquicken_dense
from sparsegpt.kernels.layers.experts import PackedExperts
from sparsegpt.kernels.layers.forms import layer_class
from sparsegpt.kernels.layers.linear import PackedLinear, packed_layers
from sparsegpt.model.experts import is_conv1d


def install_packed(model: Any, packing: PackedConfig, stored: Callable[[str], Tensor]) -> None:
    """Put empty packed layers, on the meta device, where the packed weights [N, K] of a folder belong.

    stored: a tensor of the folder's files by its name, on the meta device: a layer gets the shapes that it will be
    loaded with. Raises SparseGPTError when the model has no linear for one of them or one of another size, or the files
    hold something else than the config says.
    """
    names = ModelNames(model)
    banks: dict[Bank, dict[str, str]] = defaultdict(dict)
    linears: dict[str, tuple[nn.Module, str]] = {}
    for name, shape in packing.modules.items():
        tensor = stack_name(name) if name in packing.stacked else f"{next(members(name, shape))}.weight"
        target = names.destination(tensor)
        if target is not None and target.bank is not None and "*" in name:
            banks[target.bank][name.rpartition(".")[2]] = name
        elif target is not None and target.module is not None and _size(target.module) is not None:
            linears[target.parameter.removesuffix(".weight")] = (target.module, name)
        else:
            raise SparseGPTError(f"packed module {name}: {type(model).__name__} has no such Linear; unpack the folder")
    for path, (module, name) in linears.items():
        model.set_submodule(path, _empty_linear(path, module, name, packing, stored))
    for bank, parts in banks.items():
        _install_bank(model, bank, parts, packing, stored)


def remove_packed(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace packed modules by dense ones of the original kinds, with the decompressed weights.

    What stayed dense is of its original kind again too.
    """
    from sparsegpt.kernels.hf.decode import unstep_blocks  # needs all of transformers, which may be importing this file

    unstep_blocks(model)
    unquicken_dense(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedExperts):
            model.set_submodule(name, module.dense(dtype))
    for name, layer in packed_layers(model).items():
        model.set_submodule(name, _dense_layer(layer, dtype))


def _install_bank(
    model: Any, bank: Bank, names: Mapping[str, str], packing: PackedConfig, stored: Callable[[str], Tensor]
) -> None:
    """Give a projection of experts packed layers; names: {part: name in `packing.modules`}."""
    experts = model.get_submodule(bank.experts)
    if not isinstance(experts, PackedExperts):
        experts = PackedExperts(bank.experts, experts)
        model.set_submodule(bank.experts, experts)
    weight = getattr(experts, bank.projection)
    count, *size = weight.mT.shape if experts.form.transposed else weight.shape
    shapes = {part: packing.modules[name] for part, name in names.items()}
    packed = [shapes.get(part, (0, 0, 0)) for part in bank.parts]
    rows = sum(shape[1] for shape in packed)
    if any((shape[0], rows, shape[2]) != (count, *size) for shape in packed):
        raise SparseGPTError(
            f"{bank.experts}.{bank.projection}: packed as {shapes}, the model's config says {tuple(weight.shape)}"
        )

    def layer(index: int, part: str) -> PackedLinear:
        linear = names[part].replace("*", str(index))
        made = _empty_layer(linear, shapes[part], None, weight.dtype, packing, stored)
        made.transposed = bank.transposed
        return made

    experts.take(bank.projection, bank.parts, layer, stacked=bank.stacked)


def _empty_linear(
    path: str, module: nn.Module, name: str, packing: PackedConfig, stored: Callable[[str], Tensor]
) -> PackedLinear:
    """A packed layer for a Linear or Conv1D."""
    shape = packing.modules[name]
    if _size(module) != shape:
        raise SparseGPTError(f"{path}: packed as {shape}, the model's config says {module}")
    bias, dtype = module.bias, module.weight.dtype
    layer = _empty_layer(name, shape, bias, dtype, packing, stored)  # type: ignore[arg-type]
    layer.transposed = is_conv1d(module)
    return layer


def _empty_layer(
    linear: str,
    shape: tuple[int, ...],
    bias: Tensor | None,
    dtype: torch.dtype,
    packing: PackedConfig,
    stored: Callable[[str], Tensor],
) -> PackedLinear:
    """A packed layer [N, K] on the meta device, to be loaded; bias: [N], of which the layer gets a hollow one."""

    def cast(name: str) -> Tensor:
        tensor = stored(name)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    packed = packing.packed(cast, linear, shape[-2:])
    hollow = None if bias is None else torch.empty_like(bias, device="meta")
    return layer_class(packing.form).from_packed(packed, hollow)


def _size(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a Linear or Conv1D; None for other modules."""
    if is_conv1d(module):
        return module.nf, module.nx  # type: ignore[return-value]
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None


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
