"""Runs files of tests in Triton's interpreter, in a process of its own."""

from collections.abc import Iterable
from pathlib import Path

import numpy
import pytest
import triton

from tests.forked import Forked


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


interpreter_runs = pytest.mark.skipif(
    _release(triton.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4),
    reason="the interpreter of triton 3.6 fails on run-time loop bounds with numpy 2.4",
)


ROOT = Path(__file__).parents[2]
# Kernels know whether they are interpreted when they are defined.
INTERPRETED = "import os, sys, pytest; os.environ['TRITON_INTERPRET'] = '1'; sys.exit(pytest.main(sys.argv[1:]))"


def interpret(forked: Forked, cases: Iterable[Path], form: str, *ignored: str) -> None:
    """Run files of tests in Triton's interpreter. form: which cases, as in pytest's -m; ignored: warnings, as in -W."""
    ignored += ("ignore:Conversion of an array with ndim:DeprecationWarning",)  # triton 3.6 with numpy 2.3
    words = ["-p", "no:cacheprovider", "-m", form, *cases]
    words += [part for warning in ignored for part in ("-W", warning)]
    found = forked.run("-c", INTERPRETED, *words, cwd=ROOT)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
