"""The command line, `python -m sparsegpt`: run, eval, inspect, pack, unpack, bench, tune. Nothing else prints or exits.

Exit codes: 0 done, 1 refused with one line on stderr, 2 wrong usage, 130 interrupted.
"""

import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsegpt.cli.bench_commands import bench, tune
from sparsegpt.cli.options import (
    KERNEL_NAMES,
    BatchSize,
    BosChoice,
    Device,
    Dtype,
    EvalWindows,
    Length,
    Model,
    Overwrite,
    Quiet,
    TrustRemoteCode,
    open_console,
    silence_libraries,
    typed_command,
)
from sparsegpt.errors import SparseGPTError

app = typer.Typer(
    name="sparsegpt",
    help="One-shot pruning of large language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(bench, name="bench")
app.command()(tune)


def main() -> None:
    """Run the command line; every refusal is one line on stderr and exit code 1."""
    try:
        app()
    except SparseGPTError as error:
        print(f"sparsegpt: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def run(
    sparsity: Annotated[
        str, typer.Option(help='Pattern "n:m" (keep n of m), or share of zeros: 2:4, 0.5, 50%, 50%/row.')
    ],
    model: Model = "demo",
    preset: Annotated[str, typer.Option(help="paper (the published algorithm), fast, default or best.")] = "default",
    method: Annotated[
        str | None, typer.Option(help="magnitude, wanda, sparsegpt, each also with +refit, or admm.")
    ] = None,
    calib: Annotated[
        str | None, typer.Option(help="Calibration text: wikitext2, ptb, c4, pydoc, file or folder.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    seqlen: Length = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Draws the calibration windows.")] = 0,
    evaluate: Annotated[
        str | None, typer.Option("--eval", help="Texts to score on, comma-separated names or files; none for none.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default ./pruned/<model>-<sparsity>.")] = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run of this folder.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    activations: Annotated[str, typer.Option(help="Where activations live between blocks: memory or disk.")] = "memory",
    scratch: Annotated[
        Path | None, typer.Option(help="Folder for large temporary files; default beside --out.")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Calibration windows of one forward pass.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    damping: Annotated[
        float | None, typer.Option(help="Share of the mean diagonal added to the Hessian; default by sample size.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Columns that share a threshold (sparsegpt, fractions).")
    ] = None,
    error_correction: Annotated[
        float | None, typer.Option(help="Share of upstream errors that each layer undoes, 0 to 1.")
    ] = None,
    residual_correction: Annotated[
        float | None, typer.Option(help="Share of the residual stream's drift that projections undo, 0 to 1.")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(help="How a fraction is spread over the blocks: uniform or owl (by outliers).")
    ] = None,
    reconstruct: Annotated[int | None, typer.Option(help="Epochs of block-wise training of the kept weights.")] = None,
    look_ahead: Annotated[
        int | None, typer.Option(help="The training compares outputs so many dense blocks further on.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the block-wise training.")] = None,
    distill: Annotated[
        int | None, typer.Option(help="Epochs of training all kept weights on the dense model's predictions.")
    ] = None,
    distill_rate: Annotated[float | None, typer.Option(help="Learning rate of the distillation.")] = None,
    only: Annotated[str | None, typer.Option(help="Prune only modules whose full name matches this regex.")] = None,
    skip: Annotated[str | None, typer.Option(help="Leave modules dense whose full name matches this regex.")] = None,
    blocks: Annotated[
        str | None, typer.Option(help="Prune in these blocks alone, half-open ranges: 0:12, or 3, or :4,20: for both.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="TOML file with rules for single layers: sparsity, method, skip and more.")
    ] = None,
    include: Annotated[str | None, typer.Option(help="lm_head: prune the output layer too.")] = None,
    batch_size: BatchSize = None,
    eval_windows: EvalWindows = None,
    bos: BosChoice = "auto",
    plan: Annotated[bool, typer.Option("--plan", help="Print what the run would need, and stop.")] = False,
    gpu_memory: Annotated[float | None, typer.Option(min=1, help="With --plan: for a GPU with so many GB.")] = None,
    kernels: Annotated[
        str | None, typer.Option(help=f"2:4 only: score once more through packed kernels; {KERNEL_NAMES}.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Prune a model, score it before and after, and save it with a report."""
    from sparsegpt.cli.display import RunDisplay, print_plan, print_report
    from sparsegpt.run.job import run as run_job
    from sparsegpt.run.options import RunOptions, default_data, plan_run
    from sparsegpt.run.work_folder import unfinished_blocks
    from sparsegpt.settings.prune_settings import resolve_settings
    from sparsegpt.settings.recipe import read_recipe

    settings = resolve_settings(
        sparsity,
        preset,
        method=method,
        damping=damping,
        block_size=block_size,
        error_correction=error_correction,
        residual_correction=residual_correction,
        allocation=allocation,
        reconstruct=reconstruct,
        look_ahead=look_ahead,
        learning_rate=learning_rate,
        distill=distill,
        distill_rate=distill_rate,
        recipe=read_recipe(recipe) if recipe else None,
    )
    if include not in (None, "lm_head"):
        raise SparseGPTError(f"--include {include!r} is not known: only lm_head can be pruned besides the blocks")
    options = RunOptions(
        model=model,
        calibration=calib or default_data(model, "calibration"),
        evaluate=_data_names(evaluate or default_data(model, "evaluation")),
        out=out or Path("pruned") / f"{_folder_name(model)}-{str(settings.sparsity).replace('/', '-per-')}",
        samples=samples,
        sequence_length=seqlen,
        seed=seed,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        eval_windows=eval_windows,
        bos=bos,
        only=only,
        skip=skip,
        blocks=blocks,
        include_head=include == "lm_head",
        overwrite=overwrite,
        resume=resume,
        activations=activations,
        scratch=scratch,
        micro_batch=micro_batch,
        gpu_memory=gpu_memory,
        revision=revision,
        trust_remote_code=trust_remote_code,
        kernels=kernels,
        preset=preset,
        command=typed_command(),
    )
    console = open_console()
    silence_libraries()
    if gpu_memory is not None and not plan:
        raise SparseGPTError("--gpu-memory is for planning: add --plan, or leave it out")
    if plan:
        print_plan(console, options.model, plan_run(options, settings))
        return
    try:
        with RunDisplay(console, quiet=quiet) as display:
            report = run_job(options, settings, display)
    except KeyboardInterrupt:
        finished = unfinished_blocks(options.out)
        left = f"{finished} finished blocks are kept, go on with --resume" if finished else "nothing was written"
        print(f"sparsegpt: interrupted {options.out}; {left}", file=sys.stderr)
        raise
    if not quiet:
        print_report(console, report)
        console.print(f"saved {options.out}")


@app.command(name="eval")
def evaluate_model(
    model: Model = "demo",
    data: Annotated[str | None, typer.Option(help="Texts to score on, comma-separated names or files.")] = None,
    seqlen: Length = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    eval_windows: EvalWindows = None,
    bos: BosChoice = "auto",
    kernels: Annotated[str | None, typer.Option(help=f"Pack the 2:4 linears in memory; {KERNEL_NAMES}.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Perplexity and bits per byte of a model, dense or pruned, by the published protocol."""
    from sparsegpt.eval.perplexity import score_text
    from sparsegpt.model.loading import load_model
    from sparsegpt.run.options import default_data

    silence_libraries()
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    length = loaded.sequence_length(seqlen)
    if kernels is not None:
        print(f"sparsegpt: {_use_kernels(loaded.model, kernels)}", file=sys.stderr)
    scores = [
        score_text(
            loaded.model, loaded.tokenizer, name, length, batch_size=batch_size, bos=bos, max_windows=eval_windows
        )
        for name in _data_names(data or default_data(model, "evaluation"))
    ]
    if as_json:
        print(json.dumps([asdict(score) for score in scores]))
        return
    console = open_console()
    for score in scores:
        console.print(
            f"{score.data}: perplexity {score.perplexity:.4f}, {score.bits_per_byte:.4f} bits per byte "
            f"({score.windows} windows of {length} tokens)"
        )
        if score.alarm:
            console.print(f"WARNING: {score.alarm}", style="bold red")


def _use_kernels(model: Any, kernels: str) -> str:
    """Pack what is 2:4 and dense in memory, set the kernels of all packed layers, say what was chosen."""
    from sparsegpt.kernels.hf.in_place import pack_linears
    from sparsegpt.kernels.layers.linear import explain, set_kernels

    pack_linears(model, kernels=kernels)
    if not set_kernels(model, kernels):
        raise SparseGPTError("--kernels: no linear of this model keeps 2:4; prune it with --sparsity 2:4 first")
    return explain(model)


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="A model folder pruned to 2:4.")],
    out: Annotated[Path, typer.Argument(help="The packed folder to write.")],
    values: Annotated[
        str | None, typer.Option(help="Round kept values to int8 or int4, to nearest; default: keep every bit.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale, with --values; default 128.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a 2:4 model in packed form: 9/16 of its linears' half-precision bytes, fewer with --values."""
    from sparsegpt.kernels.checkpoint.archive import pack_folder
    from sparsegpt.kernels.checkpoint.packed_config import IntegerValues

    if values not in (None, "int8", "int4"):
        raise SparseGPTError(f"--values {values!r} is not known: expected int8 or int4")
    if group_size is not None and values is None:
        raise SparseGPTError("--group-size is for rounded values: give --values int8 or int4 too")
    integers = IntegerValues(int(values.removeprefix("int"))) if values else None
    if integers and group_size is not None:
        integers = replace(integers, group_size=group_size)
    report = pack_folder(folder, out, values=integers, overwrite=overwrite)
    before, after = report.dense_bytes / 2**20, report.packed_bytes / 2**20
    print(
        f"packed {len(report.packed)} linears: {before:.1f} -> {after:.1f} MiB ({after / before:.4f}), "
        f"{len(report.left_dense)} tensors left as they were; wrote {out}"
        + (f"; values rounded to {integers}: score the packed model" if integers else "")
    )


@app.command()
def unpack(
    folder: Annotated[Path, typer.Argument(help="A packed folder.")],
    out: Annotated[Path, typer.Argument(help="The ordinary model folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Turn a packed folder back into an ordinary one, dense with zeros, that any server loads.

    Values packed as integers come back rounded: what the integers stand for, not the weights before packing.
    """
    from sparsegpt.kernels.checkpoint.archive import unpack_folder

    print(f"unpacked {len(unpack_folder(folder, out, overwrite=overwrite))} linears; wrote {out}")


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A model folder with safetensors files.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What is sparse in a model folder; exit code 1 when a promised pattern is broken anywhere."""
    from sparsegpt.cli.display import print_findings
    from sparsegpt.run.inspection import inspect_folder

    findings = inspect_folder(folder)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        print_findings(open_console(), findings)
    broken = [finding for finding in findings if not finding.ok]
    if broken:
        raise SparseGPTError(
            f"{folder}: {len(broken)} of {len(findings)} weights break their pattern, "
            f"first {broken[0].name} ({broken[0].problem})"
        )


def _data_names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(name.strip() for name in text.split(",") if name.strip())


def _folder_name(model: str) -> str:
    """The last part of a Hub id or path, safe as a folder's name."""
    return re.sub(r"[^\w.\-]", "-", Path(model.rstrip("/")).name) or "model"
