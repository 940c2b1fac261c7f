"""The files of a model folder that are read by name: config.json, the index, the weights. All lie in the folder itself.

An index comes from strangers: it names files beside it, and nothing else.
"""

from pathlib import Path, PurePosixPath
from typing import Any

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.checked_json import read_json, read_object
from sparsegpt.files.headers import read_header
from sparsegpt.files.inside import check_inside
from sparsegpt.files.tensor_files import INDEX, WEIGHTS

CONFIG = "config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises SparseGPTError where there is none or it is no JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        raise SparseGPTError(f"{folder}: expected a Hugging Face folder with config.json; found none")
    return read_object(check_inside(folder, path))


def weight_files(folder: Path) -> dict[str, Path]:
    """{tensor name: file} of a folder, single file or sharded; raises SparseGPTError without either."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():  # as transformers does, which looks for the index only where there is no single file
        return dict.fromkeys(read_header(check_inside(folder, single)).entries, single)
    if not index.is_file():
        raise SparseGPTError(f"{folder}: expected {WEIGHTS} or {INDEX}; found neither")
    return read_index(index)


def read_index(index: Path) -> dict[str, Path]:
    """{tensor name: file} of an index, every file beside it. Raises SparseGPTError for an index that says otherwise."""
    named = indexed_names(index)
    files = {name: index.with_name(name) for name in dict.fromkeys(named.values())}
    for name, path in files.items():
        if not path.is_file():
            raise SparseGPTError(f"{index} names the shard {name}, which is not there: fetch it")
        check_inside(index.parent, path)
    return {tensor: files[name] for tensor, name in named.items()}


def indexed_names(index: Path) -> dict[str, str]:
    """{tensor name: file name} of an index. Raises SparseGPTError for one that names anything but files beside it."""
    content = read_json(check_inside(index.parent, index))
    named = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise SparseGPTError(f"{index} has no weight_map of tensor names to file names: fetch the file again")
    for name in dict.fromkeys(named.values()):
        check_name(index, name)
    return named


def check_name(where: Path, name: str) -> None:
    """Raises SparseGPTError unless a name that a file gives is that of a file beside it."""
    if PurePosixPath(name).name != name or name in ("", "..") or "\\" in name or not name.isprintable():
        raise SparseGPTError(f"{where} names {name!r}, expected a file beside it: do not use this model")
