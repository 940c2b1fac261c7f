"""The tables of the benchmarks, for a terminal and for BENCHMARKS.md."""

from collections.abc import Sequence
from io import StringIO
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from sparsegpt.eval.bench.kernels import DecodeRow, KernelBench
from sparsegpt.eval.bench.memory import MemoryRow
from sparsegpt.eval.bench.pipeline import PipelineRow
from sparsegpt.eval.bench.quality import LADDER, NO_GRID, QualityRow
from sparsegpt.eval.bench.shrink import LADDER as SMALLER
from sparsegpt.eval.bench.shrink import SpeedRow
from sparsegpt.eval.bench.solver import SolverRow
from sparsegpt.eval.bench.sparsity import SparsityRow
from sparsegpt.kernels.dispatch.measured import ANY, KernelRow, Measured, dtype_name, in_words
from sparsegpt.run.memory import readable
from sparsegpt.settings.prune_settings import PRESETS
from sparsegpt.solvers.rounding import QUANTIZERS


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
    dense, *pruned = (row for row in rows if row.grid == NO_GRID)
    patterns = sorted({row.pattern for row in pruned}, key=lambda pattern: (":" not in pattern, pattern))
    table = Table("method", *patterns, title=f"perplexity (seconds of the prune); dense {dense.perplexity:.2f}")
    cells = {(row.method, row.pattern): f"{row.perplexity:.2f} ({row.seconds:.0f})" for row in pruned}
    order = [*LADDER, *(name for name in SMALLER if name not in LADDER)]
    for method in sorted({row.method for row in pruned}, key=order.index):
        table.add_row(method, *(cells.get((method, pattern), "") for pattern in patterns))
    return table


def texts_table(rows: Sequence[QualityRow], first: str) -> Table:
    """The rows of `bench quality` without a grid: patterns and methods down, texts across, the first of this name.

    A cell has the perplexity and, beside it, the share of the gap that `paper` leaves to dense which is closed.
    """
    plain = {(row.pattern, row.method): {first: row.perplexity, **row.elsewhere} for row in rows if row.grid == NO_GRID}
    dense = plain.pop(("-", "dense"))
    table = Table("pattern", "method", *map(_text_name, dense), title="perplexity (share of paper's gap closed)")
    table.add_row("", "dense", *(f"{perplexity:.2f}" for perplexity in dense.values()))
    for (pattern, method), found in plain.items():
        paper = plain.get((pattern, "paper"), {})
        cells = (_closed(found[text], paper.get(text), dense[text]) for text in dense)
        table.add_row(pattern, method, *cells)
    return table


def _closed(perplexity: float, paper: float | None, dense: float) -> str:
    share = "" if paper is None or paper <= dense else f" ({(paper - perplexity) / (paper - dense):.0%})"
    return f"{perplexity:.2f}{share}"


def _text_name(text: str) -> str:
    """A file without its folders, another text by its own name."""
    return text.rpartition("/")[2] or text


def integers_table(rows: Sequence[QualityRow]) -> Table:
    """The rows of `bench quality` on grids: patterns, methods and grids down, quantizers across."""
    rounded = [row for row in rows if row.grid != NO_GRID]
    quantizers = sorted({row.quantizer for row in rounded}, key=list(QUANTIZERS).index)
    table = Table("pattern", "method", "grid", "bytes a weight", *quantizers, title="perplexity on integers")
    cells = {row.asked: f"{row.perplexity:.2f}" for row in rounded}
    for pattern, method, grid, bits in dict.fromkeys((row.pattern, row.method, row.grid, row.bits) for row in rounded):
        found = (cells.get((method, pattern, grid, quantizer), "") for quantizer in quantizers)
        table.add_row(pattern, method, grid, f"{bits / 8:.3f}", *found)
    return table


def speed_table(rows: Sequence[SpeedRow]) -> Table:
    """The table of `bench speed`."""
    table = Table("model", "parameters", "prefill, tokens/s", "faster", "decode, tokens/s", "faster")
    for row in rows:
        speeds = (f"{row.prefill:.0f}", f"{row.prefill_times:.2f}", f"{row.decode:.0f}", f"{row.decode_times:.2f}")
        table.add_row(row.model, f"{row.parameters / 1e6:.1f}M", *speeds)
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
        "read, us",
        "of it",
        "against dense",
        "against best dense",
        "ceiling",
        title=f"{bench.device}: a copy reaches {bench.bandwidth:.0f} GB/s; read: of as many bytes, in the same rounds",
    )
    for row in bench.rows:
        table.add_row(
            f"{row.rows} x {row.columns}",
            str(row.tokens),
            row.dtype,
            row.kernel + (" *" if row.chosen else ""),
            f"{row.microseconds:.0f}" if row.microseconds >= 1000 else f"{row.microseconds:.3g}",
            f"{row.gigabytes_per_second:.1f}",
            f"{row.read_microseconds:.3g}",
            f"{row.read_microseconds / row.microseconds:.0%}",
            f"{row.speedup:.2f}x",
            f"{row.speedup_over_best_dense:.2f}x",
            f"{row.ceiling:.2f}x",
        )
    return table


def sparsity_table(rows: Sequence[SparsityRow]) -> Table:
    """The table of `bench sparsity`; microseconds, and how many times as fast as the faster dense product."""
    titles = ("pattern", "tokens", "library", "in huge pages", "CSR", "ours", "route", "ours", "CSR", "claimed")
    table = Table(*titles, title="microseconds; then times as fast as the faster dense product")
    for row in rows:
        times = (row.library_microseconds, row.huge_pages_microseconds, row.csr_microseconds, row.microseconds)
        table.add_row(
            row.pattern,
            str(row.tokens),
            *("" if taken is None else f"{taken:.0f}" for taken in times),
            row.route,
            f"{row.speedup:.2f}x",
            "" if row.csr_speedup is None else f"{row.csr_speedup:.2f}x",
            "" if row.claimed is None else "{}x to {}x".format(*row.claimed),
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
