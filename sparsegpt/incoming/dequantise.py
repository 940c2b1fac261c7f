"""Integers of other programs made plain numbers again, so that a model in their formats can be pruned.

    value = scale * (q - zero),   q and zero from 0 to 2^b - 1

    compressed-tensors, pack-quantized   <linear>.weight_packed, weight_scale, weight_shape; weight_zero_point,
                                         weight_g_idx where there are some
    GPTQ, versions 1 and 2               <linear>.qweight, qzeros, scales; g_idx

Nothing needs to be installed for that. Other methods are refused (quantised.py).
Dimension key: N out_features, K in_features, G groups of a row, b bits.
"""

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.beside import Beside
from sparsegpt.files.bits import unpack_bits
from sparsegpt.files.model_files import CONFIG, read_config, weight_files
from sparsegpt.files.tensor_files import DEFAULT_SHARD_BYTES, OpenTensors, ShardedWriter, header_room

# How folders begin in which weights are made plain.
MADE = "plain-"
_KEY = "quantization_config"
# A function that reads a part of a linear by its name; None where there is none.
_Part = Callable[[str], Tensor | None]


class Made:
    """A new folder inside `parent`, or among the system's temporary files, that goes with this object."""

    def __init__(self, parent: Path | None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=MADE, dir=parent))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class _Integers:
    """A linear as both formats have it: numbers q [N, K], zeros and scales [N, G], and the group of each column [K]."""

    numbers: Tensor
    zeros: Tensor
    scales: Tensor
    group_of: Tensor

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K]: exact in float32, rounded once. Raises ValueError where the parts do not fit."""
        rows, columns = self.numbers.shape
        groups = self.scales.shape[-1]
        if self.scales.shape != (rows, groups) or self.zeros.shape != (rows, groups) or len(self.group_of) != columns:
            raise ValueError(f"scales {list(self.scales.shape)}, zero points {list(self.zeros.shape)}")
        if not 0 <= int(self.group_of.min()) <= int(self.group_of.max()) < groups:
            raise ValueError(f"{groups} groups, and columns of others")
        steps = self.numbers - self.zeros[:, self.group_of]
        return (steps * self.scales.float()[:, self.group_of]).to(dtype)


@dataclass(frozen=True)
class _Format:
    """A format: its name for the user, the part that tells a linear, all parts, and how they become integers.

    readable: whether a quantization_config describes integers that are read here. read: from its settings and the
    parts of a linear.
    """

    called: str
    sign: str
    parts: tuple[str, ...]
    readable: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], _Part], _Integers]


def can_read(config: Mapping[str, Any]) -> bool:
    """Whether the weights of a configuration are integers that `read_as_plain` makes plain."""
    return _format_of(config) is not None


def read_as_plain(folder: Path, target: Path) -> str:
    """Write a folder of integers to the empty folder `target` with plain weights; returns what to tell the user.

    Weights come in the dtype that the configuration names, else in that of their scales.
    Raises SparseGPTError where there are none, and, naming the linear, where its parts are missing or do not fit.
    """
    config = read_config(folder)
    form = _format_of(config)
    assert form is not None
    settings = config.pop(_KEY)
    files = weight_files(folder)
    linears = [name.removesuffix(f".{form.sign}") for name in files if name.endswith(f".{form.sign}")]
    if not linears:
        raise SparseGPTError(
            f"{folder}: {CONFIG} says that weights are quantised by {form.called}, and no tensor is called "
            f"*.{form.sign}: fetch the folder again, or take {_KEY} out of {CONFIG} if its weights are plain"
        )
    parts = {f"{linear}.{part}" for linear in linears for part in form.parts}
    said = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), None)
    names = [*files, *(f"{linear}.weight" for linear in linears)]
    with (
        OpenTensors(files) as tensors,
        ShardedWriter(target, header_room(names), DEFAULT_SHARD_BYTES, checksums=False) as writer,
    ):
        for name in files:
            if name not in parts:
                writer.add((name, tensors[name]))
        for linear in linears:
            writer.add((f"{linear}.weight", _weight(form, settings, folder, tensors, files, linear, said)))
    Beside.of(folder, report=True).copy_to(target, but=frozenset({CONFIG}))
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return (
        f"the weights of {len(linears)} linears were integers ({form.called}) and are read as the numbers that they "
        "stand for; give quantize to have integers again"
    )


def _weight(
    form: _Format,
    settings: Mapping[str, Any],
    folder: Path,
    tensors: OpenTensors,
    files: Mapping[str, Path],
    linear: str,
    said: torch.dtype | None,
) -> Tensor:
    def part(name: str) -> Tensor | None:
        return tensors[f"{linear}.{name}"] if f"{linear}.{name}" in files else None

    try:
        integers = form.read(settings, part)
        return integers.decode(said if isinstance(said, torch.dtype) else integers.scales.dtype)
    except (ValueError, RuntimeError, IndexError) as error:
        raise SparseGPTError(
            f"{folder}: the parts of {linear} are no integers as {form.called} writes them ({error}): fetch the "
            "folder again, or give the model as it was before"
        ) from error


def _needed(part: _Part, name: str) -> Tensor:
    found = part(name)
    if found is None:
        raise ValueError(f"no {name}")
    return found


def _read_compressed(settings: Mapping[str, Any], part: _Part) -> _Integers:
    words, scales = _needed(part, "weight_packed"), _needed(part, "weight_scale")
    rows, columns = _needed(part, "weight_shape").tolist()
    known = {group["weights"]["num_bits"] for group in settings["config_groups"].values()}
    fitting = [bits for bits in known if words.shape == (rows, -(-columns * bits // 32))]
    if len(fitting) != 1:
        raise ValueError(f"words {list(words.shape)} for {rows} x {columns} of {sorted(known)} bits")
    (bits,) = fitting
    zeros, group_of = part("weight_zero_point"), part("weight_g_idx")
    if zeros is None:
        unpacked = torch.full(scales.shape, 1 << bits - 1)
    else:
        unpacked = unpack_bits(zeros.T.contiguous(), bits, rows).T
    if group_of is None:
        group_of = torch.arange(columns) // -(-columns // scales.shape[1])
    return _Integers(unpack_bits(words, bits, columns), unpacked, scales, group_of.long())


def _read_gptq(settings: Mapping[str, Any], part: _Part) -> _Integers:
    words, zeros, scales = (_needed(part, name) for name in ("qweight", "qzeros", "scales"))
    bits, rows, columns = settings["bits"], words.shape[1], words.shape[0] * 32 // settings["bits"]
    # Version 1 keeps zero points less 1.
    less = settings.get("checkpoint_format") != "gptq_v2"
    group_of = part("g_idx")
    if group_of is None:
        group_of = torch.arange(columns) // -(-columns // len(scales))
    numbers = unpack_bits(words.T.contiguous(), bits, columns)
    return _Integers(numbers, unpack_bits(zeros, bits, rows).T + less, scales.T, group_of.long())


def _packs_integers(settings: Mapping[str, Any]) -> bool:
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or settings.get("sparsity_config"):
        return False
    formats = {settings.get("format"), *(group.get("format") or settings.get("format") for group in groups.values())}
    weights = [group.get("weights") or {} for group in groups.values()]
    return formats == {"pack-quantized"} and all(_few_bits(scheme.get("num_bits")) for scheme in weights)


def _is_plain_gptq(settings: Mapping[str, Any]) -> bool:
    return _few_bits(settings.get("bits")) and settings.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2")


def _few_bits(bits: Any) -> bool:
    return type(bits) is int and 2 <= bits <= 8


_FORMATS = {
    "compressed-tensors": _Format(
        "compressed-tensors",
        "weight_packed",
        ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
        _packs_integers,
        _read_compressed,
    ),
    "gptq": _Format("GPTQ", "qweight", ("qweight", "qzeros", "scales", "g_idx"), _is_plain_gptq, _read_gptq),
}


def _format_of(config: Mapping[str, Any]) -> _Format | None:
    settings = config.get(_KEY)
    if not isinstance(settings, Mapping):
        return None
    form = _FORMATS.get(str(settings.get("quant_method")))
    return form if form is not None and form.readable(settings) else None
