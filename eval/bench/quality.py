"""`bench quality`: perplexity of every method at every sparsity on one model, as a table and as a figure."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsegpt.calib_data import check_text, check_texts, draw_mixture, load_text, load_texts
from sparsegpt.driver.pipeline import prune_model
from sparsegpt.errors import SparseGPTError
from sparsegpt.eval.perplexity import score_text
from sparsegpt.files.checked_json import read_checked, write_checked
from sparsegpt.model.loading import LoadedModel, load_config, load_model, sequence_length
from sparsegpt.settings.machine import pick_device
from sparsegpt.sparsity import parse_sparsity

PATTERNS = ("2:4", "4:8", "0.5", "0.6", "0.7")
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
    """One prune: perplexity on the evaluation text, seconds of the prune alone."""

    method: str
    pattern: str
    perplexity: float
    seconds: float


@dataclass(frozen=True)
class QualityBench:
    """What to prune and how to judge it; max_windows of the evaluation text are scored, all where None.

    revision, trust_remote_code: as for `load_model`.
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

    def check(self) -> None:
        """Look at texts, device and configuration, before anything is loaded. Raises SparseGPTError."""
        check_texts(self.calibration, "calibration")
        check_text(self.evaluation, "evaluation")
        pick_device(self.device)
        config = load_config(
            self.model, revision=self.revision, trust_remote_code=self.trust_remote_code, to_prune=True
        )
        sequence_length(self.model, config, self.sequence_length)
        load_texts(self.calibration, "calibration")
        load_text(self.evaluation, "evaluation")

    def run(
        self, methods: tuple[str, ...], patterns: tuple[str, ...], known: list[QualityRow] | None = None
    ) -> Iterator[QualityRow]:
        """One new row at a time, the dense model first; what is known already is not measured again."""
        there = {(row.method, row.pattern) for row in known or []}
        if ("dense", "-") not in there:
            yield QualityRow("dense", "-", self._score(self._load()), 0.0)
        for pattern in patterns:
            for method in methods:
                if (method, pattern) not in there:
                    yield self._prune(method, pattern)

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

    def _prune(self, method: str, pattern: str) -> QualityRow:
        loaded = self._load()
        texts = load_texts(self.calibration, "calibration")
        windows = draw_mixture(
            texts,
            loaded.tokenizer,
            self.samples,
            self.sequence_length,
            self.seed,
            loaded.bos_token("auto"),
            model=loaded.model,
        ).windows
        report = prune_model(loaded.model, windows, pattern, **LADDER[method])
        return QualityRow(method, pattern, self._score(loaded), sum(report.seconds.values()))

    def _score(self, loaded: LoadedModel) -> float:
        return score_text(
            loaded.model, loaded.tokenizer, self.evaluation, self.sequence_length, max_windows=self.max_windows
        ).perplexity


def draw(rows: list[QualityRow], title: str, path: Path) -> list[Path]:
    """Perplexity of n:m patterns on the left, against the share of zeros on the right, a line a method. PNG and SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    dense = next(row.perplexity for row in rows if row.method == "dense")
    pruned = [row for row in rows if row.method != "dense"]
    groups = sorted({row.pattern for row in pruned if ":" in row.pattern})
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 4.5), layout="constrained", sharey=True, width_ratios=(max(1, len(groups)), 4)
    )
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
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for target in written:
        figure.savefig(target, dpi=150)
    plt.close(figure)
    return written
