"""Packed folders through transformers: `AutoModelForCausalLM.from_pretrained(packed)` gives `Sparse24Linear` layers.

Importing this module registers a quantizer and its config under the name "sparsegpt" with
`transformers.quantizers.auto` (tested with 5.17 and 5.23). That imports transformers, which takes seconds;
`registration.py` waits until someone else does."""

from __future__ import annotations

import json
import logging
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

from .archive import (
    FORMAT_VERSION,
    PATTERN,
    QUANT_METHOD,
    IntegerValues,
    check_modules,
    read_packed_config,
    read_values,
    verify_files,
)
from .gated import fuse_gated
from .linear import PackedLinear, Sparse24Linear, explain, packed_layers, set_kernels
from .quantized_linear import Quantized24Linear
from .tensor_files import CHECKSUMS, read_header, tensor_checksum

logger = logging.getLogger("sparsegpt.kernels")


class Sparse24Config(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
    """The `quantization_config` of a packed folder: format version, pattern, {module name: dense shape}, values."""

    def __init__(
        self,
        modules: Mapping[str, list[int]] | None = None,
        format_version: int = FORMAT_VERSION,
        pattern: str = PATTERN,
        values: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.pattern = pattern
        self.modules = {name: list(shape) for name, shape in (modules or {}).items()}
        if values is not None:
            self.values = dict(values)


class Sparse24Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped here
    """Builds the packed layers before loading, checks every checksum first, writes checksums when saving."""

    requires_calibration = True  # it loads packed models; it does not prune one on the way

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse another format version before anything is built."""
        settings = self.quantization_config.to_dict()
        read_packed_config(settings, "packed model")
        read_values(settings, "packed model")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        settings = self.quantization_config.to_dict()
        shapes, values = read_packed_config(settings, "packed model"), read_values(settings, "packed model")
        _check_files(kwargs.get("checkpoint_files") or [], shapes, values)
        _replace_linears(model, shapes, values)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        fuse_gated(model)
        logger.info(explain(model))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Checksums of what transformers is about to save, for the files' headers."""
        layers = packed_layers(model)
        self.quantization_config.modules = {n: [m.out_features, m.in_features] for n, m in layers.items()}
        tensors = _tensors_as_saved(model)
        return None, {CHECKSUMS: json.dumps({name: tensor_checksum(tensor) for name, tensor in tensors.items()})}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Back to dense `nn.Linear` layers (`model.dequantize()`)."""
        if isinstance(dtype, str):  # the config holds a name once the model has been saved
            dtype = getattr(torch, dtype)
        dtype = dtype or model.dtype
        for name, layer in packed_layers(model).items():
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
            model.set_submodule(name, linear)
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


def _check_files(paths: list[str], shapes: Mapping[str, tuple[int, int]], values: IntegerValues | None) -> None:
    """Every checksum, and that each packed module has all its tensors, before transformers reads one."""
    files = {name: Path(path) for path in paths for name in read_header(Path(path)).entries}
    verify_files(files)
    if paths:
        check_modules(files, shapes, Path(paths[0]).parent, values)


def _replace_linears(model: Any, shapes: Mapping[str, tuple[int, int]], values: IntegerValues | None) -> None:
    found = set()
    for name, module in list(model.named_modules()):
        listed = _listed_name(name, model.base_model_prefix, shapes) if isinstance(module, nn.Linear) else None
        if listed is None:
            continue
        if (module.out_features, module.in_features) != shapes[listed]:
            raise SparseGPTError(f"{name}: packed as {shapes[listed]}, the model's config says {module}")
        model.set_submodule(name, _empty_layer(module, values))
        found.add(listed)
    if len(found) < len(shapes):
        missing = sorted(set(shapes) - found)[0]
        raise SparseGPTError(f"packed module {missing}: {type(model).__name__} has no such Linear; unpack the folder")


def _empty_layer(linear: nn.Linear, values: IntegerValues | None) -> PackedLinear:
    """A packed layer on the meta device, to be loaded."""
    size, dtype = (linear.in_features, linear.out_features, linear.bias is not None), linear.weight.dtype
    if values is None:
        return Sparse24Linear(*size, dtype=dtype, device="meta")
    return Quantized24Linear(*size, bits=values.bits, group_size=values.group_size, dtype=dtype, device="meta")


def _listed_name(name: str, prefix: str, shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """The packed folder's name of a module: a base model and its head model differ by `prefix`."""
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in shapes), None)


def _tensors_as_saved(model: Any) -> dict[str, Tensor]:
    """Tensors under the names `save_pretrained` writes (some architectures rename or split parameters)."""
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, Tensor] = model.state_dict()
    if any(tensor.device.type == "meta" for tensor in state.values()):
        raise SparseGPTError("a packed model with offloaded layers cannot be saved; load it on one device first")
    saved: dict[str, Tensor] = revert_weight_conversion(model, state)
    return saved


register()
