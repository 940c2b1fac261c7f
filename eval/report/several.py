"""The page of several runs: what each cost and brought, and in which settings they differ."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sparsegpt.eval.report import tasks, texts
from sparsegpt.eval.report.charts import Chart, Point, Series, chart
from sparsegpt.eval.report.reading import Run, number

# Up to so many runs a mark in a plot carries its run's number.
LABELLED = 30
# Plots of so many texts; the table has all.
TEXTS = 3
# Entries beside "settings" that decide what a run does.
CHOICES = ("model", "sparsity", "method", "preset", "seed", "stored_dtype")
CALIBRATION = ("source", "samples", "sequence_length", "seed")
EVALUATION = ("length", "windows", "bos", "task limit")


class Value(NamedTuple):
    """A cell of a sortable table: what is read, and by what it is sorted."""

    text: str
    key: float | str | None
    marked: bool = False


class Column(NamedTuple):
    """A column of the table of results. scored: the text whose best pruned models are marked in it."""

    title: str
    of: Callable[[Run], float | None]
    text: Callable[[float | None], str]
    scored: str | None = None


class Row(NamedTuple):
    """A run in a table, with its number on the page."""

    number: int
    run: Run
    values: list[Value]


class Table(NamedTuple):
    """Heads of columns, and a row a run."""

    heads: list[str]
    rows: list[Row]


class Line(NamedTuple):
    """The best run of all with about as many zeros."""

    zeros: str
    perplexity: str
    name: str


class Best(NamedTuple):
    """The best runs by their perplexity on a text, and what the dense model has there."""

    text: str
    dense: str
    lines: list[Line]


def view(runs: list[Run]) -> dict[str, Any]:
    """What the template of several runs is given: those with few zeros first, and of as many the best."""
    data = common_texts(runs)
    ordered = sorted(runs, key=lambda run: (_level(run), *_rank(run, data[0] if data else "")))
    differing, alike = settings_of(ordered)
    return {
        "title": f"{len(runs)} runs compared",
        "runs": ordered,
        "best": best(ordered, data[0]) if data else None,
        "results": results(ordered, data),
        "tasks": scores_in_tasks(ordered),
        "differences": _differences(ordered, differing),
        "alike": alike,
        "plots": [plots(ordered, name) for name in data[:TEXTS]],
        "left_out": data[TEXTS:],
    }


def common_texts(runs: list[Run]) -> list[str]:
    """The texts that pruned models were scored on, those of most runs first."""
    counts = Counter(data for run in runs for data in run.scores if run.score(data) is not None)
    return [data for data, _ in counts.most_common()]


def _level(run: Run) -> float:
    """Runs with about as many zeros, to the nearest twentieth, are compared with each other."""
    return round(20 * (run.zeros or 0.0)) / 20


def _rank(run: Run, data: str) -> tuple[bool, float]:
    found = run.score(data)
    return (found is None, found or 0.0)


def best(runs: list[Run], data: str) -> Best:
    """The best runs on a text, one for each share of zeros."""
    winners = [run for run in runs if _is_best(run, runs, data)]
    dense = next((found for run in runs if (found := run.score(data, "dense")) is not None), None)
    lines = [Line(f"{_level(run):.0%}", texts.perplexity(run.score(data)), run.name) for run in winners]
    return Best(data, texts.perplexity(dense), lines)


def _is_best(run: Run, runs: list[Run], data: str) -> bool:
    rivals = [found for other in runs if _level(other) == _level(run) and (found := other.score(data)) is not None]
    return run.score(data) == min(rivals, default=None) is not None


def results(runs: list[Run], data: list[str]) -> Table:
    """What every run cost and brought; the best perplexities are marked."""
    shown = texts.short_names(data)
    columns = [*(column for name in data for column in _scored(name, shown[name])), *_MEASURED]

    def value(column: Column, run: Run) -> Value:
        found = column.of(run)
        marked = column.scored is not None and _is_best(run, runs, column.scored)
        return Value(column.text(found), found, marked)

    rows = [Row(place, run, [value(column, run) for column in columns]) for place, run in enumerate(runs, 1)]
    return Table([column.title for column in columns], rows)


def scores_in_tasks(runs: list[Run]) -> Table | None:
    """Of every metric the score of each run's pruned and dense model; None where there is none."""
    columns = [(name, which) for name in tasks.names(runs) for which in ("pruned", "dense")]
    rows = [
        Row(place, run, [Value(tasks.figure(run, *column), run.metric(*column)) for column in columns])
        for place, run in enumerate(runs, 1)
    ]
    return Table([f"{which} on {name}" for name, which in columns], rows) if columns else None


