"""`python -m sparsegpt bench ...` and `tune`: measurements, each side by side in one run."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsegpt.cli.console import open_console, say, silence_libraries
from sparsegpt.cli.options import (
    AsJson,
    Calibration,
    Command,
    Device,
    EvalWindows,
    Model,
    Revision,
    Samples,
    Seed,
    TrustRemoteCode,
    WindowLength,
    at_home,
    folder_of,
)
from sparsegpt.errors import SparseGPTError, unknown
from sparsegpt.quantization import parse_grid
from sparsegpt.run.options import KERNEL_NAMES, default_data
from sparsegpt.settings.prune_settings import LinearSettings
from sparsegpt.sparsity import parse_sparsity

if TYPE_CHECKING:
    from rich.table import Table

    from sparsegpt.eval.bench.quality import QualityRow

bench = typer.Typer(help="Measurements, each side by side in one run.", no_args_is_help=True)

Shapes = Annotated[str, typer.Option(help="Layers as OUTxIN, comma-separated.")]
Tokens = Annotated[str, typer.Option(help="Tokens of one product, comma-separated.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds in which the candidates take turns.")]
Patterns = Annotated[str, typer.Option(help="Patterns, comma-separated.")]


@bench.command("solver", cls=Command)
def bench_solver_command(
    device: Device = "auto",
    sizes: Annotated[
        str, typer.Option(help="Layers as ROWSxCOLUMNS, comma-separated.")
    ] = "768x768,2048x2048,4096x4096,8192x2048",
    patterns: Patterns = "2:4,0.5",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the fastest counts.")] = 3,
    as_json: AsJson = False,
) -> None:
    """The textbook column loop against this engine's solvers: time, ratio, loss."""
    from sparsegpt.eval.bench.solver import bench_solver
    from sparsegpt.eval.bench.tables import solver_table
    from sparsegpt.settings.machine import pick_device

    rows = list(bench_solver(pick_device(device), _shapes(sizes), _patterns(patterns), repeats))
    _print_rows(rows, solver_table(rows), as_json=as_json)


@bench.command("pipeline", cls=Command)
def bench_pipeline_command(
    model: Model = "demo",
    calibration: Calibration = None,
    samples: Samples = 128,
    sequence_length: WindowLength = 256,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """One Hessian and one pass per shared input against one of each per linear: seconds and peak memory."""
    from sparsegpt.calib_data import check_texts
    from sparsegpt.eval.bench.pipeline import bench_pipeline
    from sparsegpt.eval.bench.tables import pipeline_table
    from sparsegpt.model.loading import load_config
    from sparsegpt.settings.machine import pick_device

    silence_libraries()
    text, code = (
        default_data(model, "calibration") if calibration is None else calibration,
        {"trust_remote_code": trust_remote_code},
    )
    pick_device(device)
    check_texts(text, "calibration")
    load_config(model, revision=revision, to_prune=True, **code)
    rows = bench_pipeline(model, text, samples, sequence_length, device, revision=revision, **code)
    _print_rows(rows, pipeline_table(rows), as_json=as_json)


@bench.command("quality", cls=Command)
def bench_quality_command(
    model: Model = "demo",
    calibration: Calibration = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--eval", help="Evaluation text, as in --calib.", show_default="pydoc for the demo, else wikitext2"
        ),
    ] = None,
    samples: Samples = 128,
    sequence_length: WindowLength = 256,
    seed: Seed = 0,
    eval_windows: EvalWindows = None,
    methods: Annotated[
        str | None, typer.Option(help="Rows of the ladder, comma-separated.", show_default="all")
    ] = None,
    patterns: Patterns = "2:4,4:8,0.5,0.6,0.7",
    quantize: Annotated[str, typer.Option(help="Grids of integers, as none,int4,int3:32; pattern 0 rounds alone.")] = (
        "none"
    ),
    quantizer: Annotated[str, typer.Option(help="Quantizers, comma-separated: gptq,rtn,awq.")] = "gptq",
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
    chosen = tuple(methods.split(",")) if methods else tuple(LADDER)
    for name in chosen:
        if name not in LADDER:
            raise unknown("row of the ladder", name, LADDER, settings=("methods",))
    asked, (grids, quantizers) = _patterns(patterns), _rounding(patterns, quantize, quantizer)
    _check_figure(out)
    job = QualityBench(
        model,
        default_data(model, "calibration") if calibration is None else calibration,
        default_data(model, "evaluation") if evaluate is None else evaluate,
        samples,
        sequence_length,
        seed,
        device,
        eval_windows,
        revision,
        trust_remote_code,
    )
    job.check()
    kept = out.with_suffix(".json")
    rows = job.read(kept)
    for row in job.run(chosen, asked, rows, grids=grids, quantizers=quantizers):
        rows.append(row)
        job.write(kept, rows)
        print(f"{' '.join(row.asked)}: perplexity {row.perplexity:.3f}, {row.seconds:.0f} s", file=sys.stderr)
    _tell_quality(rows, f"{Path(model).name}: {Path(job.evaluation).name}", out, as_json=as_json)


