"""Folders that appear whole or not at all.

A new folder is written beside its target under a temporary name, flushed to disk and renamed. An old result is moved
aside first and removed only after the new one has taken its place, so that a full disk, a kill or a power cut leaves
the old folder or the new one, never half of either.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsegpt.errors import SparseGPTError


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that cannot be written, before hours of work go into what it should hold."""
    if target.absolute().name in ("", ".."):
        raise SparseGPTError(f"output {target} has no name of its own: give the folder to write as --out")
    try:
        _check_place(target, overwrite=overwrite)
    except OSError as error:  # a name too long, a folder that may not be read
        raise SparseGPTError(f"output {target} cannot be used ({error}): choose another --out") from error


def _check_place(target: Path, *, overwrite: bool) -> None:
    if target.is_symlink():
        raise SparseGPTError(f"output {target} is a symbolic link: give the real folder as --out")
    if target.exists() and not target.is_dir():
        raise SparseGPTError(f"output {target} is a file: expected a folder; choose another --out")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise SparseGPTError(f"output folder {target} exists and is not empty: give --overwrite or another --out")
    if target.is_dir() and not os.access(target, os.W_OK):
        raise SparseGPTError(f"output folder {target} is not writable: choose another --out")
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise SparseGPTError(f"output folder {target} cannot be made: {parent} is a file; choose another --out")
    if not os.access(parent, os.W_OK):
        raise SparseGPTError(f"output folder {target} cannot be made: {parent} is not writable; choose another --out")


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill; when the block ends well it becomes `target`, else it is removed.

    Raises SparseGPTError when the target is in the way or the disk is full.
    """
    check_target(target, overwrite=overwrite)
    target = target.absolute()
    draft = target.with_name(f".{target.name}.{os.getpid()}.writing")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        yield draft
        for path in [*draft.rglob("*"), draft]:
            flush(path)
        _swap(draft, target)
    except Exception as error:
        if not is_full_disk(error):
            if isinstance(error, OSError):
                raise SparseGPTError(f"{target} was not written, what was there is untouched: {error}") from error
            raise
        raise SparseGPTError(
            f"no space left while writing {target}: what was there before is untouched; "
            "free space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file; a kill or a power cut leaves the old content or the new, never half of either."""
    draft = path.with_name(f".{path.name}.writing")
    draft.write_text(text, encoding="utf-8")
    flush(draft)
    draft.replace(path)
    flush(path.parent)


def recover(target: Path) -> None:
    """Clear away what a killed writer left beside the target; a folder that it had moved aside comes back.

    Only for one who knows that no other process is writing this target.
    """
    target = target.absolute()
    for retired in _beside(target, "old"):
        if not target.exists():
            retired.rename(target)
        else:
            shutil.rmtree(retired, ignore_errors=True)
    for draft in _beside(target, "writing"):
        shutil.rmtree(draft, ignore_errors=True)


def _beside(target: Path, kind: str) -> list[Path]:
    """Folders of this target that carry a process id; those of a target `name.more` are none of ours."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.\d+\.{kind}")
    return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name))


def is_full_disk(error: Exception) -> bool:
    """No space or no quota left; the libraries in Rust say so in words, with exceptions of their own."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in full
    return any(f"os error {code})" in str(error) for code in full)


def _swap(draft: Path, target: Path) -> None:
    """Put draft where target is; the old folder goes last."""
    retired = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(retired, ignore_errors=True)  # of a killed process that had the same id
    try:
        if target.exists():
            target.rename(retired)
        draft.rename(target)
        flush(target.parent)
    except BaseException:
        if target.exists() and not draft.exists():
            target.rename(draft)
        if retired.exists():
            retired.rename(target)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
