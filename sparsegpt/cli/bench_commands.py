"""`python -m sparsegpt bench ...` and `tune`: measurements, each side by side in one run."""

import json
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from sparsegpt.cli.bench_options import (
    Patterns,
    Rounds,
    Shapes,
    Tokens,
    check_figure,
    counts_of,
    patterns_of,
    print_failed,
    print_rows,
    shapes_of,
)
from sparsegpt.cli.console import open_console, silence_libraries
from sparsegpt.cli.options import (
    AsJson,
    Calibration,
    Command,
    Device,
    Dtype,
    Model,
    Revision,
    Samples,
    TrustRemoteCode,
    WindowLength,
    at_home,
    folder_of,
)
from sparsegpt.cli.quality_commands import bench_quality, bench_shrink
from sparsegpt.errors import SparseGPTError
from sparsegpt.run.options import KERNEL_NAMES, default_data

bench = typer.Typer(help="Measurements, each side by side in one run.", no_args_is_help=True)

bench.command("quality", cls=Command)(bench_quality)
bench.command("shrink", cls=Command)(bench_shrink)


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

    rows = list(bench_solver(pick_device(device), shapes_of(sizes), patterns_of(patterns), repeats))
    print_rows(rows, solver_table(rows), as_json=as_json)


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
    print_rows(rows, pipeline_table(rows), as_json=as_json)


@bench.command("speed", cls=Command)
def bench_speed_command(
    models: Annotated[list[str], typer.Argument(help="Folders, Hub ids or short names; the first is compared to.")],
    sequence_length: WindowLength = 256,
    rounds: Rounds = 5,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Tokens per second of several models in transformers, read at once and written one by one, in turns."""
    from sparsegpt.eval.bench.shrink import bench_speed
    from sparsegpt.eval.bench.tables import speed_table
    from sparsegpt.settings.machine import pick_device

    silence_libraries()
    pick_device(device)
    code = {"trust_remote_code": trust_remote_code}
    rows = bench_speed(models, sequence_length, device=device, rounds=rounds, dtype=dtype, **code)
    print_rows(rows, speed_table(rows), as_json=as_json)


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
        shapes=shapes_of(shapes),
        tokens=counts_of(tokens, "--tokens"),
        rounds=rounds,
    )
    print_rows(found.rows, kernels_table(found), as_json=as_json)
    print_failed([asdict(failed) for failed in found.failed])


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

    (layer, *more), asked, counts = shapes_of(shape), patterns_of(patterns), counts_of(tokens, "--tokens")
    if more:
        raise SparseGPTError(f"shape {shape!r}: expected one layer, as 4096x4096", settings=("shape",))
    check_figure(out)
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
    print_rows(rows, sparsity_table(rows), as_json=as_json)
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
        shapes=shapes_of(shapes),
        tokens=counts_of(tokens, "--tokens"),
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
    print_failed([asdict(failed) for failed in found.failed])
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
    print_rows(rows, decode_table(rows), as_json=as_json)


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

    counts, names, asked = counts_of(blocks, "--blocks"), tuple(presets.split(",")), patterns_of(patterns)
    for preset, pattern in product(names, asked):
        resolve_settings(pattern, preset)
    rows = list(bench_memory(counts, names, asked))
    print_rows(rows, memory_table(rows), as_json=as_json)


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
    print_failed(results["kernels"].get("failures", []))
    tables = markdown(gpu_tables(results))
    (out / "bench-gpu.md").write_text(tables, encoding="utf-8")
    print(tables, end="")
    failed = {name: results[name]["failed"] for name in DEADLINES if "failed" in results[name]}
    if failed:
        raise SparseGPTError("; ".join(f"{name} failed: {why}, see {out / name}.log" for name, why in failed.items()))
