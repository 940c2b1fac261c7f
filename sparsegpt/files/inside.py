"""What lies inside a folder. A folder may come from strangers: what its files name, and where its links lead, does not.

In a snapshot of the Hub's cache every file is a link into the blobs beside the snapshots, and so inside.
"""

from collections.abc import Iterator
from pathlib import Path

from sparsegpt.errors import SparseGPTError, first_line


def homes(folder: Path) -> tuple[Path, ...]:
    """Where the files of a folder may really lie; OSError as the system raises it."""
    return tuple(_homes(folder))


def _homes(folder: Path) -> Iterator[Path]:
    real = folder.resolve()
    yield real
    # <cache>/models--org--name/snapshots/<commit>, and <cache>/models--org--name/blobs
    cache = real.parent.parent
    blobs = cache / "blobs"
    if real.parent.name == "snapshots" and "--" in cache.name and blobs.is_dir() and not blobs.is_symlink():
        yield blobs


def is_inside(path: Path, places: tuple[Path, ...]) -> bool:
    """Whether a path really leads into one of the `homes` of a folder; OSError as the system raises it."""
    real = path.resolve()
    return any(real.is_relative_to(place) for place in places)


def check_inside(folder: Path, path: Path) -> Path:
    """The path itself; SparseGPTError where a link on it leads out of the folder."""
    try:
        inside = is_inside(path, homes(folder))
    except (OSError, RuntimeError) as error:  # RuntimeError: links that form a circle
        raise SparseGPTError(f"{path} cannot be read: {first_line(error)}") from error
    if not inside:
        raise SparseGPTError(f"{path} is a link that leads out of {folder}: put the file itself there")
    return path
