"""Runs files of tests in Triton's interpreter, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


interpreter_runs = pytest.mark.skipif(
    _release(triton.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4),
    reason="the interpreter of triton 3.6 fails on run-time loop bounds with numpy 2.4",
)


def interpret(cases: Path, *ignored: str) -> None:
    """Run a file of tests in Triton's interpreter; `ignored`: warnings, as in pytest's -W."""
    ignored += ("ignore:Conversion of an array with ndim:DeprecationWarning",)  # triton 3.6 with numpy 2.3
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(cases)]
    command += [part for warning in ignored for part in ("-W", warning)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
