"""Where a model comes from: its folder, the tensors of its files, and what lies beside them.

A model on the Hub is brought into the cache whole, weights of other formats left out; from there on it is a folder.
"""

import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.beside import WEIGHT_SUFFIXES, Beside, some
from sparsegpt.files.figures import CARD_NAME
from sparsegpt.files.headers import read_header, stored_dtype
from sparsegpt.files.inside import check_inside
from sparsegpt.files.model_files import CONFIG, check_name, indexed_names, read_config, read_index
from sparsegpt.files.tensor_files import INDEX, WEIGHTS, OpenTensors
from sparsegpt.files.unchanged import Unchanged

# Where transformers looks for weights, the first that is there.
WEIGHT_FILES = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
# What weights are stored as and computed in; files may hold other tensors in other types.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# A key of configs that names the file of the weights.
FILE_KEY = "transformers_weights"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, by what the file says of it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Source:
    """A model's folder. tensors: those of the files that the loader reads, by name; beside: its other files.

    files: those of the weights, as they were when the folder was looked at.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    beside: Beside
    files: Unchanged

    @classmethod
    def of(cls, folder: Path) -> "Source":
        """Look at a folder; SparseGPTError, naming the file, where it is not whole."""
        tensors: dict[str, StoredTensor] = {}
        paths = weight_paths(folder)
        files = Unchanged.since_now(paths)
        for path in paths:
            tensors |= _tensors_of(path)
        return cls(folder, tensors, Beside.of(folder), files)

    @functools.cached_property
    def dtype(self) -> torch.dtype | None:
        """What most of the blocks' weights are stored as; None where none is of a dtype that models compute in."""
        in_blocks = {name: tensor for name, tensor in self.tensors.items() if any(map(str.isdigit, name.split(".")))}
        counts: dict[torch.dtype, int] = defaultdict(int)
        for tensor in (in_blocks or self.tensors).values():
            if tensor.dtype in FLOATS:
                counts[tensor.dtype] += tensor.numel
        return max(counts, key=lambda dtype: counts[dtype]) if counts else None

    @property
    def name(self) -> str:
        """The Hub id of a folder in the Hub's cache, else the folder's own name."""
        return hub_id(self.folder) or self.folder.absolute().name

    @functools.cached_property
    def config_file(self) -> bytes:
        """config.json, as it was when it was first asked for."""
        return (self.folder / CONFIG).read_bytes()

    @functools.cached_property
    def card(self) -> bytes | None:
        """README.md, as it was when it was first asked for; None without one."""
        return (self.folder / CARD_NAME).read_bytes() if PurePath(CARD_NAME) in self.beside.files else None

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        content: dict[str, Any] = json.loads(self.config_file)
        return content

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """These tensors with their names, file by file, as pages of the files where their form allows that."""
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.tensors[name].file].append(name)
        for path, inside in by_file.items():
            if path.suffix == ".safetensors":
                with OpenTensors(dict.fromkeys(inside, path)) as tensors:
                    yield from ((name, tensors.mapped(name)) for name in inside)
            else:
                content = _unpickled(path)
                yield from ((name, content[name]) for name in inside)

    def notes(self) -> Iterator[str]:
        """What the user should know of files that do not come along."""
        used = {tensor.file.relative_to(self.folder) for tensor in self.tensors.values()} | set(
            map(PurePath, WEIGHT_FILES)
        )
        if left := tuple(path for path in self.beside.weights if path not in used):
            yield f"left behind, as files of weights before pruning: {some(left)}"
        if hub_id(self.folder) and PurePath(CARD_NAME) not in self.beside.files:
            yield f"{CARD_NAME} of {self.name} is not in the Hub's cache: only files that are there come along"
        if self.beside.outside:
            yield f"left behind, as no regular files of the model folder: {some(self.beside.outside)}"


def stored_types(folder: Path) -> dict[str, str]:
    """{tensor: type, as its file calls it} of the weights that the loader reads; SparseGPTError without any."""
    types: dict[str, str] = {}
    for path in weight_paths(folder):
        if path.suffix == ".safetensors":
            types |= {name: str(entry["dtype"]) for name, entry in read_header(path).entries.items()}
        else:
            types |= {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in _tensors_of(path).items()}
    return types


def weight_paths(folder: Path) -> list[Path]:
    """The files that the loader reads the weights of a folder from; SparseGPTError where there are none.

    None of them lies outside of the folder.
    """
    named = read_config(folder).get(FILE_KEY)
    if isinstance(named, str):
        check_name(folder / CONFIG, named)
    for name in (named,) if isinstance(named, str) else WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            return sorted(set(read_index(path).values())) if path.suffix == ".json" else [check_inside(folder, path)]
    raise SparseGPTError(
        f"model folder {folder} has no weights that can be loaded: expected {' or '.join(WEIGHT_FILES)}"
    )


def fetched(hub: str, revision: str | None) -> Path:
    """The folder of a Hub model in the cache, with its weights and every other file; raises what the client raises.

    Without network, what is in the cache must do.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    folder = Path(hf_hub_download(hub, CONFIG, revision=revision)).parent
    commit = folder.name  # from here on all files are of one state
    with suppress(Exception):  # without network, in whatever words; `Source.notes` tells of what then is not there
        snapshot_download(hub, revision=commit, ignore_patterns=[f"*.{suffix}" for suffix in WEIGHT_SUFFIXES])
    for name in WEIGHT_FILES:
        try:
            path = Path(hf_hub_download(hub, name, revision=commit))
        except EntryNotFoundError:
            continue
        for shard in sorted(set(indexed_names(path).values())) if path.suffix == ".json" else ():
            hf_hub_download(hub, shard, revision=commit)
        return folder
    raise SparseGPTError(
        f"model {hub!r} has no weights on the Hub, or none in the cache and no network: expected one of "
        f"{', '.join(WEIGHT_FILES)}"
    )


def cached(hub: str, revision: str | None) -> Path | None:
    """The folder of a Hub model in the cache, as far as it is there; None where it is not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub, CONFIG, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def hub_id(folder: Path) -> str | None:
    """ "org/name" of <cache>/models--org--name/snapshots/<commit>; None for any other folder."""
    snapshots = folder.absolute().parent
    kind, _, name = snapshots.parent.name.partition("--")
    return name.replace("--", "/", 1) if snapshots.name == "snapshots" and kind == "models" and name else None


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    if path.suffix == ".safetensors":
        entries = read_header(path).entries
        return {
            name: StoredTensor(path, stored_dtype(path, name, entry["dtype"]), tuple(entry["shape"]))
            for name, entry in entries.items()
        }
    return {
        name: StoredTensor(path, value.dtype, tuple(value.shape))
        for name, value in _unpickled(path, weightless=True).items()
        if isinstance(value, Tensor)
    }


def _unpickled(path: Path, *, weightless: bool = False) -> dict[str, Any]:
    """The content of a pickled file, mapped where its form allows that; weightless: on the meta device."""
    try:
        content: dict[str, Any] = torch.load(
            path,
            map_location="meta" if weightless else "cpu",
            weights_only=True,
            mmap=not weightless and is_zipfile(path),
        )
    except Exception as error:  # whatever a damaged pickle leads to
        raise SparseGPTError(f"{path} cannot be read ({type(error).__name__}): fetch the file again") from error
    if not isinstance(content, dict):
        raise SparseGPTError(f"{path} holds {type(content).__name__}: expected a dict of tensors")
    return content
