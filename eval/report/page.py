"""A page for people: one HTML file with everything in it, which asks nothing of a network.

Whatever comes out of a report is text: the templates escape it, in attributes too.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsegpt.errors import SparseGPTError
from sparsegpt.eval.report import several, single, texts
from sparsegpt.eval.report.reading import Run
from sparsegpt.files.folders import write_atomically
from sparsegpt.files.results import read_marker, writing

if TYPE_CHECKING:
    from jinja2 import Environment

_FILTERS = ("perplexity", "percent", "change", "error", "bits", "seconds", "size", "plain")


def page(runs: list[Run], notes: tuple[str, ...] = ()) -> str:
    """HTML of one run, or of several side by side. notes: lines on what is not on the page."""
    name, found = ("single.html", single.view(runs[0])) if len(runs) == 1 else ("several.html", several.view(runs))
    text = _environment().get_template(name).render(notes=notes, **found)
    return text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no text that a file can hold


def write_page(path: Path, text: str, *, overwrite: bool = False) -> None:
    """Write a page, whole or not at all.

    Raises SparseGPTError for a place that cannot be written, for one in a result of this program, whose files are
    known, and for a file that is there unless it may be replaced.
    """
    if path.is_dir() or path.is_symlink():
        kind = "a folder" if path.is_dir() else "a symbolic link"
        raise SparseGPTError(f"page {path} is {kind}: give the name of a file", settings=("out",))
    if read_marker(path.absolute().parent) is not None:
        raise SparseGPTError(
            f"page {path} would lie in a model folder that this program keeps whole: choose another place",
            settings=("out",),
        )
    if path.exists() and not overwrite:
        raise SparseGPTError(
            f"page {path} exists: allow to replace it, or choose another", settings=("overwrite", "out")
        )
    with writing(path.absolute().parent):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


@functools.cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("sparsegpt.eval.report")
    made = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    filters: dict[str, Any] = {name: getattr(texts, name) for name in _FILTERS}
    made.filters.update(filters)
    return made
