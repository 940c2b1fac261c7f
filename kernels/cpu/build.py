"""Compiles the C++ kernels once for each source, compiler and OpenMP runtime, into a per-user cache.

    $XDG_CACHE_HOME/sparsegpt/kernels/matmul24-<hash>.so     (XDG_CACHE_HOME defaults to ~/.cache)

No torch headers and no build system: a second of `c++`. The library is linked against the OpenMP runtime that torch has
loaded, so both share one pool of threads; two pools would spin against each other."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("sparsegpt.kernels")

SOURCES = tuple(Path(__file__).with_name(name) for name in ("matmul24.cpp", "integer24.cpp", "dense.cpp", "norm.cpp"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("common24.h", "products24.h"))
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno")
_TIMEOUT = 120  # seconds


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
    library = cache_folder() / f"matmul24-{name}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        _build(compiler, openmp, library)
    return library


def _build(compiler: str, openmp: list[str], library: Path) -> None:
    """Compile beside the target and rename, so that no process ever loads half a file."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        output = Path(folder) / library.name
        last: subprocess.SubprocessError | None = None
        for options in (openmp, ["-fopenmp"], []):  # a compiler without OpenMP still gives one fast thread
            command = [compiler, *_FLAGS, *options[:1], *map(str, SOURCES), "-o", str(output), *options[1:]]
            try:
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT)
            except subprocess.SubprocessError as error:
                last = error
                continue
            output.replace(library)
            return
        assert last is not None
        raise last


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
