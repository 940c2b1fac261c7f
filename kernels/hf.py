"""Packed folders through transformers: `AutoModelForCausalLM.from_pretrained(packed)` gives `Sparse24Linear` layers.

Importing this module registers a quantizer and its config under the name "sparsegpt" with
`transformers.quantizers.auto` (tested with 5.17 and 5.23). That imports transformers, which takes seconds;
`registration.py` waits until someone else does."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsegpt.errors import SparseGPTError
from sparsegpt.experts import is_conv1d

from .archive import check_parts, verify_files
from .experts import PackedExperts
from .gated import fuse_gated
from .linear import PackedLinear, Sparse24Linear, explain, packed_layers, set_kernels
from .model_names import Bank, ModelNames
from .packed_config import (
    FORMAT_VERSION,
    PATTERN,
    QUANT_METHOD,
    IntegerValues,
    PackedConfig,
    members,
    read_packed_config,
    stack_name,
)
from .quantized_linear import Quantized24Linear
from .tensor_files import CHECKSUMS, read_header, tensor_checksum

logger = logging.getLogger("sparsegpt.kernels")


class Sparse24Config(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
    """The `quantization_config` of a packed folder: see packed_config.py."""

    def __init__(
        self,
        modules: Mapping[str, list[int]] | None = None,
        format_version: int = FORMAT_VERSION,
        pattern: str = PATTERN,
        **others: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.pattern = pattern
        self.modules = {name: list(shape) for name, shape in (modules or {}).items()}
        for name in ("transposed", "stacked", "values"):
            if name in others:
                setattr(self, name, others[name])

    def take(self, packing: PackedConfig) -> None:
        """Become the config of another packing."""
        self.__init__(**packing.to_dict())  # type: ignore[misc]


class Sparse24Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped here
    """Builds the packed layers before loading, checks every checksum first, writes checksums when saving."""

    requires_calibration = True  # it loads packed models; it does not prune one on the way

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse another format version before anything is built."""
        self._packing()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        packing = self._packing()
        _check_files(kwargs.get("checkpoint_files") or [], packing)
        _replace_modules(model, packing)

    def _packing(self) -> PackedConfig:
        return read_packed_config(self.quantization_config.to_dict(), "packed model")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        fuse_gated(model)
        logger.info(explain(model))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Checksums of what transformers is about to save, for the files' headers."""
        state = model.state_dict()
        saved = _as_saved(model, state)
        self.quantization_config.take(_packing_of(model, state, saved, self._packing().values))
        return None, {CHECKSUMS: json.dumps({name: tensor_checksum(tensor) for name, tensor in saved.items()})}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Back to dense layers (`model.dequantize()`)."""
        if isinstance(dtype, str):  # the config holds a name once the model has been saved
            dtype = getattr(torch, dtype)
        dtype = dtype or model.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedExperts):
                model.set_submodule(name, module.dense(dtype))
        for name, layer in packed_layers(model).items():
            model.set_submodule(name, _dense_layer(layer, dtype))
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` writes the packed form."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights do not train."""
        return False


def register() -> None:
    """Make transformers know packed folders; safe to call twice."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(Sparse24Config)
        register_quantizer(QUANT_METHOD)(Sparse24Quantizer)


def load_packed(folder: str | Path, *, kernels: str = "auto", **kwargs: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained(folder, **kwargs)` with the kernels set; the model is in eval mode.

    Raises SparseGPTError for a folder that is not packed, of a newer format, or damaged.
    """
    from transformers import AutoModelForCausalLM

    register()
    config_path = Path(folder) / "config.json"
    if not config_path.is_file():
        raise SparseGPTError(f"{folder}: expected a packed folder with config.json; found none")
    read_packed_config(json.loads(config_path.read_text()).get("quantization_config"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    set_kernels(model, kernels)
    return model


def _check_files(paths: list[str], packing: PackedConfig) -> None:
    """Every checksum, and that each packed linear has all its tensors, before transformers reads one."""
    files = {name: Path(path) for path in paths for name in read_header(Path(path)).entries}
    verify_files(files)
    if paths:
        check_parts(files, packing, Path(paths[0]).parent)


def _replace_modules(model: Any, packing: PackedConfig) -> None:
    """Put empty packed layers where the packed weights of a folder belong."""
    names = ModelNames(model)
    banks: dict[Bank, dict[str, tuple[int, ...]]] = defaultdict(dict)
    linears = {}
    for name, shape in packing.modules.items():
        tensor = stack_name(name) if name in packing.stacked else f"{next(members(name, shape))}.weight"
        place = names.place(tensor)
        if place is not None and place.bank is not None and "*" in name:
            banks[place.bank][name.rpartition(".")[2]] = shape
        elif place is not None and place.module is not None and _size(place.module) is not None:
            linears[name] = place
        else:
            raise SparseGPTError(f"packed module {name}: {type(model).__name__} has no such Linear; unpack the folder")
    for name, place in linears.items():
        path = place.parameter.removesuffix(".weight")
        model.set_submodule(path, _empty_linear(path, place.module, packing.modules[name], packing.values))
    for bank, shapes in banks.items():
        _replace_experts(model, bank, shapes, packing.values)


def _replace_experts(
    model: Any, bank: Bank, shapes: Mapping[str, tuple[int, ...]], values: IntegerValues | None
) -> None:
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


def _as_saved(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names `save_pretrained` writes (some architectures rename or split parameters)."""
    from transformers.core_model_loading import revert_weight_conversion

    if any(tensor.device.type == "meta" for tensor in state.values()):
        raise SparseGPTError("a packed model with offloaded layers cannot be saved; load it on one device first")
    saved: dict[str, Tensor] = revert_weight_conversion(model, state)
    return saved


def _packing_of(
    model: nn.Module, state: Mapping[str, Tensor], saved: Mapping[str, Tensor], values: IntegerValues | None
) -> PackedConfig:
    """What config.json says of a packed model once it is saved."""
    saved_names = {id(tensor): name.removesuffix(".meta") for name, tensor in saved.items()}
    experts = {path: module for path, module in model.named_modules() if isinstance(module, PackedExperts)}
    modules: dict[str, tuple[int, ...]] = {}
    transposed, stacked = set(), set()
    for path, layer in packed_layers(model).items():
        name, size = saved_names[id(state[f"{path}.meta"])], (layer.out_features, layer.in_features)
        owner = experts.get(path.rsplit(".", 2)[0])
        if owner is None:
            modules[name] = size
        else:
            start, _, part = name.rsplit(".", 2)
            name = f"{start}.*.{part}"
            modules[name] = (owner.form.count, *size)
            stacked |= {name} if owner.is_stacked(path.rpartition(".")[2]) else set()
        if layer.transposed:
            transposed.add(name)
    return PackedConfig(modules, frozenset(transposed), frozenset(stacked), values)


register()