def _tell_quality(rows: "list[QualityRow]", title: str, out: Path, *, as_json: bool) -> None:
    """Tables and figures: of rows on grids their own."""
    from sparsegpt.eval.bench.quality import NO_GRID, draw, draw_bytes
    from sparsegpt.eval.bench.tables import integers_table, quality_table

    plain, drawn = [row for row in rows if row.grid == NO_GRID], []
    rounded = [row for row in rows if row.grid != NO_GRID]
    if len(plain) > 1 or not rounded:
        _print_rows(plain, quality_table(plain), as_json=as_json)
        drawn = draw(plain, title, out)
    if rounded:
        _print_rows(rounded, integers_table(rounded), as_json=as_json)
        drawn += draw_bytes(rows, title, out.with_stem(f"{out.stem}-bytes"))
    print(f"drawn: {', '.join(map(str, drawn))}", file=sys.stderr)


@bench.command("kernels", cls=Command)
def bench_kernels_command(
    device: Device = "auto",
    shapes: Shapes = "14336x4096,4096x14336",
    tokens: Tokens = "1,4,16,64",
    rounds: Rounds = 31,
    as_json: AsJson = False,
) -> None:
    """Every 2:4 kernel against the library's dense product: time, bandwidth, speed-up and its ceiling."""
    from sparsegpt.eval.bench.kernels import bench_kernels
    from sparsegpt.eval.bench.tables import kernels_table
    from sparsegpt.settings.machine import pick_device

    found = bench_kernels(
        device=str(pick_device(device)),
        shapes=_shapes(shapes),
        tokens=_counts(tokens, "--tokens"),
        rounds=rounds,
    )
    _print_rows(found.rows, kernels_table(found), as_json=as_json)
    _print_failed([asdict(failed) for failed in found.failed])


@bench.command("sparsity", cls=Command)
def bench_sparsity_command(
    device: Device = "auto",
    shape: Annotated[str, typer.Option(help="The layer as OUTxIN.")] = "4096x4096",
    patterns: Patterns = "2:4,0.5,0.6,0.7,0.8,0.9,0.95,0.99",
    tokens: Tokens = "1,16,256",
    rounds: Rounds = 11,
    out: Annotated[Path, typer.Option(help="Figure to write, as .png and .svg.", callback=at_home)] = Path(
        "sparsity.png"
    ),
    as_json: AsJson = False,
) -> None:
    """What sparsity buys in speed, packed and as torch's CSR, against the dense library and what an article claims."""
    from sparsegpt.eval.bench.sparsity import bench_sparsity, draw_sparsity
    from sparsegpt.eval.bench.tables import sparsity_table
    from sparsegpt.settings.machine import pick_device

    (layer, *more), asked, counts = _shapes(shape), _patterns(patterns), _counts(tokens, "--tokens")
    if more:
        raise SparseGPTError(f"shape {shape!r}: expected one layer, as 4096x4096", settings=("shape",))
    _check_figure(out)
    target = str(pick_device(device))
    found = bench_sparsity(
        device=target,
        shape=layer,
        patterns=asked,
        tokens=counts,
        rounds=rounds,
        tell=lambda pattern: print(f"measuring {pattern}", file=sys.stderr),
    )
    rows = list(found)
    _print_rows(rows, sparsity_table(rows), as_json=as_json)
    drawn = draw_sparsity(rows, f"{shape} on {target}", out)
    print(f"drawn: {', '.join(map(str, drawn))}", file=sys.stderr)


