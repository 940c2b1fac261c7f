"""What a person sees: progress, tables and warnings, by rich; plain lines when the output is not a terminal."""

from collections.abc import Sequence
from io import StringIO
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sparsegpt.eval.bench_memory import MemoryRow
from sparsegpt.eval.bench_pipeline import PipelineRow
from sparsegpt.eval.bench_quality import LADDER, QualityRow
from sparsegpt.eval.bench_solver import SolverRow
from sparsegpt.eval.perplexity import TextScore
from sparsegpt.inspection import TensorFinding
from sparsegpt.kernels.bench import DecodeRow, KernelBench, KernelRow
from sparsegpt.kernels.measured import ANY, Measured, dtype_name, in_words
from sparsegpt.plan import Plan, readable
from sparsegpt.reports import BlockReport, EpochReport, LayerReport
from sparsegpt.run import Listener
from sparsegpt.settings import PRESETS

WORST_LAYERS = 5


class RunDisplay(Listener):
    """Shows a run while it happens: a bar over blocks with the running error and the time left."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.live = console.is_terminal and not quiet
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("error {task.fields[error]:.4f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self.task: Any = None

    def __enter__(self) -> "RunDisplay":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def stage(self, text: str) -> None:
        """Name the part of the work that begins."""
        if not self.quiet:
            self.console.print(text)

    def scored(self, which: str, score: TextScore) -> None:
        """Show one score."""
        if not self.quiet:
            self.console.print(f"  {which} perplexity on {score.data}: {score.perplexity:.4g}")

    def block(self, report: BlockReport) -> None:
        """Move the bar, or print a line where there is none."""
        if self.live:
            if self.task is None:
                self.task = self.progress.add_task("blocks", total=report.blocks, error=0.0)
            self.progress.update(self.task, advance=1, error=report.relative_error)
        elif not self.quiet:
            self.console.print(
                f"  block {report.index + 1}/{report.blocks}: relative error {report.relative_error:.4f}, "
                f"{report.seconds:.1f} s"
            )

    def epoch(self, report: EpochReport) -> None:
        """Print what the held-out windows say."""
        if not self.quiet:
            self.console.print(f"  epoch {report.epoch}/{report.epochs}: divergence {report.loss:.4f} nats a token")

    def layer(self, report: LayerReport) -> None:
        """Single layers are left to the report."""

    def warn(self, text: str) -> None:
        """Loud, even with --quiet."""
        self.console.print(f"WARNING: {text}", style="bold red")


def print_plan(console: Console, model: str, planned: Plan) -> None:
    """The table of `run --plan`."""
    table = Table("", "part", "at its peak", title=f"{model}: {planned.micro_batch} windows in one forward pass")
    for kind, name in (("memory", "memory"), ("gpu", "GPU memory"), ("disk", "disk")):
        parts: dict[str, int] = getattr(planned, kind)
        for part, count in parts.items():
            table.add_row("", part, readable(count))
        if parts:
            table.add_row(name, "in all", readable(planned.total(kind)), end_section=True)
    console.print(table)


def print_report(console: Console, report: dict[str, Any]) -> None:
    """The closing tables of a run."""
    if report["perplexity"]:
        table = Table(
            "data",
            "model",
            "perplexity",
            "bits per byte",
            "tokens/s",
            title=f"{report['model']} at {report['sparsity']}",
        )
        for data, by_model in report["perplexity"].items():
            for which, perplexity in by_model.items():
                bits, speed = report["bits_per_byte"][data][which], report["tokens_per_second"][data][which]
                table.add_row(data, which, f"{perplexity:.4f}", f"{bits:.4f}", f"{speed:.0f}")
        console.print(table)
    worst = sorted(report["layers"], key=lambda layer: layer["relative_error"], reverse=True)[:WORST_LAYERS]
    table = Table(
        "layer", "shape", "zeros", "relative error", title=f"{len(report['layers'])} layers pruned, the worst:"
    )
    for layer in worst:
        shape = " x ".join(map(str, layer["shape"]))
        table.add_row(layer["name"], shape, f"{layer['zeros']:.1%}", f"{layer['relative_error']:.4f}")
    console.print(table)
    seconds = ", ".join(f"{part} {value:.1f}" for part, value in report["seconds"].items())
    memory = f"{report['peak_memory_bytes'] / 2**20:.0f} MiB"
    if "peak_gpu_memory_bytes" in report:
        memory += f", GPU {report['peak_gpu_memory_bytes'] / 2**20:.0f} MiB"
    console.print(
        f"zeros in pruned linears {1 - report['density_of_pruned_linears']:.2%}; "
        f"seconds: {seconds}; peak memory {memory}"
    )


def print_findings(console: Console, findings: list[TensorFinding]) -> None:
    """The table of `inspect`."""
    table = Table("weight", "shape", "stored", "zeros", "pattern", "holds")
    for finding in findings:
        shape = " x ".join(map(str, finding.shape))
        holds = finding.problem or "yes"
        table.add_row(finding.name, shape, finding.stored, f"{finding.zeros:.2%}", finding.pattern, holds)
    console.print(table)


def solver_table(rows: Sequence[SolverRow]) -> Table:
    """The table of `bench solver`; seconds, ratios of the textbook's time, losses against the textbook's."""
    table = Table(
        "layer",
        "pattern",
        "textbook",
        "ours",
        "faster",
        "without factor",
        "loss",
        "admm",
        "admm cost",
        "admm loss",
        title="seconds, factorisation included; admm cost: times ours / times the textbook",
    )
    for row in rows:
        table.add_row(
            f"{row.rows} x {row.columns}",
            row.pattern,
            f"{row.textbook_factor + row.textbook_solve:.3f}",
            f"{row.factor + row.solve:.3f}",
            f"{row.speedup:.2f}x",
            f"{row.solve_speedup:.2f}x",
            f"{row.loss_ratio:.5f}",
            f"{row.admm:.3f}",
            f"{row.admm_cost:.1f} / {row.admm_textbook_cost:.1f}",
            f"{row.admm_loss_ratio:.4f}",
        )
    return table


def pipeline_table(rows: Sequence[PipelineRow]) -> Table:
    """The table of `bench pipeline`."""
    table = Table("order", "seconds", "peak memory", "against block order")
    for row in rows:
        ratio = f"{row.seconds / rows[0].seconds:.2f}x"
        table.add_row(row.order, f"{row.seconds:.1f}", f"{row.peak_memory_bytes / 2**20:.0f} MiB", ratio)
    return table


def memory_table(rows: Sequence[MemoryRow]) -> Table:
    """The table of `bench memory`."""
    table = Table(
        "blocks", "preset", "pattern", "model", "one block", "peak of private memory", "planned", "planned / peak"
    )
    for row in rows:
        sizes = (row.model_bytes, row.block_bytes, row.peak_bytes, row.planned_bytes)
        share = f"{row.planned_bytes / row.peak_bytes:.2f}"
        table.add_row(str(row.blocks), row.preset, row.pattern, *map(readable, sizes), share)
    return table


def quality_table(rows: Sequence[QualityRow]) -> Table:
    """The table of `bench quality`: methods down, patterns across, perplexity and seconds in the cells."""
    dense, *pruned = rows
    patterns = sorted({row.pattern for row in pruned}, key=lambda pattern: (":" not in pattern, pattern))
    table = Table("method", *patterns, title=f"perplexity (seconds of the prune); dense {dense.perplexity:.2f}")
    cells = {(row.method, row.pattern): f"{row.perplexity:.2f} ({row.seconds:.0f})" for row in pruned}
    for method in sorted({row.method for row in pruned}, key=list(LADDER).index):
        table.add_row(method, *(cells.get((method, pattern), "") for pattern in patterns))
    return table


def kernels_table(bench: KernelBench) -> Table:
    """The table of `bench kernels`; a star marks what `auto` takes."""
    table = Table(
        "layer",
        "tokens",
        "dtype",
        "kernel",
        "us",
        "GB/s",
        "against dense",
        "against best dense",
        "ceiling",
        title=f"{bench.device}: a copy reaches {bench.bandwidth:.0f} GB/s",
    )
    for row in bench.rows:
        table.add_row(
            f"{row.rows} x {row.columns}",
            str(row.tokens),
            row.dtype,
            row.kernel + (" *" if row.chosen else ""),
            f"{row.microseconds:.0f}" if row.microseconds >= 1000 else f"{row.microseconds:.3g}",
            f"{row.gigabytes_per_second:.1f}",
            f"{row.speedup:.2f}x",
            f"{row.speedup_over_best_dense:.2f}x",
            f"{row.ceiling:.2f}x",
        )
    return table


def measured_table(rows: Sequence[Measured]) -> Table:
    """The table of `tune`: what serves how many tokens from now on."""
    table = Table(
        "dtype", "values", "weights up to", "route", "with --kernels resident", "against dense", title=rows[0].path
    )
    for row in rows:
        size = "any" if row.weights == ANY else f"{row.weights:,}"
        kept = "" if row.values else in_words(row.closed("resident"))
        gain = f"{row.ratio}x" if row.ratio else ""
        dtype = dtype_name(row.dtype)
        table.add_row(dtype, row.values or dtype, size, in_words(row.closed()), kept, gain)
    return table


def decode_table(rows: Sequence[DecodeRow]) -> Table:
    """The table of `bench decode`."""
    table = Table("model", "tokens/s", "against dense", "weights", "peak memory")
    for row in rows:
        peak = "unknown" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:.0f} MiB"
        table.add_row(
            row.model,
            f"{row.tokens_per_second:.1f}",
            f"{row.speedup:.2f}x",
            f"{row.weight_bytes / 2**20:.0f} MiB",
            peak,
        )
    return table


def gpu_tables(results: dict[str, Any]) -> list[str | Table]:
    """`bench gpu` for BENCHMARKS.md: where and with what, the tests' last line, a table of each part that has rows."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    kernels, solver, prune = (results[name] for name in ("kernels", "solver", "prune"))
    found: list[str | Table] = [f"{results['date']}, {results['device']}, {versions}."]
    found.append(f"Tests on the device: {results['correctness']['summary']}")
    if "rows" in kernels:
        rows = tuple(KernelRow(**row) for row in kernels["rows"])
        found.append(kernels_table(KernelBench(kernels["device"], kernels["bandwidth"], rows)))
    if "rows" in solver:
        found.append(solver_table([SolverRow(**row) for row in solver["rows"]]))
    presets = {name: each for name, each in prune.items() if name in PRESETS}
    if presets:
        table = Table("preset", "seconds", "of which", "peak GPU memory", title="a whole prune of a random OPT to 2:4")
        for name, each in presets.items():
            shares = ", ".join(f"{part} {spent:.1f}" for part, spent in each["seconds"].items() if part != "total")
            peak = each["peak_gpu_memory_bytes"]
            memory = "none" if peak is None else f"{peak / 2**30:.1f} GiB"
            table.add_row(name, f"{each['seconds']['total']:.1f}", shares, memory)
        found.append(table)
    return found


def markdown(parts: Sequence[str | Table]) -> str:
    """Paragraphs and tables, the titles of these as paragraphs before them."""
    written = StringIO()
    console = Console(file=written, width=160, highlight=False, markup=False)
    for part in parts:
        if isinstance(part, Table):
            console.print(part.title)
            part.title, part.box = None, MARKDOWN  # which begins and ends with an empty line
            console.print(part)
        else:
            console.print(part, end="\n\n")
    return "".join(f"{line.rstrip()}\n" for line in written.getvalue().splitlines())
