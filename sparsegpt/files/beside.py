"""What lies beside the weights of a model folder, and comes along when the folder is written with other weights."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.checked_json import PAGE_NAME, REPORT_NAME
from sparsegpt.files.inside import homes, is_inside
from sparsegpt.files.results import MARKER

# Suffixes of files that hold weights, in whatever form.
WEIGHT_SUFFIXES = (
    *("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5", "msgpack", "onnx", "onnx_data", "ot"),
    *("tflite", "npz"),
)
_WEIGHTS = re.compile(rf".*\.({'|'.join(WEIGHT_SUFFIXES)})(\.index(\.\w+)?\.json)?", re.IGNORECASE)
# Of version control, of downloads and of Python.
_CACHES = frozenset({".git", ".cache", ".huggingface", "__pycache__"})
# Folders of this program at work.
_AT_WORK = re.compile(r"\..+\.(unfinished|\d+\.(writing|old))")
ADAPTER = "adapter_config.json"
_NAMED = 3


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, or says which files do."""
    return _WEIGHTS.fullmatch(name) is not None


@dataclass(frozen=True)
class Beside:
    """The files of a folder that are not weights, as they were when it was looked at.

    files: paths inside the folder. weights: files of weights, which stay behind. outside: links that lead out of the
    folder, or to folders, and whatever is no regular file: not followed, left behind too.
    """

    folder: Path
    files: tuple[PurePath, ...]
    weights: tuple[PurePath, ...]
    outside: tuple[PurePath, ...]

    @classmethod
    def of(cls, folder: Path, *, report: bool = False) -> "Beside":
        """Look at a folder; SparseGPTError where it cannot be read.

        What this program says of a folder that it has written does not hold for another; its report does, if asked for,
        from which a page can be made anew.
        """
        left = {PurePath(MARKER), PurePath(PAGE_NAME)} | (set() if report else {PurePath(REPORT_NAME)})
        files, weights, outside = [], [], []
        try:
            places = homes(folder)
            for path in _walk(folder):
                inside = path.relative_to(folder)
                if inside in left:
                    continue
                if is_weights(path.name) and not _of_an_adapter(path):
                    weights.append(inside)
                elif path.is_file() and is_inside(path, places):
                    files.append(inside)
                else:
                    outside.append(inside)
        except (OSError, RuntimeError) as error:  # RuntimeError: links that form a circle
            raise SparseGPTError(f"model folder {folder} cannot be read: {error}") from error
        return cls(folder, tuple(files), tuple(weights), tuple(outside))

    def copy_to(self, target: Path, *, but: frozenset[str] = frozenset()) -> None:
        """Copy the files, byte for byte, except those of these names; OSError as the system raises it."""
        for inside in self.files:
            if str(inside) not in but:
                (target / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / inside, target / inside)


def some(names: tuple[PurePath, ...] | tuple[str, ...]) -> str:
    """The first few names, and how many there are more."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + more


def _walk(folder: Path) -> Iterator[Path]:
    """Everything that is no folder, links to folders among it, by name; caches and what is at work left out."""

    def refuse(error: OSError) -> None:
        raise error

    for where, folders, names in os.walk(folder, onerror=refuse):
        links = [name for name in folders if Path(where, name).is_symlink()]
        kept = {name for name in folders if name not in _CACHES and not _AT_WORK.fullmatch(name)}
        folders[:] = sorted(kept - set(links))
        for name in sorted([*names, *(link for link in links if link in kept)]):
            if name not in _CACHES:
                yield Path(where, name)


def _of_an_adapter(path: Path) -> bool:
    """Weights of a small model of its own, which some models load from a folder inside theirs."""
    return path.name.startswith("adapter_model.") and (path.parent / ADAPTER).is_file()
