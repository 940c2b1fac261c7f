"""A pruned Hugging Face folder to its packed form and back, one tensor in memory at a time.

    <module>.weight [N, K]  <->  <module>.values [N, Kp / 2] + <module>.meta [N, Kp / 32]      (format: pack.py)

or, with integer values (quantized.py), words, scales (float16 bits in int16) and meta. Rounding to integers is storage,
to nearest; unpacking gives the rounded weights.

Packed are the weights of linear layers that keep 2:4 exactly. `report.json`, when it lies in the folder, says which
layers were pruned; without it every candidate that keeps the pattern is packed (a dense weight does not, by chance).
`config.json` gets a `quantization_config` of our own, which transformers' quantizer interface reads (hf.py). The target
appears whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.folders import new_folder

from .pack import Packed24, pack, unpack
from .quantized import Quantized24, check_settings, dequantize, quantize
from .tensor_files import (
    DEFAULT_SHARD_BYTES,
    INDEX,
    ShardedWriter,
    header_room,
    read_header,
    read_json,
    verify_checksums,
    weight_files,
)

QUANT_METHOD = "sparsegpt"
FORMAT_VERSION = 1
PATTERN = "2:4"
# Weights of these model types are stored transposed, [in, out] (transformers' Conv1D): their groups run down columns.
TRANSPOSED_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_NOT_LINEAR = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared|lm_head|embed_out|\w*norm\w*|ln_\w+)\.weight$")
_MERGED_EXPERTS = re.compile(r"\.experts\.\d+\.")  # transformers 5 loads all experts into one 3-D parameter
_WEIGHTS_OF_OTHERS = re.compile(
    r".*\.(safetensors|bin|pt|pth|h5|msgpack|onnx|gguf)$|.*\.(bin|safetensors)\.index\.json$"
)


@dataclass(frozen=True)
class IntegerValues:
    """Kept values stored as integers of `bits`, one scale for `group_size` columns; `dtype` is what they were."""

    bits: int
    group_size: int = 128
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"int{self.bits}, groups of {self.group_size}"

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        return {"bits": self.bits, "group_size": self.group_size, "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class PackReport:
    """What `pack_folder` did: module names packed, {weight name: why} left dense, bytes of the packed linears."""

    packed: tuple[str, ...]
    left_dense: Mapping[str, str]
    dense_bytes: int
    packed_bytes: int


@dataclass
class _Tally:
    packed: dict[str, list[int]] = field(default_factory=dict)  # module name -> dense shape
    left_dense: dict[str, str] = field(default_factory=dict)
    dense_bytes: int = 0
    packed_bytes: int = 0

    def count(self, module: str, dense: Tensor, packed: Packed24 | Quantized24) -> None:
        self.packed[module] = list(packed.shape)
        self.dense_bytes += dense.nbytes
        self.packed_bytes += packed.nbytes


def pack_folder(
    source: Path,
    target: Path,
    *,
    values: IntegerValues | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> PackReport:
    """Write the packed form of the Hugging Face folder `source` to the new folder `target`.

    values: round the kept values to integers (to nearest, so the model changes by that); None keeps every bit.

    Raises:
        SparseGPTError: no safetensors weights or config.json in `source`; already quantised or packed; a layer that
            report.json calls 2:4 breaks the pattern (names tensor and first bad group); nothing to pack; `target`
            exists and is not empty.
    """
    source, target = Path(source), Path(target)
    config = _read_config(source)
    if config.get("quantization_config"):
        raise SparseGPTError(f"{source}: already packed or quantised (config.json has quantization_config)")
    files = weight_files(source)
    for path in set(files.values()):
        read_header(path)  # a truncated file is refused before anything is written
    listed = _reported_layers(source)
    _check_listed(source, listed, files)
    transposed = config.get("model_type") in TRANSPOSED_MODEL_TYPES
    if values is not None:
        values = replace(values, dtype=_stored_dtype(files))
    with new_folder(target, overwrite=overwrite) as stage:
        tally = _write_packed(files, stage, shard_bytes, listed, transposed, values)
        if not tally.packed:
            raise SparseGPTError(f"{source}: no linear layer keeps 2:4; prune with --sparsity 2:4 first")
        _copy_the_rest(source, stage)
        _write_config(stage, {**config, "quantization_config": _packed_config(tally.packed, values)})
    return PackReport(tuple(tally.packed), tally.left_dense, tally.dense_bytes, tally.packed_bytes)


def unpack_folder(
    packed: Path, target: Path, *, shard_bytes: int = DEFAULT_SHARD_BYTES, overwrite: bool = False
) -> tuple[str, ...]:
    """Write the ordinary dense-with-zeros form of a packed folder to `target`; returns the module names unpacked.

    Integer values come back as what they stand for, q * scale in the dtype of the model, not as what they were rounded
    from.

    Every checksum is compared before the first tensor is used. Raises SparseGPTError for a folder that is not packed,
    of a newer format, damaged or truncated, or when `target` exists and is not empty.
    """
    packed, target = Path(packed), Path(target)
    config = _read_config(packed)
    settings = config.pop("quantization_config", None)
    modules, values = read_packed_config(settings, packed), read_values(settings, packed)
    files = weight_files(packed)
    verify_files(files)
    check_modules(files, modules, packed, values)
    with new_folder(target, overwrite=overwrite) as stage:
        with ShardedWriter(stage, header_room(files), shard_bytes, checksums=False) as writer, _Open(files) as tensors:
            for name in files:
                module, _, kind = name.rpartition(".")
                if module in modules and kind == "meta":
                    weight = unpack(packed_module(tensors.__getitem__, module, modules[module], values))
                    writer.add((f"{module}.weight", weight))
                elif module not in modules or kind not in part_names(values):
                    writer.add((name, tensors[name]))
        _copy_the_rest(packed, stage)
        _write_config(stage, config)
    return tuple(modules)


def read_packed_config(settings: Any, where: object) -> dict[str, tuple[int, int]]:
    """{module name: dense (N, K)} of a `quantization_config`; refuses other methods and newer format versions."""
    if not isinstance(settings, Mapping) or settings.get("quant_method") != QUANT_METHOD:
        raise SparseGPTError(f'{where}: not packed here: config.json lacks quantization_config "{QUANT_METHOD}"')
    version = settings.get("format_version")
    if version != FORMAT_VERSION or settings.get("pattern") != PATTERN:
        raise SparseGPTError(
            f"{where}: packed format version {version} with pattern {settings.get('pattern')}; this package reads "
            f"version {FORMAT_VERSION} with {PATTERN}: update sparsegpt"
        )
    try:
        return {name: (int(shape[0]), int(shape[1])) for name, shape in settings["modules"].items()}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise SparseGPTError(f"{where}: quantization_config has no readable modules; pack the model again") from error


def read_values(settings: Mapping[str, Any], where: object) -> IntegerValues | None:
    """How the kept values of a packed folder are stored: integers, or None for floating point."""
    values = settings.get("values")
    if values is None:
        return None
    try:
        found = IntegerValues(int(values["bits"]), int(values["group_size"]), getattr(torch, values["dtype"]))
        check_settings(found.bits, found.group_size)
    except (KeyError, TypeError, ValueError, AttributeError, SparseGPTError) as error:
        raise SparseGPTError(f"{where}: values {values} are not known to this package: update sparsegpt") from error
    return found


def part_names(values: IntegerValues | None) -> tuple[str, ...]:
    """Names of the tensors of a packed module."""
    return ("values", "meta") if values is None else ("words", "scales", "meta")


def packed_module(
    tensor: Callable[[str], Tensor], module: str, shape: tuple[int, int], values: IntegerValues | None
) -> Packed24:
    """A packed module of a folder in floating point, from a look-up of tensors by name."""
    parts = [tensor(f"{module}.{part}") for part in part_names(values)]
    if values is None:
        return Packed24(parts[0], parts[1], shape)
    words, scales, meta = parts
    whole = Quantized24(words, scales.view(torch.float16), meta, shape, values.bits, values.group_size)
    return dequantize(whole, values.dtype)


def verify_files(files: Mapping[str, Path]) -> None:
    """Checksums of every file of {tensor name: file}, and that each file holds the tensors promised of it."""
    for path in dict.fromkeys(files.values()):
        found = verify_checksums(path)
        missing = sorted(name for name, place in files.items() if place == path and name not in found)
        if missing:
            raise SparseGPTError(f"{path}: the index promises {missing[0]}, which is not there; copy the folder again")


def check_modules(
    names: Container[str], modules: Iterable[str], where: object, values: IntegerValues | None = None
) -> None:
    """Refuse a packed folder that lacks one of the tensors of a packed module."""
    for name in (f"{module}.{part}" for module in modules for part in part_names(values)):
        if name not in names:
            raise SparseGPTError(f"{where}: config.json promises {name}, which is not in the weights; pack again")


def _write_packed(
    files: Mapping[str, Path],
    stage: Path,
    shard_bytes: int,
    listed: Mapping[str, str] | None,
    transposed: bool,
    values: IntegerValues | None,
) -> _Tally:
    tally = _Tally()
    room = header_room([*files, *files, *files])  # a packed weight becomes two or three tensors
    with ShardedWriter(stage, room, shard_bytes) as writer:
        for name, tensor in _tensors(files):
            reason = _why_dense(name, tensor, listed, transposed)
            packed = None if reason else _try_pack(name, tensor, listed)
            if packed is not None:
                module = name.removesuffix(".weight")
                form = packed if values is None else quantize(packed, values.bits, values.group_size)
                writer.add(*_named_parts(module, form))
                tally.count(module, tensor, form)
            else:
                writer.add((name, tensor))
                if tensor.ndim == 2:
                    tally.left_dense[name] = reason or "does not keep 2:4"
    return tally


def _try_pack(name: str, tensor: Tensor, listed: Mapping[str, str] | None) -> Packed24 | None:
    """The packed weight; None where the pattern is not kept, which is an error for a layer reported as 2:4."""
    try:
        return pack(tensor, name)
    except SparseGPTError:
        if listed is not None and listed[name.removesuffix(".weight")] == PATTERN:
            raise
        return None


def _named_parts(module: str, form: Packed24 | Quantized24) -> list[tuple[str, Tensor]]:
    if isinstance(form, Packed24):
        return [(f"{module}.values", form.values), (f"{module}.meta", form.meta)]
    scales = form.scales.view(torch.int16)  # bit patterns: no cast of a loaded model may change them
    return [(f"{module}.words", form.words), (f"{module}.scales", scales), (f"{module}.meta", form.meta)]


def _stored_dtype(files: Mapping[str, Path]) -> torch.dtype:
    """The dtype of the model's matrices; the first one decides."""
    with _Open(files) as tensors:
        for name in files:
            tensor = tensors[name]
            if tensor.ndim == 2 and tensor.is_floating_point():
                return tensor.dtype
    return torch.bfloat16


