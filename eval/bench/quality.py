"""`bench quality`: perplexity of every method at every sparsity, and on grids of integers, as tables and figures."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsegpt.calib_data import check_text, check_texts, draw_mixture, load_text, load_texts
from sparsegpt.driver.pipeline import prune_model
from sparsegpt.driver.reports import LayerReport
from sparsegpt.errors import SparseGPTError
from sparsegpt.eval.drawing import new_figure, saved
from sparsegpt.eval.perplexity import score_text
from sparsegpt.files.checked_json import read_checked, write_checked
from sparsegpt.model.loading import LoadedModel, load_config, load_model, sequence_length
from sparsegpt.settings.machine import pick_device
from sparsegpt.sparsity import parse_sparsity

NO_GRID = "none"
# Name in the table -> what to ask for. Up to `fast` all linears of a block are pruned from one capture, as published.
LADDER: dict[str, dict[str, Any]] = {
    "magnitude": {"preset": "paper", "method": "magnitude"},
    "wanda": {"preset": "paper", "method": "wanda"},
    "paper": {"preset": "paper"},
    "sparsegpt+refit": {"preset": "paper", "method": "sparsegpt+refit"},
    "fast": {"preset": "fast"},
    "default": {"preset": "default"},
    "default+rotate": {"preset": "default", "rotate": "all"},
    "best": {"preset": "best"},
}


@dataclass(frozen=True)
class QualityRow:
    """One prune: perplexity on the evaluation text, seconds of the prune alone.

    grid, quantizer: the integers that kept weights were rounded to, and how. bits: of a weight of the pruned linears,
    as packed or, where that is less, dense. elsewhere: perplexity on further texts.
    """

    method: str
    pattern: str
    perplexity: float
    seconds: float
    grid: str = NO_GRID
    quantizer: str = ""
    bits: float = 16.0
    elsewhere: dict[str, float] = field(default_factory=dict)

    @property
    def asked(self) -> tuple[str, str, str, str]:
        """What was measured."""
        return self.method, self.pattern, self.grid, self.quantizer


@dataclass(frozen=True)
class QualityBench:
    """What to prune and how to judge it.

    evaluation: texts, comma-separated, of which the first is the one that counts. max_windows of each are scored, all
    where None. revision, trust_remote_code: as for `load_model`. rotate: the bases of every row that does not say its
    own; None: as the presets do.
    """

    model: str
    calibration: str
    evaluation: str
    samples: int
    sequence_length: int
    seed: int = 0
    device: str = "auto"
    max_windows: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    rotate: str | None = None

    def check(self) -> None:
        """Look at texts, device and configuration, before anything is loaded. Raises SparseGPTError."""
        check_texts(self.calibration, "calibration")
        for text in self.texts:
            check_text(text, "evaluation")
        pick_device(self.device)
        config = load_config(
            self.model, revision=self.revision, trust_remote_code=self.trust_remote_code, to_prune=True
        )
        sequence_length(self.model, config, self.sequence_length)
        load_texts(self.calibration, "calibration")
        for text in self.texts:
            load_text(text, "evaluation")

    @property
    def texts(self) -> tuple[str, ...]:
        """The evaluation texts."""
        return tuple(self.evaluation.split(","))

    def run(
        self,
        methods: tuple[str, ...],
        patterns: tuple[str, ...],
        known: list[QualityRow] | None = None,
        *,
        grids: tuple[str, ...] = (NO_GRID,),
        quantizers: tuple[str, ...] = ("gptq",),
    ) -> Iterator[QualityRow]:
        """One new row at a time, the dense model first; what is known already is not measured again.

        grids: as `parse_grid` takes them; pattern "0" on a grid rounds alone, and on none is the dense model.
        """
        there = {row.asked for row in known or []}
        if ("dense", "-", NO_GRID, "") not in there:
            yield self._scored(self._load(), "dense", "-", 0.0)
        for pattern, method, grid in itertools.product(patterns, methods, grids):
            if grid == NO_GRID and parse_sparsity(pattern).zeros == 0:
                continue
            for quantizer in quantizers if grid != NO_GRID else ("",):
                if (method, pattern, grid, quantizer) not in there:
                    yield self._prune(method, pattern, grid, quantizer)

    def read(self, path: Path) -> list[QualityRow]:
        """The rows that `write` left in a file; none without one. Raises SparseGPTError if measured otherwise."""
        if not path.exists():
            return []
        content = read_checked(path)
        there = content.get("bench")
        if not isinstance(there, dict):
            raise SparseGPTError(f"{path} is no file of this benchmark, which keeps its rows there: give another file")
        for name, value in self._measured_on().items():
            if there.get(name) != value:
                raise SparseGPTError(
                    f"{path} holds rows of another measurement ({name} {there.get(name)} there, {value} now): "
                    "give another file or remove it"
                )
        return [QualityRow(**row) for row in content["rows"]]

    def write(self, path: Path, rows: list[QualityRow]) -> None:
        """Write the rows, and what they were measured on, so that a later call need not measure them again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checked(path, {"bench": self._measured_on(), "rows": [asdict(row) for row in rows]})

    def _measured_on(self) -> dict[str, Any]:
        """What decides the rows; whether code may run does not."""
        return {name: value for name, value in asdict(self).items() if name != "trust_remote_code"}

    def _load(self) -> LoadedModel:
        return load_model(
            self.model,
            device=self.device,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            to_prune=True,
        )

    def _windows(self, loaded: LoadedModel) -> Any:
        """The calibration windows, [samples, sequence_length]."""
        return draw_mixture(
            load_texts(self.calibration, "calibration"),
            loaded.tokenizer,
            self.samples,
            self.sequence_length,
            self.seed,
            loaded.bos_token("auto"),
            model=loaded.model,
        ).windows

    def _prune(self, method: str, pattern: str, grid: str, quantizer: str) -> QualityRow:
        loaded = self._load()
        windows = self._windows(loaded)
        rounding: dict[str, Any] = {} if grid == NO_GRID else {"quantize": grid, "quantizer": quantizer}
        bases = {} if self.rotate is None else {"rotate": self.rotate}
        report = prune_model(loaded.model, windows, pattern, **{**bases, **LADDER[method], **rounding})
        bits = _bits(report.layers, 1 - parse_sparsity(pattern).zeros)
        seconds = sum(report.seconds.values())
        return self._scored(loaded, method, pattern, seconds, grid=grid, quantizer=quantizer, bits=bits)

    def _scored(self, loaded: LoadedModel, method: str, pattern: str, seconds: float, **integers: Any) -> QualityRow:
        """The row of a model; integers: grid, quantizer and bits, if there are any."""
        length, most = self.sequence_length, self.max_windows
        found = {
            text: score_text(loaded.model, loaded.tokenizer, text, length, max_windows=most).perplexity
            for text in self.texts
        }
        first = found.pop(self.texts[0])
        return QualityRow(method, pattern, first, seconds, elsewhere=found, **integers)


