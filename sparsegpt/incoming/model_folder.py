"""What a model folder must look like before anything in it is read in earnest."""

from pathlib import Path

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.headers import read_header
from sparsegpt.files.inside import check_inside
from sparsegpt.files.model_files import CONFIG, read_config, read_index
from sparsegpt.incoming.kinds import TOKENIZER, describe, matching
from sparsegpt.incoming.kinds import WEIGHTS as WEIGHT_FILES


def look_over(folder: Path) -> None:
    """Refuse a folder that is no model's, saying what it is. Raises SparseGPTError."""
    try:
        found = describe(folder)
    except OSError as error:
        raise SparseGPTError(f"model folder {folder} cannot be read: {error.strerror or error}") from error
    if found:
        raise SparseGPTError(f"model folder {folder} {found}")


def check_folder(folder: Path) -> None:
    """A configuration and weights must be there, every shard of an index, and whole safetensors files.

    Raises SparseGPTError naming the file, or the kind of folder that it is.
    """
    look_over(folder)
    if not (folder / CONFIG).is_file():
        raise SparseGPTError(
            f"model folder {folder} has no config.json: expected a Hugging Face model folder; fetch or save it whole"
        )
    read_config(folder)
    if not any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        raise SparseGPTError(
            f"model folder {folder} has no weights: expected {' or '.join(WEIGHT_FILES)}; fetch or save it whole"
        )
    of_safetensors = any(folder.glob("*.safetensors"))
    for index in sorted(folder.glob("*.index.json")):
        single = folder / index.name.removesuffix(".index.json")
        # Those of other forms are not read then, nor is one beside the whole file.
        if (not of_safetensors or ".safetensors." in index.name) and not single.is_file():
            read_index(index)
    for path in sorted(folder.glob("*.safetensors")):
        read_header(check_inside(folder, path))


def check_tokenizer(name: str, folder: Path) -> None:
    """Refuse a folder without any file that a tokenizer is read from. Raises SparseGPTError."""
    if not matching([path.name for path in folder.iterdir()], TOKENIZER):
        raise no_tokenizer(name, folder)


def no_tokenizer(name: str, folder: Path) -> SparseGPTError:
    """The refusal of a model whose texts nobody could read."""
    return SparseGPTError(
        f"model {name!r} has no tokenizer: copy tokenizer.json and tokenizer_config.json of the model that it was made "
        f"from into {folder}"
    )
