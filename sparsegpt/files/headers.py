"""What a safetensors file says of its tensors, read with suspicion: a header may be damaged, or written by anybody.

    file = length of header (8 bytes, little-endian) | header (JSON, padded with spaces) | data of the tensors, no holes
    header = {"<tensor>": {"dtype", "shape", "data_offsets": [first byte, byte after the last]}, "__metadata__": {...}}

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError, first_line

_METADATA = "__metadata__"
_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DIMENSIONS = 64  # torch's own
_LONGEST_NAME = 1000
_MAX_BYTES = 1 << 63  # of a tensor, counting empty dimensions as 1, as strides do
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.complex64: "C64",
}
# Types of the format that files here do not hold: they are known by their size alone.
_OTHER_BITS = {"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_BITS = {code: 8 * dtype.itemsize for dtype, code in CODES.items()} | _OTHER_BITS


@dataclass(frozen=True)
class Header:
    """What a file says about itself: entries {name: {dtype, shape, data_offsets}}, metadata, where the data starts."""

    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Header of a safetensors file, every entry checked against the others and against the size of the file.

    Raises SparseGPTError naming the file when it cannot be read, is cut short or malformed.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would never end
            raise ValueError("it is no regular file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, found.st_size - 8):
                raise ValueError(f"header of {length} bytes in a file of {found.st_size}")
            entries = json.loads(file.read(length).decode(), object_pairs_hook=_without_twins)
        if not isinstance(entries, dict):
            raise ValueError("the header is no JSON object")
        metadata = entries.pop(_METADATA, {})
        _check_metadata(metadata)
        for name, entry in entries.items():
            _check_entry(name, entry)
        _check_offsets(entries, found.st_size - 8 - length)
    except OSError as error:
        raise SparseGPTError(f"{path} cannot be read ({error.strerror or error}): copy or create it again") from error
    except (ValueError, RecursionError) as error:
        raise SparseGPTError(
            f"{path} is truncated or damaged ({first_line(error)}): copy or create it again"
        ) from error
    return Header(entries, metadata, 8 + length)


def stored_dtype(path: Path, name: str, code: str) -> torch.dtype:
    """The dtype that a header calls so; SparseGPTError, naming file and tensor, for one that torch has not."""
    for dtype, known in CODES.items():
        if known == code:
            return dtype
    raise SparseGPTError(f"{path}: {name} is of type {code}: expected one of {', '.join(CODES.values())}")


def check_storable(name: str, dtype: torch.dtype) -> None:
    """SparseGPTError, naming the tensor, for a dtype that files here do not hold."""
    if dtype not in CODES:
        raise SparseGPTError(f"{name}: safetensors files here hold no {dtype}; leave this tensor out")


def meta_tensor(entry: dict[str, Any]) -> Tensor:
    """A tensor on the meta device as an entry of a `Header` describes it; SparseGPTError for an unknown dtype."""
    for dtype, code in CODES.items():
        if code == entry["dtype"]:
            return torch.empty(entry["shape"], dtype=dtype, device="meta")
    raise SparseGPTError(f"safetensors files here hold no {entry['dtype']}; update sparsegpt")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a name that stands twice, of which readers take one or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{ascii(twin)[:80]} stands twice")
    return found


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_METADATA} is no object of texts")


def _check_entry(name: str, entry: Any) -> None:
    """ValueError for a name that no line can show, and for a type, shape and place in the file that do not fit."""
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ValueError(f"a tensor is called {ascii(name)[:80]}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has another form than dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _BITS:
        raise ValueError(f"{name} is of the unknown type {str(code)[:40]!r}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{name} has a shape that is no list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has data_offsets that are no two sizes")
    if math.prod(max(1, size) for size in shape) * _BITS[code] >= 8 * _MAX_BYTES:
        raise ValueError(f"{name} has the absurd shape {shape}")
    if math.prod(shape) * _BITS[code] != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{name}, {code} of shape {shape}, has {offsets[1] - offsets[0]} bytes")


def _are_sizes(values: Any) -> bool:
    """Whole numbers from 0 to 2^63; bool is no number here."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MAX_BYTES for value in values)


def _check_offsets(entries: dict[str, dict[str, Any]], data_bytes: int) -> None:
    """The data of the tensors must fill the rest of the file exactly, without holes or overlaps."""
    position = 0
    for start, end in sorted(entry["data_offsets"] for entry in entries.values()):
        if start != position:
            raise ValueError(f"tensor data expected at byte {position}, found {start}..{end}")
        position = end
    if position != data_bytes:
        raise ValueError(f"{position} bytes of tensors expected, {data_bytes} found")
