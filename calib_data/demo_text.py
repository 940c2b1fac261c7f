"""Training text for the demo model: what any Python installation already has on its disk.

Three groups, from the nearest to the evaluation text to the farthest: training topics of pydoc, docstrings and
comments of the standard library, the same of installed packages. Sources are parsed, never imported. Nothing that a
held-out topic contains gets through.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .pydoc_topics import fingerprints, held_out_topics, training_topics, without_overlap

PROSE_SHARE = 0.78  # letters and spaces among a paragraph's characters; code and tables have fewer
SHORTEST_PARAGRAPH = 30  # characters; below, mostly labels such as "Returns"

_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_COMMENT = re.compile(r"(?:^[ \t]*# .*\n){2,}", re.MULTILINE)  # at least two lines: shorter ones are labels
_COMMENT_SIGN = re.compile(r"^[ \t]*# ?", re.MULTILINE)
_WORD = re.compile(r"[^\W\d_]{2,}")
_FOREIGN = re.compile(r">>>|^\s*[@.|+<{]|https?://|```|[^\x00-\x7f]{4}", re.MULTILINE)


@dataclass(frozen=True)
class DemoText:
    """Documents of each group, in a fixed order for a given installation."""

    topics: tuple[str, ...]
    standard_library: tuple[str, ...]
    packages: tuple[str, ...]

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The three groups, nearest to the evaluation text first."""
        return self.topics, self.standard_library, self.packages


def gather_text() -> DemoText:
    """Everything a demo model may learn from on this installation, cleaned, deduplicated, clear of held-out topics."""
    held_out, seen = fingerprints(held_out_topics().values()), set[str]()

    def clean(documents: Iterable[str]) -> tuple[str, ...]:
        cleaned = (without_overlap(prose(document, seen), held_out) for document in documents)
        return tuple(document for document in cleaned if document)

    standard_library, site_packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    return DemoText(
        topics=tuple(training_topics().values()),
        standard_library=clean(source_prose(standard_library, exclude="site-packages")),
        packages=clean(source_prose(site_packages)),
    )


def source_prose(root: Path, exclude: str | None = None) -> Iterator[str]:
    """Docstrings and comments under `root`, one document a file, files in sorted order, unparsable files left out."""
    for path in sorted(root.rglob("*.py")):
        if exclude not in path.parts and (paragraphs := _paragraphs(path)):
            yield "\n\n".join(paragraphs)


def prose(document: str, seen: set[str]) -> str:
    """The paragraphs of `document` that read as prose and are not in `seen` yet; adds them to it."""
    kept = []
    for paragraph in document.split("\n\n"):
        key = " ".join(paragraph.split())
        if key not in seen and is_prose(paragraph):
            seen.add(key)
            kept.append(paragraph.rstrip())
    return "\n\n".join(kept)


def is_prose(paragraph: str) -> bool:
    """Long enough, mostly letters and spaces, no prompt, markup, web address or foreign script."""
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    return (
        len(paragraph) >= SHORTEST_PARAGRAPH
        and letters >= PROSE_SHARE * len(paragraph)
        and len(_WORD.findall(paragraph)) >= 5
        and not _FOREIGN.search(paragraph)
    )


def _paragraphs(path: Path) -> list[str]:
    try:
        source = path.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError, OSError):
        return []  # a test fixture or a template, not text
    documented = (node for node in nodes if isinstance(node, _DOCUMENTED))
    docstrings = [text for node in documented if (text := ast.get_docstring(node))]
    return docstrings + [_COMMENT_SIGN.sub("", block).strip() for block in _COMMENT.findall(source)]
