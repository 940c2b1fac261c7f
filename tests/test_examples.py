"""The scripts of examples/ run as they are, on the demo."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import CHILD_ENVIRONMENT

EXAMPLES = Path(__file__).parents[1] / "examples"
# What each prints, in its own lines.
SAID = {
    "prune_and_compare.py": ("dense", "magnitude", "wanda", "sparsegpt"),
    "own_method.py": ("relative error",),
    "own_calibration.py": ("8 windows of", "50% zeros"),
}


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == SAID.keys()


@pytest.mark.parametrize("name", SAID)
def test_an_example_runs(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / name)]
    result = subprocess.run(command, cwd=tmp_path, env=CHILD_ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(text in result.stdout for text in SAID[name])
