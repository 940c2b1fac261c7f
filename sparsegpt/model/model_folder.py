"""What a local model folder must look like before anything in it is read in earnest."""

from pathlib import Path

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.headers import read_header
from sparsegpt.files.inside import check_inside
from sparsegpt.files.model_files import read_config, read_index

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def check_folder(folder: Path) -> None:
    """A configuration and weights must be there, every shard of an index, and whole safetensors files.

    Raises SparseGPTError naming the file.
    """
    if not (folder / "config.json").is_file():
        raise SparseGPTError(f"model folder {folder} has no config.json: expected a Hugging Face model folder")
    read_config(folder)
    if not any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        raise SparseGPTError(f"model folder {folder} has no weights: expected {' or '.join(WEIGHT_FILES)}")
    for index in sorted(folder.glob("*.index.json")):
        read_index(index)
    for path in sorted(folder.glob("*.safetensors")):
        read_header(check_inside(folder, path))
