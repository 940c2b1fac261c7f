"""safetensors files written one tensor at a time, with a checksum for every tensor, and read one at a time.

    header["__metadata__"]["sparsegpt_sha256"] = JSON {tensor name: sha256 of its dtype, shape and bytes}

The format's own library writes a whole file from tensors that are all in memory; here room for the header is kept free,
the data streams after it and the header is filled in last, so a file needs the memory of one tensor. The checksum
covers what the header says about a tensor, so a damaged header is found as well (headers.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.files.headers import CODES, Header, check_storable, read_header, stored_dtype

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHECKSUMS = "sparsegpt_sha256"
DEFAULT_SHARD_BYTES = 5_000_000_000
_BYTES_PER_ENTRY = 320  # of header a tensor: its entry and its checksum; names are counted on top
_READ = 1 << 24


def tensor_checksum(tensor: Tensor) -> str:
    """sha256 (hex) of a tensor's safetensors dtype, shape and bytes."""
    digest = _new_digest(_code(tensor), list(tensor.shape))
    digest.update(memoryview(_bytes_of(tensor)))
    return str(digest.hexdigest())


def verify_checksums(path: Path) -> frozenset[str]:
    """Read a file once and compare every tensor with its checksum, before anyone uses one; returns their names.

    Raises SparseGPTError naming the file and the tensor: truncated, damaged, or written without checksums.
    """
    header = read_header(path)
    checksums = _read_checksums(path, header)
    with _naming(path), path.open("rb") as file:
        for name, entry in header.entries.items():
            if _entry_digest(file, header.data_start, entry) != checksums.get(name):
                raise SparseGPTError(f"{path}: checksum of {name} does not match: the file is damaged; copy it again")
    return frozenset(header.entries)


def header_room(names: Iterable[str]) -> int:
    """Bytes of header that surely suffice for these tensors in one file."""
    return 4096 + sum(_BYTES_PER_ENTRY + 2 * len(json.dumps(name)) for name in names)


