"""Packed folders through transformers: `AutoModelForCausalLM.from_pretrained(packed)` gives `Sparse24Linear` layers.

Importing this module registers a quantizer and its config under the name "sparsegpt" with
`transformers.quantizers.auto` (tested with 5.17 and 5.23). That imports transformers, which takes seconds;
`registration.py` waits until someone else does."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
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
from sparsegpt.files.headers import meta_tensor, read_header
from sparsegpt.files.inside import check_inside
from sparsegpt.files.model_files import read_config
from sparsegpt.files.tensor_files import CHECKSUMS, tensor_checksum
from sparsegpt.kernels.checkpoint.archive import verify_packed
from sparsegpt.kernels.checkpoint.model_names import ModelNames
from sparsegpt.kernels.checkpoint.packed_config import (
    FORMAT_VERSION,
    QUANT_METHOD,
    PackedConfig,
    read_packed_config,
)
from sparsegpt.kernels.format.form import Form
from sparsegpt.kernels.format.pack import FloatValues
from sparsegpt.kernels.hf.replace import install_packed, remove_packed
from sparsegpt.kernels.layers.dense_layers import quicken_dense
from sparsegpt.kernels.layers.experts import PackedExperts
from sparsegpt.kernels.layers.gated import fuse_gated
from sparsegpt.kernels.layers.linear import explain, packed_layers, set_kernels

logger = logging.getLogger("sparsegpt.kernels")


class Sparse24Config(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
    """The `quantization_config` of a packed folder: see packed_config.py."""

    def __init__(
        self,
        modules: Mapping[str, list[int]] | None = None,
        format_version: int = FORMAT_VERSION,
        pattern: str = FloatValues.pattern,
        **others: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.pattern = pattern
        self.modules = dict(modules) if isinstance(modules, Mapping) else modules or {}  # read_packed_config checks it
        for name, value in others.items():  # `transposed`, `stacked`, and what a form says of itself
            if name != "quant_method":
                setattr(self, name, value)

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
        stored = _checked_files(kwargs.get("checkpoint_files") or [], packing)
        names, placeholders = ModelNames(model), packing.ordinary_shapes()
        expected = name_patterns([*placeholders, *map(names.unplaced, placeholders)])
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *expected}
        install_packed(model, packing, lambda name: meta_tensor(stored[name]))
        self._dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}

    def _packing(self) -> PackedConfig:
        return read_packed_config(self.quantization_config.to_dict(), "packed model")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, tensor in _tensors(model):  # transformers 5.17 leaves what it renames in the dtype of the file
            wanted = self._dtypes.get(name, tensor.dtype)
            if tensor.dtype != wanted and not any(re.search(kept, name) for kept in model._get_dtype_plan(wanted)):
                tensor.data = tensor.data.to(wanted)
        from sparsegpt.kernels.hf.decode import step_blocks  # transformers imports this file while it is half loaded

        fuse_gated(model)
        quicken_dense(model)
        step_blocks(model)
        logger.info(explain(model))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """-> tensors [...] that transformers is about to save, and their checksums for the files' headers.

        Of each weight [N, K] its packed parts, and a placeholder [1] under its ordinary name.
        """
        state = model.state_dict()
        state |= {name: torch.zeros(1, dtype=torch.uint8) for name in _ordinary_names(model)}
        saved = _as_saved(model, state)
        self.quantization_config.take(_packing_of(model, state, saved, self._packing().form))
        return state, {CHECKSUMS: json.dumps({name: tensor_checksum(tensor) for name, tensor in saved.items()})}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Back to dense layers (`model.dequantize()`)."""
        if isinstance(dtype, str):  # the config holds a name once the model has been saved
            dtype = getattr(torch, dtype)
        assert not isinstance(dtype, str)
        remove_packed(model, dtype or model.dtype)
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
    read_packed_config(read_config(Path(folder)).get("quantization_config"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    set_kernels(model, kernels)
    return model


def _checked_files(paths: list[str], packing: PackedConfig) -> dict[str, dict[str, Any]]:
    """{tensor: its header entry}, after all that readers of packed folders rely on was checked."""
    if not paths:
        raise SparseGPTError("a packed model is loaded from its files: give from_pretrained the folder that holds them")
    files = [check_inside(Path(path).parent, Path(path)) for path in paths]
    entries = {path: read_header(path).entries for path in files}
    verify_packed({name: path for path, names in entries.items() for name in names}, packing, files[0].parent)
    return {name: entry for names in entries.values() for name, entry in names.items()}


def name_patterns(names: Iterable[str]) -> set[str]:
    """Regular expressions for names of tensors, one for all names that differ in their numbers alone."""
    alike: dict[tuple[str, ...], list[set[str]]] = {}
    for name in names:
        parts = name.split(".")
        seen = alike.setdefault(tuple("" if part.isdigit() else part for part in parts), [set() for _ in parts])
        for part, known in zip(parts, seen, strict=True):
            known.add(re.escape(part))
    either = ([f"(?:{'|'.join(sorted(known))})" for known in seen] for seen in alike.values())
    return {f"^{'[.]'.join(parts)}$" for parts in either}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _ordinary_names(model: nn.Module) -> list[str]:
    """What an ordinary model calls the packed weights: a placeholder is saved under each of these names."""
    experts = {path: module for path, module in model.named_modules() if isinstance(module, PackedExperts)}
    names: dict[str, None] = {}
    for path in packed_layers(model):
        owner, part = path.rsplit(".", 2)[0], path.rpartition(".")[2]
        stacked = owner in experts and experts[owner].is_stacked(part)
        names[f"{owner}.{part}" if stacked else f"{path}.weight"] = None
    return list(names)


def _as_saved(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names `save_pretrained` writes (some architectures rename or split parameters)."""
    from transformers.core_model_loading import revert_weight_conversion

    if any(tensor.device.type == "meta" for tensor in state.values()):
        raise SparseGPTError("a packed model with offloaded layers cannot be saved; load it on one device first")
    saved: dict[str, Tensor] = revert_weight_conversion(model, state)
    return saved


def _packing_of(model: nn.Module, state: Mapping[str, Tensor], saved: Mapping[str, Tensor], form: Form) -> PackedConfig:
    """What config.json says of a packed model once it is saved."""
    part = form.parts[0]
    saved_names = {id(tensor): name.removesuffix(f".{part}") for name, tensor in saved.items()}
    experts = {path: module for path, module in model.named_modules() if isinstance(module, PackedExperts)}
    modules: dict[str, tuple[int, ...]] = {}
    transposed, stacked = set(), set()
    for path, layer in packed_layers(model).items():
        name, size = saved_names[id(state[f"{path}.{part}"])], (layer.out_features, layer.in_features)
        owner = experts.get(path.rsplit(".", 2)[0])
        if owner is None:
            modules[name] = size
        else:
            start, _, projection = name.rsplit(".", 2)
            name = f"{start}.*.{projection}"
            modules[name] = (owner.form.count, *size)
            stacked |= {name} if owner.is_stacked(path.rpartition(".")[2]) else set()
        if layer.transposed:
            transposed.add(name)
    return PackedConfig(modules, frozenset(transposed), frozenset(stacked), form)


register()
