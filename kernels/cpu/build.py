"""Compiles the C++ kernels once for each source, compiler and OpenMP runtime, into a per-user cache.

    $XDG_CACHE_HOME/sparsegpt/kernels/matmul24-<recipe>.<content>.so     (XDG_CACHE_HOME defaults to ~/.cache)

recipe and content are hashes: of all that the library is made of, and of the library itself. Code is only ever loaded
from a folder that nobody else can write, and only as it was built: a damaged library is built again.

No torch headers and no build system: one `c++` a file, side by side. The library is linked against the OpenMP runtime
that torch has loaded, so both share one pool of threads; two pools would spin against each other."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from sparsegpt.files.folders import flush

logger = logging.getLogger("sparsegpt.kernels")

SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp")
    for name in ("matmul24", "integer24", "bitmask", "dense", "norm", "read", "decode", "program")
)
HEADERS = tuple(
    Path(__file__).with_name(name)
    for name in ("common24.h", "blocks.h", "products24.h", "masked_products.h", "tiles.h")
)
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_TIMEOUT = 120  # seconds
_BUILDING = "building-"
_LOCK = ".lock"


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernel, built when the cache has none; None (said once in the log) where that cannot be done."""
    try:
        return ctypes.CDLL(str(_cached_build()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home to keep a cache in
        logger.warning("no CPU kernel for packed 2:4 layers, they run on decompressed weights: %s", _reason(error))
        return None


def cache_folder() -> Path:
    """Where builds are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sparsegpt" / "kernels"


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX, or the first of c++, g++, clang++. Raises FileNotFoundError without one."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise FileNotFoundError("no C++ compiler (c++, g++, clang++ or $CXX) on PATH")


def _cached_build() -> Path:
    compiler = find_compiler()
    openmp = _openmp_options()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_TIMEOUT).stdout
    recipe = f"{version!r} {_FLAGS} {openmp} {platform.machine()}".encode()
    name = hashlib.sha256(b"".join(path.read_bytes() for path in (*SOURCES, *HEADERS)) + recipe).hexdigest()[:20]
    folder = _private_folder()
    with _one_at_a_time(folder):
        return _built(folder, f"matmul24-{name}") or _build(compiler, openmp, folder, f"matmul24-{name}")


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Of processes that start together one builds, and the others find what it has built."""
    lock = FileLock(folder / _LOCK, mode=0o600)
    with suppress(Timeout, OSError, NotImplementedError):  # a build too many does no harm
        lock.acquire(timeout=2 * _TIMEOUT)
    try:
        yield
    finally:
        lock.release()


def _built(folder: Path, name: str) -> Path | None:
    for library in sorted(folder.glob(f"{name}.*.so")):
        if library.suffixes[-2:] == [f".{_content(library)}", ".so"]:
            return library
        library.unlink(missing_ok=True)  # cut short, or damaged since
    return None


def _private_folder() -> Path:
    """The cache folder, if it and the one around it are this user's alone to write; else one for this process."""
    folder = cache_folder()
    for path in (folder.parent, folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if all(_is_private(path) for path in (folder, folder.parent)):
        return folder
    logger.warning("%s can be written by others: kernels are built anew for this process; chmod go-w it", folder)
    private = tempfile.TemporaryDirectory(prefix="sparsegpt-kernels-")
    atexit.register(private.cleanup)
    return Path(private.name)


def _is_private(folder: Path) -> bool:
    found = folder.lstat()
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return stat.S_ISDIR(found.st_mode) and mine and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _content(library: Path) -> str:
    try:
        return hashlib.sha256(library.read_bytes()).hexdigest()[:20]
    except OSError:  # another process has just taken it away
        return ""


def _build(compiler: str, openmp: list[str], target: Path, name: str) -> Path:
    """Compile beside the target and rename, so that no process and no power cut ever leaves half a file."""
    for left in target.glob(f"{_BUILDING}*"):  # by a process that was killed
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > 10 * _TIMEOUT:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=target, prefix=_BUILDING) as folder:
        output = Path(folder) / f"{name}.so"
        last: subprocess.SubprocessError | None = None
        for options in (openmp, ["-fopenmp"], []):  # a compiler without OpenMP still gives one fast thread
            try:
                _compile(compiler, options, output)
            except subprocess.SubprocessError as error:
                last = error
                continue
            flush(output)
            library = target / f"{name}.{_content(output)}.so"
            output.replace(library)
            flush(target)
            return library
        assert last is not None
        raise last


def _compile(compiler: str, options: list[str], output: Path) -> None:
    """Compile every source for itself, all at a time, and link them; subprocess.SubprocessError where one fails.

    options: for the compiler the first, for the linker all.
    """
    objects = [output.with_name(f"{source.stem}.o") for source in SOURCES]
    commands = [
        [compiler, *_FLAGS, *options[:1], "-c", str(source), "-o", str(made)]
        for source, made in zip(SOURCES, objects, strict=True)
    ]
    with ThreadPoolExecutor(len(commands)) as pool:
        list(pool.map(_run, commands))
    _run([compiler, *_FLAGS, "-shared", *options[:1], *map(str, objects), "-o", str(output), *options[1:]])


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT)


def _openmp_options() -> list[str]:
    """-fopenmp, and torch's own runtime to link with where its wheel brings one."""
    home = Path(torch.__file__).parent
    for folder in (home / "lib", home.parent / "torch.libs"):
        for runtime in sorted(folder.glob("libgomp*.so*")):
            return ["-fopenmp", "-Wl,--as-needed", str(runtime)]
    return ["-fopenmp"]


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        text = error.stderr if isinstance(error.stderr, str) else ""
        return f"the compiler failed: {text.strip().splitlines()[0] if text.strip() else error}"
    return str(error)
