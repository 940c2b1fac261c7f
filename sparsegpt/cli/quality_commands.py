"""`bench quality` and `bench shrink`: a ladder of methods, row by row; what was measured before is kept."""

import sys
from collections.abc import Callable, Collection, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsegpt.cli.bench_options import Patterns, check_figure, patterns_of, print_rows
from sparsegpt.cli.console import silence_libraries
from sparsegpt.cli.options import (
    AsJson,
    Calibration,
    Device,
    EvalWindows,
    Model,
    Revision,
    Samples,
    Seed,
    TrustRemoteCode,
    WindowLength,
    at_home,
    data_names,
)
from sparsegpt.errors import SparseGPTError, unknown
from sparsegpt.grid import parse_grid
from sparsegpt.run.options import default_data
from sparsegpt.settings.prune_settings import LinearSettings, resolve_settings
from sparsegpt.sparsity import parse_sparsity

if TYPE_CHECKING:
    from rich.table import Table

    from sparsegpt.eval.bench.quality import QualityBench, QualityRow

Evaluation = Annotated[
    str | None,
    typer.Option(
        "--eval",
        help="Evaluation texts, comma-separated, each as in --calib; the first is the one that is drawn.",
        show_default="pydoc for the demo, else wikitext2",
    ),
]
Ladder = Annotated[str | None, typer.Option(help="Rows of the ladder, comma-separated.", show_default="all")]


def bench_quality(
    model: Model = "demo",
    calibration: Calibration = None,
    evaluate: Evaluation = None,
    samples: Samples = 128,
    sequence_length: WindowLength = 256,
    seed: Seed = 0,
    eval_windows: EvalWindows = None,
    methods: Ladder = None,
    patterns: Patterns = "2:4,4:8,0.5,0.6,0.7",
    quantize: Annotated[str, typer.Option(help="Grids of integers, as none,int4,int3:32; pattern 0 rounds alone.")] = (
        "none"
    ),
    quantizer: Annotated[str, typer.Option(help="Quantizers, comma-separated: gptq,rtn,awq.")] = "gptq",
    rotate: Annotated[
        str | None,
        typer.Option(help="Bases of all rows, as for `run`, but of those that name theirs.", show_default="by preset"),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    out: Annotated[
        Path,
        typer.Option(help="Figure to write, as .png and .svg; rows are kept beside it as .json.", callback=at_home),
    ] = Path("quality.png"),
    as_json: AsJson = False,
) -> None:
    """Perplexity of every method, sparsity and grid, as tables and figures; what was measured before is kept."""
    from sparsegpt.eval.bench.quality import LADDER, QualityBench

    silence_libraries()
    chosen = _rungs(methods, LADDER)
    asked, (grids, quantizers) = patterns_of(patterns), _rounding(patterns, quantize, quantizer)
    resolve_settings("2:4", rotate=rotate)
    check_figure(out)
    texts = _texts(model, calibration, evaluate)
    job = QualityBench(
        model, *texts, samples, sequence_length, seed, device, eval_windows, revision, trust_remote_code, rotate
    )
    rows = _kept_rows(
        job, out.with_suffix(".json"), lambda known: job.run(chosen, asked, known, grids=grids, quantizers=quantizers)
    )
    _tell_quality(rows, job, out, as_json=as_json)


def bench_shrink(
    model: Model = "demo",
    calibration: Calibration = None,
    evaluate: Evaluation = None,
    samples: Samples = 128,
    sequence_length: WindowLength = 256,
    seed: Seed = 0,
    eval_windows: EvalWindows = None,
    methods: Ladder = None,
    keep: Annotated[
        str, typer.Option(help="Shares of the blocks' weights that are kept, comma-separated.")
    ] = "87.5%,75%,62.5%",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    out: Annotated[
        Path, typer.Option(help="File in which rows are kept, so that a later call goes on.", callback=at_home)
    ] = Path("shrink.json"),
    as_json: AsJson = False,
) -> None:
    """Perplexity of smaller models by every method, as a table; what was measured before is kept."""
    from sparsegpt.eval.bench.shrink import LADDER, ShrinkBench
    from sparsegpt.eval.bench.tables import quality_table

    silence_libraries()
    chosen = _rungs(methods, LADDER)
    texts = _texts(model, calibration, evaluate)
    job = ShrinkBench(model, *texts, samples, sequence_length, seed, device, eval_windows, revision, trust_remote_code)
    rows = _kept_rows(job, out, lambda known: job.run(chosen, tuple(keep.split(",")), known))
    print_rows(rows, quality_table(rows), *_elsewhere(rows, job), as_json=as_json)


def _rungs(asked: str | None, ladder: Collection[str]) -> tuple[str, ...]:
    """The rows that are asked for, all without a word. Raises SparseGPTError for others."""
    chosen = tuple(asked.split(",")) if asked else tuple(ladder)
    for name in chosen:
        if name not in ladder:
            raise unknown("row of the ladder", name, ladder, settings=("methods",))
    return chosen


def _texts(model: str, calibration: str | None, evaluation: str | None) -> tuple[str, str]:
    names = data_names(default_data(model, "evaluation") if evaluation is None else evaluation)
    if not names:
        raise SparseGPTError("perplexity is what is measured here: name a text to evaluate on", settings=("evaluate",))
    return default_data(model, "calibration") if calibration is None else calibration, ",".join(dict.fromkeys(names))


def _kept_rows(
    job: "QualityBench", kept: Path, measure: "Callable[[list[QualityRow]], Iterator[QualityRow]]"
) -> "list[QualityRow]":
    """The rows of a file and those that are measured now, each of which is written before the next is measured."""
    job.check()
    rows = job.read(kept)
    for row in measure(rows):
        rows.append(row)
        job.write(kept, rows)
        print(
            f"{' '.join(filter(None, row.asked))}: perplexity {row.perplexity:.3f}, {row.seconds:.0f} s",
            file=sys.stderr,
        )
    return rows


def _rounding(patterns: str, grids: str, quantizers: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Grids and quantizers, each of which goes with each pattern. Raises SparseGPTError where one does not."""
    asked, names = tuple(grids.split(",")), tuple(quantizers.split(","))
    for pattern, grid, name in product(patterns_of(patterns), asked, names):
        LinearSettings(parse_sparsity(pattern), quantize=parse_grid(grid), quantizer=name)
    return asked, names


def _elsewhere(rows: "list[QualityRow]", job: "QualityBench") -> "list[Table]":
    """A table of all texts, where there are several."""
    from sparsegpt.eval.bench.tables import texts_table

    return [texts_table(rows, job.texts[0])] if len(job.texts) > 1 else []


def _tell_quality(rows: "list[QualityRow]", job: "QualityBench", out: Path, *, as_json: bool) -> None:
    """Tables and figures: of rows on grids their own."""
    from sparsegpt.eval.bench.quality import NO_GRID, draw, draw_bytes
    from sparsegpt.eval.bench.tables import integers_table, quality_table

    title = f"{Path(job.model).name}: {Path(job.texts[0]).name}"
    plain, drawn = [row for row in rows if row.grid == NO_GRID], []
    rounded = [row for row in rows if row.grid != NO_GRID]
    if len(plain) > 1 or not rounded:
        print_rows(plain, quality_table(plain), *_elsewhere(plain, job), as_json=as_json)
        drawn = draw(plain, title, out)
    if rounded:
        print_rows(rounded, integers_table(rounded), as_json=as_json)
        drawn += draw_bytes(rows, title, out.with_stem(f"{out.stem}-bytes"))
    print(f"drawn: {', '.join(map(str, drawn))}", file=sys.stderr)
