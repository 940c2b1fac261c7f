"""The scripts of examples/ run as they are, on the demo."""

from pathlib import Path

import pytest

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
def test_an_example_runs(name, forked, tmp_path):
    said = forked.python(EXAMPLES / name, cwd=tmp_path)
    assert all(text in said for text in SAID[name])
