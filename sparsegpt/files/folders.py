"""Folders that appear whole or not at all.

A new folder is written beside its target under a temporary name, flushed to disk, and changes names with the old one at
one instant. Where the system cannot do that, the old one is moved aside first and removed after the new one is there. A
full disk, a kill or a power cut leaves the old folder or the new one, never half of either.
"""

import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsegpt.errors import SparseGPTError

# Of Linux's renameat2(2).
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; when the block ends well it becomes `target`, else it is removed.

    Who may replace what is asked before (results.py). Raises SparseGPTError when the disk is full.
    """
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
            f"no space left while writing {target}: what was there before is untouched; free space or choose another "
            "output folder"
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
    bring_back(target)
    for retired in _beside(target, "old"):
        shutil.rmtree(retired, ignore_errors=True)
    for draft in _beside(target, "writing"):
        shutil.rmtree(draft, ignore_errors=True)


def bring_back(target: Path) -> None:
    """A folder that a killed writer had moved aside stands where it stood again, unless something else is there."""
    target = target.absolute()
    if not target.exists() and target.parent.is_dir():
        for retired in _beside(target, "old")[:1]:
            retired.rename(target)


def _beside(target: Path, kind: str) -> list[Path]:
    """Folders of this target that carry a process id; those of a target `name.more` are none of ours."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.\d+\.{kind}")
    found = (path for path in target.parent.iterdir() if pattern.fullmatch(path.name))
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def is_full_disk(error: Exception) -> bool:
    """No space or no quota left; the libraries in Rust say so in words, with exceptions of their own."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in full
    return any(f"os error {code})" in str(error) for code in full)


def _swap(draft: Path, target: Path) -> None:
    """Put draft where target is; the old folder goes last, and stands there again where anything fails."""
    retired = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(retired, ignore_errors=True)  # of a killed process that had the same id
    if target.exists() and _exchange(draft, target):
        try:
            flush(target.parent)
        except BaseException:
            _exchange(draft, target)
            raise
        return  # the draft is the old folder now, and goes
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


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change names at one instant, where the system and its file system can; whether it was done.

    Two renames leave a moment without any folder of the name, in which a kill would leave none.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
