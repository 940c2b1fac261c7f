"""What report.json says, read with suspicion: reports come from other versions, from disks, and from strangers."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Required, TypedDict

from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.eval.report.texts import short_names
from sparsegpt.files.checked_json import REPORT_NAME, read_checked
from sparsegpt.files.figures import BEFORE, MEASURED
from sparsegpt.files.inside import check_inside
from sparsegpt.files.typed_json import misfit

# Of the form of report.json: it grows when an entry changes its meaning. Reports that do not say are of the first.
VERSION = 1
# Bits of a weight by the name of its dtype.
WIDTHS = {"float32": 32, "float64": 64}
HALF = 16
_LARGEST = 1 << 63


class Layer(TypedDict, total=False):
    """A row of "layers", as driver.reports.LayerReport has it; older versions know fewer entries."""

    name: Required[str]
    shape: Required[tuple[int, int]]
    sparsity: Required[str]
    method: str
    zeros: float
    relative_error: float
    damping: float
    tokens: int
    seconds: float
    grid: str | None
    bits: float | None


class Block(TypedDict, total=False):
    """A row of "blocks"."""

    index: Required[int]
    relative_error: float
    seconds: float
    reconstruction: float | None
    losses: list[float]


class Epoch(TypedDict):
    """A row of "epochs"."""

    epoch: int
    loss: float


class Sample(TypedDict, total=False):
    """A row of "samples": an opening from a text, how the text goes on, and how each model does."""

    data: Required[str]
    opening: Required[str]
    text: str
    dense: str
    pruned: str


class Figure(TypedDict, total=False):
    """A model's score in a metric of a task, with its standard error, if the task gives one."""

    value: Required[float]
    stderr: float | None


class Dense(TypedDict, total=False):
    """Weights that stay dense, and why."""

    reason: Required[str]
    weights: Required[int]


class Parameters(TypedDict, total=False):
    """The entry "parameters"."""

    total: Required[int]
    pruned: dict[str, Any]
    left_dense_by_choice: list[Dense]
    not_prunable: list[Dense]


class Report(TypedDict, total=False):
    """What a page reads of report.json; the rest is left to programs."""

    report_version: int
    model: Required[str]
    sparsity: Required[str]
    method: Required[str]
    layers: Required[list[Layer]]
    preset: str | None
    command: str | None
    date: str
    settings: dict[str, Any]
    recipe: dict[str, Any] | None
    density_of_pruned_linears: float
    bits_per_weight: float | None
    parameters: Parameters
    rotation: dict[str, Any] | None
    blocks: list[Block]
    epochs: list[Epoch]
    seed: int
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    perplexity: dict[str, dict[str, float]]
    bits_per_byte: dict[str, dict[str, float]]
    tokens_per_second: dict[str, dict[str, float]]
    samples: list[Sample]
    tasks: dict[str, dict[str, dict[str, Figure]]]
    seconds: dict[str, float]
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int
    peak_private_memory_bytes: int | None
    peak_bytes_by_phase: dict[str, int]
    planned_bytes: dict[str, int]
    stored_dtype: str
    warnings: list[str]
    surroundings: dict[str, Any]
    versions: dict[str, str]
    before_change: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run: a name that tells it from others, what its report says, and bytes of its files of weights, if known."""

    name: str
    report: Report
    file_bytes: int | None = None

    @property
    def layers(self) -> list[Layer]:
        """Of every pruned linear, its row."""
        return self.report["layers"]

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """{text: {model: perplexity}}, without texts of which there is no score."""
        return {data: scores for data, scores in self.report.get("perplexity", {}).items() if scores}

    def score(self, data: str, which: str = "pruned") -> float | None:
        """A perplexity; None where it was not measured."""
        return self.scores.get(data, {}).get(which)

    @cached_property
    def metrics(self) -> dict[str, dict[str, Figure]]:
        """{"task metric": {model: score}}, of every task."""
        tasks = self.report.get("tasks", {})
        return {f"{task} {metric}": found for task, metrics in tasks.items() for metric, found in metrics.items()}

    def metric(self, name: str, which: str = "pruned") -> float | None:
        """A score in a metric of a task; None where it was not measured."""
        return number(self.metrics.get(name, {}).get(which, {}), "value")

    @property
    def change(self) -> str | None:
        """How the weights were changed after the run, in words; the scores are then of the weights before."""
        said = self.report.get("before_change", {}).get("change")
        return None if said is None else str(said)

    @cached_property
    def pruned_weights(self) -> int:
        """Weights of all pruned linears."""
        return sum(map(size_of, self.layers))

    @cached_property
    def zeros(self) -> float | None:
        """Share of zeros in the pruned linears; None where there are none."""
        known = [(size_of(layer), zeros) for layer in self.layers if (zeros := number(layer, "zeros")) is not None]
        weights = sum(size for size, _ in known)
        return sum(size * zeros for size, zeros in known) / weights if weights else None

    @cached_property
    def dense_bytes(self) -> int | None:
        """What the model's weights take without anything left out; None where the report does not say how many."""
        total = self.report.get("parameters", {}).get("total")
        return None if total is None else total * self._width // 8

    @cached_property
    def packed_bytes(self) -> int | None:
        """About what they take packed: of each pruned linear the smaller of two forms, dense or without its zeros.

        Without zeros a weight takes a bit that says where it is, and those that are kept their own.
        """
        if self.dense_bytes is None:
            return None
        saved = sum(size_of(layer) * (self._width - self._bits(layer)) for layer in self.layers)
        return max(0, self.dense_bytes - round(saved / 8))

    @property
    def size(self) -> int | None:
        """Bytes of the weights in the smallest form known: packed, as estimated, or as the files have them."""
        known = [size for size in (self.packed_bytes, self.file_bytes) if size is not None]
        return min(known, default=None)

    @property
    def _width(self) -> int:
        return WIDTHS.get(self.report.get("stored_dtype", ""), HALF)

    def _bits(self, layer: Layer) -> float:
        on_grid, zeros = number(layer, "bits"), number(layer, "zeros") or 0.0
        return min(self._width, self._width * (1 - zeros) + 1 if on_grid is None else on_grid)


