"""Scores in tasks: of one run metric by metric, and of several side by side."""

from typing import NamedTuple

from sparsegpt.eval.report import texts
from sparsegpt.eval.report.reading import Run


class Line(NamedTuple):
    """A metric of a task: the score of each model in turn, and how far the pruned one's is from the dense one's."""

    name: str
    scores: list[str]
    change: str


class Lines(NamedTuple):
    """The metrics of one run. models: those that were scored."""

    models: list[str]
    rows: list[Line]


def names(runs: list[Run]) -> list[str]:
    """Every metric in which any of the runs was scored."""
    return list(dict.fromkeys(name for run in runs for name in run.metrics))


def figure(run: Run, name: str, which: str) -> str:
    """A model's score in a metric, with its standard error."""
    found = run.metrics.get(name, {}).get(which)
    return texts.UNKNOWN if found is None else texts.with_error(found["value"], found.get("stderr"))


def lines(run: Run) -> Lines | None:
    """What the page of one run says; None where no task was asked for."""
    models = list(dict.fromkeys(which for by_model in run.metrics.values() for which in by_model))
    rows = [Line(name, [figure(run, name, which) for which in models], _change(run, name)) for name in run.metrics]
    return Lines(models, rows) if models else None


def _change(run: Run, name: str) -> str:
    dense, pruned = (run.metric(name, which) for which in ("dense", "pruned"))
    return texts.UNKNOWN if dense is None or pruned is None else f"{pruned - dense:+.4f}"