def _scored(data: str, name: str) -> Iterator[Column]:
    """Of a text, called so."""
    yield Column(f"pruned on {name}", lambda run: run.score(data), texts.perplexity, scored=data)
    yield Column(f"dense on {name}", lambda run: run.score(data, "dense"), texts.perplexity)


def _seconds(run: Run) -> float | None:
    return number(run.report.get("seconds", {}), "total")


def _memory(run: Run) -> float | None:
    return number(run.report, "peak_memory_bytes")


_MEASURED = (
    Column("zeros", lambda run: run.zeros, texts.percent),
    Column("size, packed", lambda run: run.size, texts.size),
    Column("time", _seconds, texts.seconds),
    Column("memory", _memory, texts.size),
)


def settings_of(runs: list[Run]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """{setting: its text in each run} where runs differ, and {setting: text} where all are alike."""
    choices = [_choices(run) for run in runs]
    names = dict.fromkeys(name for found in choices for name in found)
    by_name = {name: [texts.plain(found.get(name)) for found in choices] for name in names}
    differing = {name: found for name, found in by_name.items() if len(set(found)) > 1}
    return differing, {name: found[0] for name, found in by_name.items() if name not in differing}


def _choices(run: Run) -> dict[str, Any]:
    report = run.report
    calibration, evaluation = report.get("calibration", {}), report.get("evaluation", {})
    versions = {f"version of {name}": value for name, value in report.get("versions", {}).items()}
    recipe = report.get("recipe")
    return {
        **{name: report.get(name) for name in CHOICES},
        **report.get("settings", {}),
        **({"rules of the recipe": [str(rule) for rule in recipe["rules"]]} if recipe and "rules" in recipe else {}),
        **{f"calibration {name}": calibration.get(name) for name in CALIBRATION},
        **{f"evaluation {name}": evaluation.get(name) for name in EVALUATION},
        **versions,
    }


def _differences(runs: list[Run], differing: dict[str, list[str]]) -> Table:
    """What is unlike most runs is marked."""
    usual = {name: Counter(found).most_common(1)[0] for name, found in differing.items()}
    rows = [
        Row(
            place + 1,
            run,
            [
                Value(found[place], found[place], found[place] != usual[name][0] and usual[name][1] > 1)
                for name, found in differing.items()
            ],
        )
        for place, run in enumerate(runs)
    ]
    return Table(list(differing), rows)


def plots(runs: list[Run], data: str) -> tuple[str, list[Chart]]:
    """Perplexity on a text against what it costs."""
    dense = next((found for run in runs if (found := run.score(data, "dense")) is not None), None)
    level = None if dense is None else (dense, f"dense: {texts.perplexity(dense)}")
    axes = (
        ("share of zeros", lambda run: run.zeros, lambda share: f"{share:.0%}"),
        ("size of the packed weights", lambda run: run.size, texts.size),
        ("time of the run", _seconds, texts.seconds),
    )
    drawn = (
        chart(
            f"against {title}",
            _by_method(runs, data, of, text),
            (title, text),
            ("perplexity, lower is better", texts.perplexity),
            level=level,
        )
        for title, of, text in axes
    )
    return data, [one for one in drawn if one is not None]


def _by_method(
    runs: list[Run], data: str, of: Callable[[Run], float | None], text: Callable[[float], str]
) -> list[Series]:
    found: dict[str, list[Point]] = {}
    for place, run in enumerate(runs, 1):
        across, up = of(run), run.score(data)
        if across is not None and up is not None:
            told = f"{place}. {run.name}: perplexity {texts.perplexity(up)} at {text(across)}"
            label = str(place) if len(runs) <= LABELLED else ""
            found.setdefault(run.report["method"], []).append(Point(across, up, told, label))
    return [Series(method, tuple(points), joined=False) for method, points in found.items()]