def tune(
    device: Device = "auto",
    shapes: Shapes = "1024x1024,2048x2048,4096x4096,14336x4096,4096x14336",
    tokens: Tokens = "1,4,8,16,32,64,256,1024",
    rounds: Rounds = 7,
    as_json: AsJson = False,
) -> None:
    """Measure the 2:4 kernels on this machine and keep what won: `--kernels auto` goes by it from then on."""
    import torch

    from sparsegpt.eval.bench.kernels import bench_kernels
    from sparsegpt.eval.bench.tables import measured_table
    from sparsegpt.kernels.dispatch.measured import judge, machine_name, remember, to_plain
    from sparsegpt.settings.machine import DTYPES, pick_device

    target = pick_device(device)
    found = bench_kernels(
        device=str(target),
        shapes=_shapes(shapes),
        tokens=_counts(tokens, "--tokens"),
        dtypes=(torch.bfloat16, torch.float32) if target.type == "cpu" else tuple(DTYPES.values()),
        rounds=rounds,
        tell=lambda layer: print(f"measuring {layer}", file=sys.stderr),
    )
    rows = judge(machine_name(target), found.rows)
    if as_json:
        for row in rows:
            print(json.dumps({"machine": row.path, **to_plain(row)}))
    else:
        open_console().print(measured_table(rows))
    _print_failed([asdict(failed) for failed in found.failed])
    print(f"kept in {remember(rows)}", file=sys.stderr)


@bench.command("decode", cls=Command)
def bench_decode_command(
    dense: Annotated[str, typer.Argument(help="The pruned model folder, or a Hub id.")],
    packed: Annotated[Path, typer.Argument(help="The folder of its packed form.", callback=at_home)],
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    kernels: Annotated[str, typer.Option(help=KERNEL_NAMES)] = "auto",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated in a round.")] = 48,
    as_json: AsJson = False,
) -> None:
    """A whole model generating, batch size 1, packed beside dense: tokens per second and memory."""
    from sparsegpt.eval.bench.kernels import bench_decode
    from sparsegpt.eval.bench.tables import decode_table
    from sparsegpt.run.planning import check_kernels
    from sparsegpt.settings.machine import DTYPES, parse_dtype, pick_device

    silence_libraries()
    check_kernels(kernels)
    rows = bench_decode(
        folder_of(dense, revision),
        folder_of(str(packed), None),
        trust_remote_code=trust_remote_code,
        device=str(pick_device(device)),
        dtype=parse_dtype(dtype) or DTYPES["bfloat16"],
        kernels=kernels,
        new_tokens=new_tokens,
    )
    _print_rows(rows, decode_table(rows), as_json=as_json)


@bench.command("memory", cls=Command)
def bench_memory_command(
    blocks: Annotated[str, typer.Option(help="Numbers of blocks, comma-separated.")] = "12,24",
    presets: Annotated[str, typer.Option(help="Presets, comma-separated.")] = "paper,default",
    patterns: Patterns = "2:4",
    as_json: AsJson = False,
) -> None:
    """Private memory of whole runs on synthetic models of equal blocks, 122 MiB each, beside the plan's prediction."""
    from sparsegpt.eval.bench.memory import bench_memory
    from sparsegpt.eval.bench.tables import memory_table
    from sparsegpt.settings.prune_settings import resolve_settings

    counts, names, asked = _counts(blocks, "--blocks"), tuple(presets.split(",")), _patterns(patterns)
    for preset, pattern in product(names, asked):
        resolve_settings(pattern, preset)
    rows = list(bench_memory(counts, names, asked))
    _print_rows(rows, memory_table(rows), as_json=as_json)