def _why_dense(name: str, tensor: Tensor, listed: Mapping[str, str] | None, transposed: bool) -> str | None:
    """Why this tensor is not even tried, or None."""
    module = name.removesuffix(".weight")
    if module == name or tensor.ndim != 2 or _NOT_LINEAR.search(name):
        return "not the weight of a linear layer"
    if listed is not None and module not in listed:
        return "not pruned"
    if transposed or _MERGED_EXPERTS.search(name):
        kind = "stored transposed (Conv1D)" if transposed else "an expert that transformers merges when loading"
        return f"{kind}: no Linear of the loaded model has this weight"
    return None


def _reported_layers(source: Path) -> dict[str, str] | None:
    """{module name: sparsity} of the folder's report.json, or None without one."""
    path = source / "report.json"
    if not path.is_file():
        return None
    report = read_json(path)
    try:
        return {layer["name"]: str(layer["sparsity"]) for layer in report["layers"]}
    except (KeyError, TypeError) as error:
        raise SparseGPTError(
            f'{path}: expected a "layers" list with "name" and "sparsity"; remove the file to pack whatever keeps 2:4'
        ) from error


def _check_listed(source: Path, listed: Mapping[str, str] | None, files: Mapping[str, Path]) -> None:
    for module, sparsity in (listed or {}).items():
        if sparsity == PATTERN and f"{module}.weight" not in files and not _MERGED_EXPERTS.search(f"{module}."):
            raise SparseGPTError(f"{source}: report.json lists {module}, but the weights hold no {module}.weight")


class _Open:
    """Tensors of several safetensors files by name, each file mapped once, each tensor read when asked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor


def _tensors(files: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    with _Open(files) as tensors:
        for name in files:
            yield name, tensors[name]


def _packed_config(modules: Mapping[str, list[int]], values: IntegerValues | None) -> dict[str, Any]:
    config = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "pattern": PATTERN,
        "modules": dict(modules),
    }
    return config if values is None else {**config, "values": values.to_dict()}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise SparseGPTError(f"{folder}: expected a Hugging Face folder with config.json; found none")
    config = read_json(path)
    if not isinstance(config, dict):
        raise SparseGPTError(f"{path}: expected a JSON object; found {type(config).__name__}")
    return config


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _copy_the_rest(source: Path, stage: Path) -> None:
    """Tokenizer, report, generation settings, remote code: every file that is no weight and not config.json."""
    for path in source.iterdir():
        if path.name.startswith(".") or path.name in ("config.json", INDEX) or _WEIGHTS_OF_OTHERS.match(path.name):
            continue
        if path.is_dir():
            shutil.copytree(path, stage / path.name)
        else:
            shutil.copyfile(path, stage / path.name)
