"""What a study has found, in one folder: every finished training is kept and not repeated.

    study.json                     settings, figures and seconds of every finished training, rows of the table
    trainings/<name>.safetensors   tensors of a training that later ones go on from
    study.png, study.svg           the picture

A training counts once study.json says so; its tensors are there by then. Every file appears whole or not at all.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.eval.drawing import new_figure, saved
from sparsegpt.files.checked_json import read_checked, write_checked
from sparsegpt.files.folders import flush
from sparsegpt.files.results import claimed, writing
from sparsegpt.files.tensor_files import WEIGHTS, OpenTensors, ShardedWriter, header_room

NAME = "study.json"
Figures = dict[str, float]
Tensors = dict[str, Tensor]
# A training: what it found, and what later trainings need of it.
Train = Callable[[], tuple[Figures, Tensors]]


@dataclass(frozen=True)
class Plan:
    """What decides a training's figures. size: a row of SIZES; steps: of one training."""

    study: str
    size: str
    steps: int


@dataclass(frozen=True)
class Row:
    """A line of a picture at one place, with a value for each seed.

    panel: of the picture. places: where it stands on the horizontal axis, for each seed; values: what was measured.
    """

    panel: str
    line: str
    places: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def place(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.places)

    @property
    def shown(self) -> str:
        """Mean and standard deviation over seeds."""
        return in_words(self.values)


@dataclass(frozen=True)
class Panel:
    """How the rows of one panel are told. form: of a place, as "{:.0%}"."""

    across: str
    up: str
    form: str = "{:.0%}"


@dataclass(frozen=True)
class Kept:
    """A finished training: its figures, and where its tensors lie."""

    figures: Figures
    path: Path

    def tensors(self, group: str) -> Tensors:
        """Tensors [...] that `grouped` named, read now. Raises SparseGPTError where they are damaged."""
        with OpenTensors.of_file(self.path) as found:
            return {name.removeprefix(f"{group}:"): found[name] for name in found if name.startswith(f"{group}:")}


def grouped(group: str, tensors: Tensors) -> Tensors:
    """Tensors [...] by name, under names that tell one group of a training's tensors from another."""
    return {f"{group}:{name}": tensor for name, tensor in tensors.items()}


class Record:
    """The folder of one study, for the only process that writes it. tell(line): is told of every finished training."""

    def __init__(self, folder: Path, plan: Plan, tell: Callable[[str], object]) -> None:
        self.folder, self.plan, self.tell = folder, plan, tell
        self.trainings: dict[str, dict[str, Any]] = _known(folder / NAME, plan)
        self.rows: list[Row] = []

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, plan: Plan, tell: Callable[[str], object] = lambda line: None) -> Iterator["Record"]:
        """The record in a folder, made if it is not there.

        Raises SparseGPTError where another process writes there, and where the folder holds another study.
        """
        with claimed(folder), writing(folder):
            (folder / "trainings").mkdir(parents=True, exist_ok=True)
            yield cls(folder, plan, tell)

    def once(self, name: str, train: Train) -> Kept:
        """The training of this name, done now unless it was before."""
        path = self.folder / "trainings" / f"{name}.safetensors"
        if name not in self.trainings:
            started, used = time.perf_counter(), time.process_time()
            figures, tensors = train()
            if tensors:
                _write(path, tensors)
            seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
            self.trainings[name] = {"figures": figures, **{key: round(value, 2) for key, value in seconds.items()}}
            self._save()
            self.tell(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in figures.items()))
        return Kept(self.trainings[name]["figures"], path)

    def finish(self, rows: Sequence[Row]) -> None:
        """Keep the rows of the table."""
        self.rows = list(rows)
        self._save()

    def values(self, figure: str, *names: str) -> tuple[float, ...]:
        """One figure of several trainings."""
        return tuple(self.trainings[name]["figures"][figure] for name in names)

    def total(self, clock: str) -> float:
        """Of all trainings, those of earlier calls too. clock: "seconds" or "cpu_seconds"."""
        return float(sum(training[clock] for training in self.trainings.values()))

    def _save(self) -> None:
        content = {"plan": asdict(self.plan), "trainings": self.trainings, "rows": [asdict(row) for row in self.rows]}
        write_checked(self.folder / NAME, content)


def _known(path: Path, plan: Plan) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    content = read_checked(path)
    if content.get("plan") != asdict(plan):
        raise SparseGPTError(
            f"{path} holds another study ({content.get('plan')} there, {asdict(plan)} now): give another folder",
            settings=("out",),
        )
    trainings: dict[str, dict[str, Any]] = content["trainings"]
    return trainings


def _write(path: Path, tensors: Tensors) -> None:
    draft = path.with_suffix(".writing")
    draft.mkdir(exist_ok=True)
    with ShardedWriter(draft, header_room(tensors)) as writer:
        writer.add(*tensors.items())
    flush(draft / WEIGHTS)
    (draft / WEIGHTS).replace(path)
    draft.rmdir()


def in_words(values: Sequence[float]) -> str:
    """Values for each seed -> mean ± standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {spread:.3f}"


def tables_of(rows: Sequence[Row], panels: Mapping[str, Panel]) -> list[Table]:
    """A table for each panel that has rows: lines down, places across."""
    found = []
    for name, panel in panels.items():
        of_panel = [row for row in rows if row.panel == name]
        places = sorted({panel.form.format(row.place): row.place for row in of_panel}.items(), key=lambda item: item[1])
        table = Table(panel.across, *(place for place, _ in places), title=f"{name}: {panel.up}")
        cells = {(row.line, panel.form.format(row.place)): row.shown for row in of_panel}
        for line in dict.fromkeys(row.line for row in of_panel):
            table.add_row(line, *(cells.get((line, place), "") for place, _ in places))
        if of_panel:
            found.append(table)
    return found


def draw(rows: Sequence[Row], panels: Mapping[str, Panel], path: Path) -> list[Path]:
    """A panel beside the other, a line for each line, bars of one standard deviation over seeds. PNG and SVG."""
    figure, axes = new_figure(1, len(panels), figsize=(6.5 * len(panels), 4.5))
    for (name, panel), axis in zip(panels.items(), axes[0], strict=True):
        for line in dict.fromkeys(row.line for row in rows if row.panel == name):
            of_line = sorted((row for row in rows if (row.panel, row.line) == (name, line)), key=lambda row: row.place)
            spreads = [statistics.stdev(row.values) if len(row.values) > 1 else 0.0 for row in of_line]
            means = [statistics.fmean(row.values) for row in of_line]
            axis.errorbar([row.place for row in of_line], means, spreads, marker="o", capsize=3, label=line)
        axis.set(xlabel=panel.across, ylabel=panel.up, title=name)
        axis.legend(fontsize="small")
    return saved(figure, path)
