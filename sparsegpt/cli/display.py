"""What a person sees: progress, tables and warnings, by rich; plain lines when the output is not a terminal.

The console is that of `console.open_console`, which reads no markup in what it is given.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sparsegpt.counting import StepReport
from sparsegpt.driver.reports import BlockReport, EpochReport, LayerReport, RotationReport
from sparsegpt.eval.perplexity import TextScore
from sparsegpt.eval.report.texts import short_names, with_error
from sparsegpt.eval.tasks import TaskScore
from sparsegpt.listeners.time_left import StepsLeft, TimeLeft, in_words
from sparsegpt.run import shrink_job
from sparsegpt.run.inspection import TensorFinding
from sparsegpt.run.job import Listener
from sparsegpt.run.memory import readable
from sparsegpt.run.memory_plan import Plan

WORST_LAYERS = 5
# What a plan tells, and how its table calls it.
KINDS_OF_BYTES = {"memory": "memory", "gpu": "GPU memory", "disk": "disk", "traffic": "sent to other ranks"}
# Columns of scores: {heading: (letters of a line from which on there is room for it, (entry of the report, form))}.
SCORES = {
    "perplexity": (0, ("perplexity", "{:.4f}")),
    "bits per byte": (52, ("bits_per_byte", "{:.4f}")),
    "tokens/s": (60, ("tokens_per_second", "{:.0f}")),
}


class RunDisplay(Listener):
    """Shows a run while it happens: a bar over blocks with the running error and the time left."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.live = console.is_terminal and not quiet
        self.progress = Progress(
            _plain("description", "bold"),
            BarColumn(),
            MofNCompleteColumn(),
            _plain("fields[note]"),
            TimeElapsedColumn(),
            _plain("fields[left]"),
            _plain("fields[at_work]"),
            console=console,
            disable=not self.live,
        )
        self.task: Any = None
        self.steps: Any = None
        self.left, self.steps_left = TimeLeft(), StepsLeft()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def stage(self, text: str) -> None:
        """Name the part of the work that begins."""
        self._end_steps()
        if not self.quiet:
            print_line(self.console, text)

    def scored(self, which: str, score: TextScore) -> None:
        """Show one score."""
        if not self.quiet:
            print_line(self.console, f"  {which} perplexity on {score.data}: {score.perplexity:.4g}")

    def scored_task(self, which: str, score: TaskScore) -> None:
        """Show one metric of a task."""
        if not self.quiet:
            print_line(self.console, f"  {which} {task_line(score)}")

    def rotated(self, report: RotationReport) -> None:
        """Print how much less is lost."""
        found = {"stream": report.stream, "values": report.values}
        parts = [f"{name} {shares[0]:.1%} -> {shares[1]:.1%}" for name, shares in found.items() if shares]
        if parts and not self.quiet:
            print_line(self.console, f"  rotated, share dropped of a row: {', '.join(parts)}")

    def block(self, report: BlockReport) -> None:
        """Move the bar, or print a line where there is none."""
        left = f"{in_words(self.left.after(report))} left"
        if self.live:
            self._end_steps()
            if self.task is None:
                self.task = self._bar("blocks", report.blocks)
            note = f"error {report.relative_error:.4f}"
            self.progress.update(self.task, completed=report.index + 1, note=note, left=left)
        elif not self.quiet:
            print_line(
                self.console,
                f"  block {report.index + 1}/{report.blocks}: relative error {report.relative_error:.4f}, "
                f"{report.seconds:.1f} s, {left}",
            )

    def epoch(self, report: EpochReport) -> None:
        """Print what the held-out windows say."""
        if not self.quiet:
            text = f"  epoch {report.epoch}/{report.epochs}: divergence {report.loss:.4f} nats a token"
            print_line(self.console, text)

    def layer(self, report: LayerReport) -> None:
        """Name the linear on the bar; elsewhere single layers are left to the report."""
        if self.live and self.task is not None:
            speed = report.tokens / max(report.seconds, 1e-9)
            name = report.name.split(".", 3)[-1]
            self.progress.update(self.task, at_work=f"{name} ({speed:.0f} tokens/s)")

    def step(self, report: StepReport) -> None:
        """Move a bar of its own, which goes with its part of the work; elsewhere steps are not told."""
        if not self.live:
            return
        left = self.steps_left.after(report)
        if left is None:
            self._end_steps()
            self.steps = self._bar(report.part, report.total, report.unit)
        text = "" if left is None else f"{in_words(left)} left"
        self.progress.update(self.steps, completed=report.done, left=text)
        if report.done == report.total:
            self._end_steps()

    def _bar(self, name: str, total: int, note: str = "") -> Any:
        return self.progress.add_task(name, total=total, note=note, left="", at_work="")

    def _end_steps(self) -> None:
        if self.steps is not None:
            self.progress.remove_task(self.steps)
            self.steps = None

    def warn(self, text: str) -> None:
        """Loud, even with --quiet."""
        print_warning(self.console, text)


class ShrinkDisplay(RunDisplay, shrink_job.Listener):
    """Shows a `shrink` while it happens."""

    def trained(self, epoch: int, epochs: int, loss: float) -> None:
        """Print what the held-out windows say."""
        self.epoch(EpochReport(epoch, epochs, loss))


def _plain(entry: str, style: str = "none") -> TextColumn:
    """A column of a bar with an entry of its task as it is: a name is no markup."""
    return TextColumn(f"{{task.{entry}}}", style=style, markup=False)


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """One line, which a terminal may wrap and a file keeps whole."""
    console.print(text, style=style, soft_wrap=True)


def print_warning(console: Console, text: str) -> None:
    """What nobody must overlook."""
    print_line(console, f"WARNING: {text}", style="bold red")