class OpenTensors:
    """Tensors of several files {tensor name: file}, each file opened once, each tensor read when asked for.

    Use as a context manager; iterates over the names. Whatever is wrong with a file is a SparseGPTError that names it,
    one that becomes shorter meanwhile too.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._stack = ExitStack()
        self._open: dict[Path, tuple[IO[bytes], Header]] = {}
        self._pages: dict[Path, Any] = {}

    @classmethod
    def of_file(cls, path: Path) -> OpenTensors:
        """All tensors of one file. Raises SparseGPTError as `read_header`."""
        return cls(dict.fromkeys(read_header(path).entries, path))

    def __enter__(self) -> OpenTensors:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, self._entry(name)["shape"])

    def row(self, name: str, index: int) -> Tensor:
        """`self[name][index]`, without reading the rest of the tensor."""
        return self._read(name, self._entry(name)["shape"][1:], index)

    def mapped(self, name: str) -> Tensor:
        """`self[name]` as pages of the file, which must stay as it is for as long as they are used (unchanged.py)."""
        path = self._files[name]
        self._entry(name)  # says more of what is wrong than the library does
        with _naming(path):
            if path not in self._pages:
                self._pages[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            tensor: Tensor = self._pages[path].get_tensor(name)
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """`self[name].dtype`, without reading the tensor."""
        return stored_dtype(self._files[name], name, self._entry(name)["dtype"])

    def shapes(self) -> dict[str, list[int]]:
        """{tensor name: shape}, from the headers; SparseGPTError for a file that is cut short or lacks a tensor."""
        return {name: self._entry(name)["shape"] for name in self._files}

    def _read(self, name: str, shape: list[int], row: int = 0) -> Tensor:
        path, entry = self._files[name], self._entry(name)
        file, header = self._open[path]
        # Said, because loaders make models with another device as the default, "meta" among them.
        tensor = torch.empty(shape, dtype=self.dtype(name), device="cpu")
        with _naming(path):
            file.seek(header.data_start + entry["data_offsets"][0] + row * tensor.nbytes)
            if file.readinto(memoryview(_bytes_of(tensor))) != tensor.nbytes:  # type: ignore[attr-defined]
                raise SparseGPTError(f"{path} became shorter while it was read, {name} is cut: copy or create it again")
        return tensor

    def _entry(self, name: str) -> dict[str, Any]:
        """What the file says of a tensor."""
        path = self._files[name]
        if path not in self._open:
            header = read_header(path)
            with _naming(path):
                self._open[path] = self._stack.enter_context(path.open("rb")), header
        entries = self._open[path][1].entries
        if name not in entries:
            raise SparseGPTError(f"{path}: the index promises {name}, which is not there; copy the folder again")
        return entries[name]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what the library and the system raise for a file into one line that names it."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise SparseGPTError(
            f"{path} is truncated or damaged ({first_line(error)}): copy or create it again"
        ) from error


@dataclass
class ShardedWriter:
    """Writes tensors into `folder` one by one: a new shard when the next tensor would pass `shard_bytes`.

    Use as a context manager; a clean exit names the files as transformers expects and writes the index for several.
    `room` is the header space kept free in each shard, from `header_room` over every name that will come.
    """

    folder: Path
    room: int
    shard_bytes: int = DEFAULT_SHARD_BYTES
    checksums: bool = True
    _shards: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    _digests: dict[str, str] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)
    _file: IO[bytes] | None = None
    _position: int = 0  # bytes of data in the shard being written

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._finish_shard()
            self._name_files()
        elif self._file is not None:
            self._file.close()

    def add(self, *named: tuple[str, Tensor]) -> None:
        """Append tensors that belong into the same shard."""
        incoming = sum(tensor.nbytes for _, tensor in named)
        if self._file is None or (self._shards[-1] and self._position + incoming > self.shard_bytes):
            self._finish_shard()
            self._start_shard()
        for name, tensor in named:
            self._append(name, tensor)

    def _append(self, name: str, tensor: Tensor) -> None:
        assert self._file is not None
        if name in self._names:
            raise SparseGPTError(f"{self.folder}: {name} comes twice: its source is not what it says it is")
        self._names.add(name)
        self._file.write(memoryview(_bytes_of(tensor)))
        offsets = [self._position, self._position + tensor.nbytes]
        self._position = offsets[1]
        self._shards[-1][name] = {"dtype": _code(tensor), "shape": list(tensor.shape), "data_offsets": offsets}
        if self.checksums:
            self._digests[name] = tensor_checksum(tensor)

    def _start_shard(self) -> None:
        self._shards.append({})
        self._file = self._path(len(self._shards) - 1).open("wb")
        self._file.seek(8 + self.room)
        self._position = 0

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        metadata = {"format": "pt"}
        if self.checksums:
            metadata[CHECKSUMS] = json.dumps({name: self._digests[name] for name in self._shards[-1]})
        header = json.dumps({"__metadata__": metadata, **self._shards[-1]}).encode()
        if len(header) > self.room:
            raise SparseGPTError(f"{self.folder}: header of {len(header)} bytes, room for {self.room} was kept")
        self._file.seek(0)
        self._file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self._file.close()
        self._file = None

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard}.safetensors.partial"

    def _name_files(self) -> None:
        count = len(self._shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count != 1 else [WEIGHTS]
        for shard, name in enumerate(names):
            self._path(shard).rename(self.folder / name)
        if count > 1:
            total = sum(e["data_offsets"][1] - e["data_offsets"][0] for shard in self._shards for e in shard.values())
            places = {tensor: names[i] for i, shard in enumerate(self._shards) for tensor in shard}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _code(tensor: Tensor) -> str:
    check_storable("a tensor", tensor.dtype)
    return CODES[tensor.dtype]


def _bytes_of(tensor: Tensor) -> Any:
    """The tensor's bytes as a flat numpy array, without a copy when it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _new_digest(code: str, shape: list[int]) -> Any:
    return hashlib.sha256(f"{code} {shape}\n".encode())


def _entry_digest(file: IO[bytes], data_start: int, entry: dict[str, Any]) -> str:
    start, end = entry["data_offsets"]
    digest = _new_digest(entry["dtype"], entry["shape"])
    file.seek(data_start + start)
    for position in range(start, end, _READ):
        digest.update(file.read(min(_READ, end - position)))
    return str(digest.hexdigest())


def _read_checksums(path: Path, header: Header) -> dict[str, str]:
    try:
        return dict(json.loads(header.metadata[CHECKSUMS]))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise SparseGPTError(
            f"{path}: no readable checksums in the header; pack the model again with this package"
        ) from error