def number(row: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a row; None where there is none."""
    value = row.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def size_of(layer: Layer) -> int:
    """Weights of a linear."""
    rows, columns = layer["shape"]
    return rows * columns


def run_of(report: dict[str, Any], name: str, file_bytes: int | None = None) -> Run:
    """A run by the content of its report. Raises SparseGPTError where that is of another form."""
    version = report.get("report_version", VERSION)
    if version != VERSION:
        raise SparseGPTError(f"is of version {str(version)[:20]}, this program reads {VERSION}: update sparsegpt")
    plain = _as_in_json(report)
    if isinstance(scores := plain.get(BEFORE), dict):  # a change moves them there
        plain |= {name: scores[name] for name in MEASURED if name in scores}
    if wrong := misfit(plain, Report, "report", more=True):
        raise SparseGPTError(f"is damaged or of another version ({wrong})")
    return Run(name, plain, file_bytes)


def read_run(place: Path, name: str) -> Run:
    """The run of a folder, or of a report.json itself. Raises SparseGPTError naming the file."""
    path = place / REPORT_NAME if place.is_dir() else place
    if not path.is_file():
        raise SparseGPTError(f"{place}: expected a report.json there, found none: give folders of runs")
    report = read_checked(check_inside(path.parent, path))
    try:
        return run_of(report, name, _file_bytes(path.parent))
    except SparseGPTError as error:
        raise SparseGPTError(f"{path} {error}") from error


def read_runs(places: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs of these folders, and a line for each that cannot be shown. Raises SparseGPTError where none can be."""
    names = {place: str(place) for place in places}
    shown = short_names(list(names.values()))
    runs, skipped = [], []
    for place, name in names.items():
        try:
            runs.append(read_run(place, shown[name]))
        except (SparseGPTError, OSError) as error:
            skipped.append(first_line(error))
    if not runs:
        raise SparseGPTError(f"no report to show: {skipped[0] if skipped else 'give the folders of runs'}")
    return runs, skipped


def _as_in_json(value: Any) -> Any:
    """Tuples as lists, as they come back from a file. Raises SparseGPTError for numbers that nothing here has."""
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise SparseGPTError("is damaged (a number is beyond all bounds)")
    if isinstance(value, dict):
        return {str(key): _as_in_json(item) for key, item in value.items()}
    return [_as_in_json(item) for item in value] if isinstance(value, list | tuple) else value


def _file_bytes(folder: Path) -> int | None:
    sizes = list(_weight_sizes(folder))
    return sum(sizes) if sizes else None


def _weight_sizes(folder: Path) -> Iterator[int]:
    return (path.stat().st_size for path in folder.glob("*.safetensors"))