def print_scores(console: Console, scores: Sequence[TextScore], length: int) -> None:
    """The lines of `eval`: a model's scores on texts, in windows of `length` tokens."""
    for score in scores:
        print_line(
            console,
            f"{score.data}: perplexity {score.perplexity:.4f}, {score.bits_per_byte:.4f} bits per byte "
            f"({score.windows} windows of {length} tokens)",
        )
        if score.alarm:
            print_warning(console, score.alarm)


def print_evaluation(
    console: Console, scores: Sequence[TextScore], length: int, task_scores: Sequence[TaskScore]
) -> None:
    """All that `eval` has found."""
    print_scores(console, scores, length)
    print_task_scores(console, task_scores)


def print_task_scores(console: Console, scores: Sequence[TaskScore]) -> None:
    """The lines of `eval --tasks`."""
    for score in scores:
        print_line(console, task_line(score))


def task_line(score: TaskScore) -> str:
    """A metric with its standard error."""
    return f"{score.task}: {score.metric} {with_error(score.value, score.stderr)}"


def new_table(*columns: str, broken: Sequence[str], title: str | None = None) -> Table:
    """A table of which these columns are broken into lines where they do not fit: the ends of names tell them apart.

    The others, which are numbers, stay whole.
    """
    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column not in broken)
    return table


def print_plan(console: Console, model: str, planned: Plan) -> None:
    """The table of `run --plan`."""
    table = Table("", "part", "at its peak", title=f"{model}: {planned.micro_batch} windows in one forward pass")
    for kind, name in KINDS_OF_BYTES.items():
        parts: dict[str, int] = getattr(planned, kind)
        for part, count in parts.items():
            table.add_row("", part, readable(count))
        if parts:
            table.add_row(name, "in all", readable(planned.total(kind)), end_section=True)
    console.print(table)


def print_report(console: Console, report: dict[str, Any], out: Path) -> None:
    """The closing tables of a run, and where its result lies."""
    if report["perplexity"]:
        console.print(_score_table(report, console.width))
    console.print(_worst_layers(report["layers"]))
    seconds = ", ".join(f"{part} {value:.1f}" for part, value in report["seconds"].items())
    memory = f"{report['peak_memory_bytes'] / 2**20:.0f} MiB"
    if "peak_gpu_memory_bytes" in report:
        memory += f", GPU {report['peak_gpu_memory_bytes'] / 2**20:.0f} MiB"
    zeros = 1 - report["density_of_pruned_linears"]
    if report["bits_per_weight"] is not None:
        stored = sum(math.prod(layer["shape"]) * layer["bits"] / 8 for layer in report["layers"] if layer["bits"])
        print_line(console, f"integers: {report['bits_per_weight']:.3f} bits a weight, {stored / 1e6:.1f} MB in files")
    print_line(console, f"zeros in pruned linears {zeros:.2%}; seconds: {seconds}; peak memory {memory}")
    print_line(console, f"saved {out}")


def _score_table(report: dict[str, Any], width: int) -> Table:
    columns = {name: entry for name, (least, entry) in SCORES.items() if width >= least}
    title = f"{report['model']} at {report['sparsity']}"
    table = new_table("data", "model", *columns, broken=("data",), title=title)
    shown = short_names(list(report["perplexity"]))
    for data, by_model in report["perplexity"].items():
        for which in by_model:
            table.add_row(
                shown[data], which, *(form.format(report[key][data][which]) for key, form in columns.values())
            )
    return table


def _worst_layers(layers: list[dict[str, Any]]) -> Table:
    title = f"{len(layers)} layers pruned, the worst:"
    table = new_table("layer", "shape", "zeros", "relative error", broken=("layer",), title=title)
    for layer in sorted(layers, key=lambda layer: layer["relative_error"], reverse=True)[:WORST_LAYERS]:
        shape = " x ".join(map(str, layer["shape"]))
        table.add_row(layer["name"], shape, f"{layer['zeros']:.1%}", f"{layer['relative_error']:.4f}")
    return table


def print_findings(console: Console, findings: list[TensorFinding]) -> None:
    """The table of `inspect`."""
    table = new_table("weight", "shape", "stored", "zeros", "pattern", "holds", broken=("weight", "holds"))
    for finding in findings:
        shape = " x ".join(map(str, finding.shape))
        holds = finding.problem or "yes"
        table.add_row(finding.name, shape, finding.stored, f"{finding.zeros:.2%}", finding.pattern, holds)
    console.print(table)


def print_smaller(console: Console, report: dict[str, Any], out: Path) -> None:
    """The closing tables of `shrink`, and where its result lies."""
    dense, shrunk = (report["parameters"][which] for which in ("dense", "shrunk"))
    changes = ", ".join(f"{key} {value}" for key, value in report["config"].items() if not isinstance(value, list))
    print_line(
        console,
        f"{dense / 1e6:.2f}M parameters -> {shrunk / 1e6:.2f}M; {report['kept_of_blocks']:.1%} of the blocks' weights "
        f"kept: {changes}",
    )
    if report["perplexity"]:
        shown = short_names(list(report["perplexity"]))
        table = new_table("data", "dense", "shrunk", broken=("data",), title="perplexity")
        for data, found in report["perplexity"].items():
            table.add_row(shown[data], f"{found['dense']:.4f}", f"{found['shrunk']:.4f}")
        console.print(table)
    if report["speed"]:
        table = new_table("tokens/s", "dense", "shrunk", "times as fast", broken=())
        for what in ("prefill", "decode"):
            before, after = (report["speed"][which][what] for which in ("dense", "shrunk"))
            table.add_row(what, f"{before:.0f}", f"{after:.0f}", f"{after / before:.2f}")
        console.print(table)
    print_line(console, f"saved {out}")
