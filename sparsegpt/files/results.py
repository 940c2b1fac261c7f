"""Results: folders that this program has written, who may replace them, and who writes one now.

    .sparsegpt.json               in a result: what wrote it, and size and sha256 of each of its files
    .<name>.unfinished/lock       beside it: held by the process that writes the result `name`

Only a result is ever replaced, and only what is in its marker is removed with it. Everything else is a person's own.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.folders import is_full_disk, new_folder, recover, write_atomically

MARKER = ".sparsegpt.json"
LOCK = "lock"
_READ = 1 << 24
_ATTEMPTS = 3  # to get the lock while others remove its folder
# Large, and with checksums of their own in their headers.
_WEIGHTS = ".safetensors"


def check_target(target: Path, *, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Refuse an output folder that cannot be written, before hours of work go into what it should hold.

    sources: folders that the work reads. Raises SparseGPTError for a link, a file, a folder that is no result of this
    program, one that is being read or lies inside such a folder, and the current folder or one around it.
    """
    if target.absolute().name in ("", ".."):
        raise _refusal(f"output {target} has no name of its own: give the folder to write")
    try:
        _check_there(target)
        _check_apart(target, sources)
        _check_content(target, overwrite=overwrite)
    except OSError as error:  # a name too long, a folder that may not be read
        raise _refusal(f"output {target} cannot be used ({error}): choose another") from error


def _check_there(target: Path) -> None:
    if target.is_symlink():
        raise _refusal(f"output {target} is a symbolic link: give the real folder")
    if target.exists() and not target.is_dir():
        raise _refusal(f"output {target} is a file: expected a folder; choose another")
    if target.is_dir() and not os.access(target, os.W_OK):
        raise _refusal(f"output folder {target} is not writable: choose another")
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise _refusal(f"output folder {target} cannot be made: {parent} is a file; choose another")
    if not os.access(parent, os.W_OK):
        raise _refusal(f"output folder {target} cannot be made: {parent} is not writable; choose another")


def _check_apart(target: Path, sources: Iterable[Path]) -> None:
    """By where paths really lead."""
    real, here = target.resolve(), Path.cwd().resolve()
    if here.is_relative_to(real):
        raise _refusal(f"output {target} is the current folder or holds it: choose another")
    for source in (source.resolve() for source in sources if source.is_dir()):
        if source.is_relative_to(real):
            raise _refusal(f"output {target} is the folder {source} that is read, or holds it: choose another")
        if real.is_relative_to(source):
            raise _refusal(f"output {target} lies inside {source}, which is read: choose another")


def _check_content(target: Path, *, overwrite: bool) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise _refusal(
            f"output folder {target} exists and is not empty: allow to replace it, or choose another", "overwrite"
        )
    known = read_marker(target)
    if known is None:
        raise _refusal(
            f"output folder {target} was not written by this program, and only its results are replaced: choose "
            "another, or remove the folder yourself"
        )
    if own := _of_others(target, known):
        raise _refusal(
            f"output folder {target} holds {own[0]}, which this program did not write or which has changed since: move "
            "it away, or choose another"
        )


def _refusal(message: str, *settings: str) -> SparseGPTError:
    return SparseGPTError(message, settings=(*settings, "out"))


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What a result says of its files: {name: {size, sha256 or None}}; None for a folder that is no result."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return {str(name): {"size": int(entry["size"]), "sha256": entry["sha256"]} for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def is_whole(folder: Path) -> bool:
    """Whether a result holds every file of its marker as it was written; weights are checked by their sizes alone."""
    known = read_marker(folder)
    return known is not None and all(_is_as_written(folder / name, entry) for name, entry in known.items())


def write_marker(folder: Path, command: str) -> None:
    """Mark a finished folder as a result of `command`."""
    files = {str(path.relative_to(folder)): _described(path) for path in _files_of(folder)}
    write_atomically(
        folder / MARKER, json.dumps({"written_by": f"sparsegpt {command}", "files": files}, indent=1) + "\n"
    )


@contextmanager
def new_result(target: Path, command: str, *, overwrite: bool, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """A folder to fill that becomes the result `target`, for a command that holds no claim yet; see `claimed`."""
    check_target(target, overwrite=overwrite, sources=sources)
    with claimed(target), filled(target, command, overwrite=overwrite, sources=sources) as draft:
        yield draft


@contextmanager
def filled(target: Path, command: str, *, overwrite: bool, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """`new_result` for whoever holds the claim."""
    check_target(target, overwrite=overwrite, sources=sources)
    with new_folder(target) as draft:
        yield draft
        write_marker(draft, command)


@contextmanager
def claimed(target: Path) -> Iterator[Path]:
    """Be the only process that writes `target`; gives the folder for unfinished work, which goes when it is empty.

    What a killed process left beside the target is cleared away, and a result that it had moved aside comes back.
    Raises SparseGPTError when another process is writing, or when a link stands where the folder should be.
    """
    folder = unfinished_folder(target)
    with writing(folder):
        made = [parent for parent in folder.parents if not parent.exists()]
        lock = _acquire(folder, target)
    try:
        with writing(folder):
            recover(target)
        yield folder
    finally:
        with suppress(OSError):
            if {path.name for path in folder.iterdir()} <= {LOCK}:
                # The lock last, because whoever finds none may begin here.
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
                for parent in made:  # where nothing came of it; a folder with a result in it stays
                    parent.rmdir()
        lock.release()


def unfinished_folder(target: Path) -> Path:
    """Where unfinished work on a result lies."""
    return target.absolute().parent / f".{target.absolute().name}.unfinished"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the system's refusals into one line."""
    try:
        yield
    except Exception as error:
        if is_full_disk(error):
            raise SparseGPTError(f"no space left while writing {folder}: free space") from error
        if isinstance(error, OSError):
            raise _refusal(f"{folder} cannot be written ({error}): choose another output folder") from error
        raise


def _acquire(folder: Path, target: Path) -> FileLock:
    for attempt in range(_ATTEMPTS):
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder, folder / LOCK):
            if path.is_symlink():
                raise SparseGPTError(f"{path} is a symbolic link: expected this program's own; remove it")
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
            return lock
        except Timeout as error:
            raise _refusal(f"another process is writing {target}: wait for it, or choose another") from error
        except FileNotFoundError:  # its former user has just removed the folder
            if attempt + 1 == _ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def _of_others(folder: Path, known: dict[str, Any]) -> list[str]:
    """Files of a result that it was not written with."""
    found = {str(path.relative_to(folder)): path for path in _files_of(folder)}
    return sorted(name for name, path in found.items() if name not in known or not _is_as_written(path, known[name]))


def _files_of(folder: Path) -> Iterator[Path]:
    return (
        path
        for path in sorted(folder.rglob("*"))
        if path != folder / MARKER and (path.is_symlink() or not path.is_dir())
    )


def _described(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": None if path.suffix == _WEIGHTS else _digest(path)}


def _is_as_written(path: Path, entry: dict[str, Any]) -> bool:
    try:
        if path.is_symlink() or path.stat().st_size != entry["size"]:
            return False
        return entry["sha256"] is None or _digest(path) == entry["sha256"]
    except OSError:
        return False


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ):
            digest.update(part)
    return digest.hexdigest()
