"""Messages: what docs/troubleshooting.md quotes is said by the program, and libraries name settings, not flags."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("sparsegpt", "kernels", "eval", "calib_data")
# Scripts and benchmarks with command lines of their own, and rooms whose business the command line is.
WITH_FLAGS = ("sparsegpt/cli", "sparsegpt/run", "eval/bench", "eval/perplexity.py", "calib_data/train_demo.py")
HOLE = "\0"  # where a message has a value


@functools.cache
def said_by(path: Path) -> list[str]:
    """Every text of a file, documentation left out; what is filled in is a HOLE."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            found.append(node.value)
    return found


SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
QUOTED = [
    quoted
    for line in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ")
    for quoted in re.findall(r"`([^`]+)`", line.split("|")[1])
]


def test_the_page_quotes_many_messages():
    assert len(QUOTED) > 60


@pytest.mark.parametrize("quoted", QUOTED)
def test_what_the_page_quotes_is_said(quoted):
    """`...` stands for what is filled in."""
    wanted = re.compile(".*".join(re.escape(part.strip()) for part in quoted.split("...")), re.DOTALL)
    assert any(wanted.search(text) for path in SOURCES for text in said_by(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_libraries_name_no_flags(path):
    """The command line adds those of the settings that a refusal names; a library's user has none."""
    if not str(path.relative_to(ROOT)).startswith(WITH_FLAGS):
        assert not [text for text in said_by(path) if re.search(r"(?<![\w-])--[a-z]{2}", text) and " " in text]
