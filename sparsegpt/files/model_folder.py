"""What a local model folder must look like before anything in it is read in earnest."""

from pathlib import Path, PurePosixPath

from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.files.checked_json import read_json

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def check_folder(folder: Path) -> None:
    """A configuration and weights must be there, every shard of an index, and whole safetensors files.

    Raises SparseGPTError naming the file.
    """
    if not (folder / "config.json").is_file():
        raise SparseGPTError(f"model folder {folder} has no config.json: expected a Hugging Face model folder")
    read_json(folder / "config.json")
    if not any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        raise SparseGPTError(f"model folder {folder} has no weights: expected {' or '.join(WEIGHT_FILES)}")
    for index in sorted(folder.glob("*.index.json")):
        _check_index(index)
    for path in sorted(folder.glob("*.safetensors")):
        _check_whole(path)


def _check_index(index: Path) -> None:
    """Every shard it names must lie in the folder itself: an index comes from strangers."""
    content = read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise SparseGPTError(f"{index} has no weight_map of tensor names to file names: fetch the file again")
    for name in sorted(set(files.values())):
        if PurePosixPath(name).name != name or name in ("", "..") or "\\" in name:
            raise SparseGPTError(f"{index} names {name!r}, expected a file beside it: do not use this model")
        if not (index.parent / name).is_file():
            raise SparseGPTError(f"{index} names the shard {name}, which is not there: fetch it")


def _check_whole(path: Path) -> None:
    """A safetensors file opens only if its header parses and its length is what the header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise SparseGPTError(f"{path} is truncated or damaged ({first_line(error)}): fetch the file again") from error