@bench.command("gpu", cls=Command)
def bench_gpu_command(
    device: Device = "cuda",
    out: Annotated[Path, typer.Option(help="Folder for the JSON, the tables and the logs.")] = Path("bench-gpu"),
    small: Annotated[bool, typer.Option("--small", help="Tiny shapes: a rehearsal.")] = False,
) -> None:
    """Everything about a GPU in one go: correctness, kernels, solver, a whole prune; under nine minutes."""
    from sparsegpt.eval.bench.gpu import DEADLINES, GpuBench
    from sparsegpt.eval.bench.tables import gpu_tables, markdown
    from sparsegpt.settings.machine import pick_device

    job = GpuBench(pick_device(device), out, small)
    results = job.run(lambda part: print(f"bench gpu: {part}", file=sys.stderr))
    _print_failed(results["kernels"].get("failures", []))
    tables = markdown(gpu_tables(results))
    (out / "bench-gpu.md").write_text(tables, encoding="utf-8")
    print(tables, end="")
    failed = {name: results[name]["failed"] for name in DEADLINES if "failed" in results[name]}
    if failed:
        raise SparseGPTError("; ".join(f"{name} failed: {why}, see {out / name}.log" for name, why in failed.items()))


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    shapes = [shape.split("x") for shape in text.split(",")]
    if not all(len(shape) == 2 and all(_is_count(size) for size in shape) for shape in shapes):
        raise SparseGPTError(f"layers {text!r} are not understood: expected OUTxIN, as 2048x2048,4096x4096")
    return tuple((int(rows), int(columns)) for rows, columns in shapes)


def _patterns(text: str) -> tuple[str, ...]:
    patterns = tuple(text.split(","))
    for pattern in patterns:
        parse_sparsity(pattern)
    return patterns


def _rounding(patterns: str, grids: str, quantizers: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Grids and quantizers, each of which goes with each pattern. Raises SparseGPTError where one does not."""
    asked, names = tuple(grids.split(",")), tuple(quantizers.split(","))
    for pattern, grid, name in product(_patterns(patterns), asked, names):
        LinearSettings(parse_sparsity(pattern), quantize=parse_grid(grid), quantizer=name)
    return asked, names


def _check_figure(out: Path) -> None:
    """What would be found after hours: a library that draws, and a folder for the figure and its rows."""
    if find_spec("matplotlib") is None:
        raise SparseGPTError("matplotlib, which draws the figure, is not installed: pip install matplotlib")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SparseGPTError(f"figure {out} cannot be written: {error}; choose another", settings=("out",)) from error
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise SparseGPTError(f"figure {out} cannot be written: it is a folder, or lies in one that is not writable")


def _counts(text: str, option: str) -> tuple[int, ...]:
    counts = text.split(",")
    if not all(map(_is_count, counts)):
        raise SparseGPTError(f"{option} {text!r}: expected whole numbers from 1, comma-separated, as 1,16,64")
    return tuple(map(int, counts))


def _is_count(text: str) -> bool:
    return text.strip().isdecimal() and int(text) > 0


def _print_failed(products: Sequence[dict[str, Any]]) -> None:
    """Products that were wrong or did not run, one a line."""
    for failed in products:
        case = "{rows} x {columns}, {tokens} tokens, {dtype}".format_map(failed)
        say(f"{failed['kernel']} failed at {case}: {failed['reason']}")


def _print_rows(rows: Sequence[Any], table: "Table", *, as_json: bool) -> None:
    """Measurements for a program, one JSON object a line, or for a person."""
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        open_console().print(table)
