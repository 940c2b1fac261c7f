"""The page of one run: what a template needs, in the order in which it is read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sparsegpt.eval.report import tasks, texts
from sparsegpt.eval.report.charts import Chart, Point, Series, chart
from sparsegpt.eval.report.layers import Layers
from sparsegpt.eval.report.reading import Run, number

# Parts of "seconds", in the order in which they come, in words.
PHASES = {
    "load": "loading model and texts",
    "eval": "scoring before and after",
    "sample": "writing samples of text",
    "rotate": "finding other bases",
    "verify": "checking blocks against the model",
    "capture": "running calibration text through blocks",
    "solve": "choosing and updating weights",
    "reconstruct": "training single blocks",
    "distill": "training all blocks together",
}
# Phases of "peak_bytes_by_phase", in words.
MEMORY = {"load": "loading", "eval": "scoring", "prune": "pruning", "save": "saving"}
TOTAL = "total"


class Bar(NamedTuple):
    """A line of a bar chart: a name, a number as a text, and its share of the longest bar."""

    name: str
    text: str
    share: float


class Tile(NamedTuple):
    """A figure at the top of the page: what it is of, the figure, and a remark. wide: a figure of two numbers."""

    name: str
    figure: str
    remark: str
    wide: bool = False


def view(run: Run) -> dict[str, Any]:
    """What the template of one run is given."""
    layers = Layers(run)
    return {
        "title": f"{run.report['model'].rstrip('/').rpartition('/')[2]} pruned to {run.report['sparsity']}",
        "run": run,
        "report": run.report,
        "layers": layers,
        "headline": headline(run, layers),
        "tiles": tiles(run),
        "tasks": tasks.lines(run),
        "kinds": bars([(kind, error) for kind, error in layers.by_kind], texts.error),
        "by_block": by_block(run),
        "curves": curves(run),
        "times": times(run),
        "memory": memory(run),
        "settings": run.report.get("settings", {}),
    }


def headline(run: Run, layers: Layers) -> str:
    """What was done, in a sentence."""
    pattern = ", ".join(layers.patterns) or run.report["sparsity"]
    zeros = f": {texts.percent(run.zeros)} of their weights are zero now" if run.zeros else ""
    return f"{len(run.layers)} linear layers were pruned to {pattern} by {run.report['method']}{zeros}."


def tiles(run: Run) -> list[Tile]:
    """The figures that matter most."""
    names = texts.short_names(list(run.scores))
    found = [
        Tile(
            f"perplexity on {names[data]}",
            f"{texts.perplexity(scores.get('dense'))} → {texts.perplexity(scores.get('pruned'))}",
            f"{texts.change(scores.get('dense'), scores.get('pruned'))}; dense → pruned, lower is better",
            wide=True,
        )
        for data, scores in run.scores.items()
    ]
    if run.zeros is not None:
        weights = f"of {run.pruned_weights:,} weights in {len(run.layers)} layers"
        found.append(Tile("zeros", texts.percent(run.zeros), weights))
    if run.packed_bytes is not None:
        remark = f"packed, about; {texts.size(run.dense_bytes)} dense"
        found.append(Tile("size", texts.size(run.packed_bytes), remark))
    report = run.report
    if (total := number(report.get("seconds", {}), TOTAL)) is not None:
        remark = f"memory at most {texts.size(report.get('peak_memory_bytes'))}"
        found.append(Tile("time", texts.seconds(total), remark))
    return found


def bars(values: Sequence[tuple[str, float]], text: Any) -> list[Bar]:
    """Bars of non-negative numbers, the longest as long as there is room."""
    longest = max((value for _, value in values), default=0.0)
    return [Bar(name, text(value), max(0.0, value) / longest if longest > 0 else 0.0) for name, value in values]


def by_block(run: Run) -> Chart | None:
    """Mean error of each block."""
    rows = [(block["index"], number(block, "relative_error")) for block in run.report.get("blocks", [])]
    points = [Point(index, error, f"block {index}: {texts.error(error)}") for index, error in rows if error is not None]
    axes = (("block", _whole), ("mean error of its layers", texts.error))
    return chart("Error by block", [Series("error", tuple(points))], *axes, from_zero=True) if len(points) > 1 else None


def curves(run: Run) -> list[Chart]:
    """What training did: of all blocks together by epoch, of single blocks by epoch, and what it left of each."""
    found = (_distillation(run), _reconstruction(run), _left(run))
    return [drawn for drawn in found if drawn is not None]


def _distillation(run: Run) -> Chart | None:
    points = [
        Point(row["epoch"], row["loss"], f"epoch {row['epoch']}: {row['loss']:.4g} nats a token")
        for row in run.report.get("epochs", [])
    ]
    axes = (("epoch", _whole), ("divergence from the dense model, nats a token", _short))
    return chart("Training of all blocks together", [Series("held-out text", tuple(points))], *axes, from_zero=True)


def _reconstruction(run: Run) -> Chart | None:
    series = [
        Series(
            f"block {block['index']}",
            tuple(
                Point(epoch, loss, f"block {block['index']}, epoch {epoch}: {loss:.4g}")
                for epoch, loss in enumerate(block["losses"])
            ),
        )
        for block in run.report.get("blocks", [])
        if block.get("losses")
    ]
    axes = (("epoch", _whole), ("held-out loss, a line a block", _short))
    return chart("Training of single blocks", series, *axes)


def _left(run: Run) -> Chart | None:
    rows = [(block["index"], number(block, "reconstruction")) for block in run.report.get("blocks", [])]
    points = [
        Point(index, share, f"block {index}: {share:.1%} of the loss left")
        for index, share in rows
        if share is not None
    ]
    axes = (("block", _whole), ("loss that training left", lambda share: f"{share:.0%}"))
    title = "What training left of each block's loss"
    return chart(title, [Series("share of the loss", tuple(points))], *axes, from_zero=True)


def times(run: Run) -> list[Bar]:
    """Seconds of each part of the work, without those that took none."""
    known = run.report.get("seconds", {})
    names = [*(name for name in PHASES if name in known), *(name for name in known if name not in (*PHASES, TOTAL))]
    parts = {PHASES.get(name, name): number(known, name) or 0.0 for name in names}
    rest = (number(known, TOTAL) or 0.0) - sum(parts.values())
    shown = [(name, value) for name, value in parts.items() if value >= 0.05]
    return bars(shown + ([("everything else", rest)] if shown and rest >= 0.05 else []), texts.seconds)


def memory(run: Run) -> list[Bar]:
    """Peaks of memory: by phase where they are known, of the whole run, and what the plan said."""
    report = run.report
    by_phase = {f"while {MEMORY.get(name, name)}": peak for name, peak in report.get("peak_bytes_by_phase", {}).items()}
    whole = {
        "at most": report.get("peak_private_memory_bytes"),
        "with pages of files": report.get("peak_memory_bytes"),
        "on the GPU": report.get("peak_gpu_memory_bytes"),
        "as planned": report.get("planned_bytes", {}).get("memory"),
    }
    return bars([(name, float(peak)) for name, peak in (by_phase | whole).items() if peak], texts.size)


def _whole(value: float) -> str:
    return f"{value:.0f}" if abs(value - round(value)) < 1e-6 else ""


def _short(value: float) -> str:
    return f"{value:.3g}"