def _bits(layers: list[LayerReport], kept: float) -> float:
    """Of a weight, the mean of these layers: 16, packed a bit more for each weight that is kept."""
    sizes = [math.prod(layer.shape) for layer in layers]
    plain = min(16.0, 16 * kept + 1)
    bits = [plain if layer.bits is None else layer.bits for layer in layers]
    return sum(size * each for size, each in zip(sizes, bits, strict=True)) / sum(sizes)


def draw_bytes(rows: list[QualityRow], title: str, path: Path) -> list[Path]:
    """Perplexity against bytes a weight: a line for each pattern, of the best row for each grid. PNG and SVG."""
    figure, ((axes,),) = new_figure(1, 1, figsize=(7, 4.5))
    best: dict[tuple[str, str], QualityRow] = {}
    for row in sorted(rows, key=lambda row: -row.perplexity):
        best["dense" if row.pattern in ("0", "-") else row.pattern, row.grid] = row
    for pattern in sorted({pattern for pattern, _ in best}):
        line = sorted((row.bits / 8, row.perplexity, row.grid) for (of, _), row in best.items() if of == pattern)
        axes.plot([x for x, _, _ in line], [y for _, y, _ in line], marker="o", label=pattern)
        for x, y, grid in line:
            axes.annotate("16 bits" if grid == NO_GRID else grid, (x, y), (3, 4), textcoords="offset points", size=7)
    axes.set(xscale="log", yscale="log", xlabel="bytes a weight of the linears", ylabel="perplexity", title=title)
    axes.legend()
    return saved(figure, path)


def draw(rows: list[QualityRow], title: str, path: Path) -> list[Path]:
    """Perplexity of n:m patterns on the left, against the share of zeros on the right, a line a method. PNG and SVG.

    Rows on a grid are left out.
    """
    dense = next(row.perplexity for row in rows if row.method == "dense")
    pruned = [row for row in rows if row.method != "dense" and row.grid == NO_GRID]
    groups = sorted({row.pattern for row in pruned if ":" in row.pattern})
    figure, ((left, right),) = new_figure(1, 2, figsize=(9, 4.5), sharey=True, width_ratios=(max(1, len(groups)), 4))
    for axes in (left, right):
        axes.axhline(dense, color="grey", linestyle=":", label=f"dense ({dense:.2f})")
    for method in dict.fromkeys(row.method for row in pruned):
        found = {row.pattern: row.perplexity for row in pruned if row.method == method}
        line = sorted((parse_sparsity(pattern).zeros, found[pattern]) for pattern in found if ":" not in pattern)
        marks = [(groups.index(pattern), found[pattern]) for pattern in found if ":" in pattern]
        (drawn,) = right.plot([x for x, _ in line], [y for _, y in line], marker="o", label=method)
        left.plot([x for x, _ in marks], [y for _, y in marks], "o", color=drawn.get_color())
    left.set(yscale="log", xlabel="n:m", ylabel="perplexity", xlim=(-0.5, max(1, len(groups)) - 0.5))
    left.set_xticks(range(len(groups)), groups)
    right.set(xlabel="share of zeros")
    right.legend()
    figure.suptitle(title)
    return saved(figure, path)
