"""The command line, `python -m sparsegpt`: run, eval, inspect, pack, unpack, bench. Nothing else prints or exits.

Exit codes: 0 done, 1 refused with one line on stderr, 2 wrong usage, 130 interrupted.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparsegpt.errors import SparseGPTError

app = typer.Typer(
    name="sparsegpt",
    help="One-shot pruning of large language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Model = Annotated[str, typer.Option(help="Hub id, folder, short name such as opt-1.3b, or the embedded demo.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, float16 or bfloat16; auto is float32 on a CPU, else the file's.")
]
Length = Annotated[
    int | None, typer.Option("--seqlen", min=2, help="Tokens a window; default min(2048, the model's limit).")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Windows scored in one forward pass.")]
EvalWindows = Annotated[
    int | None, typer.Option(min=1, help="Score at most so many windows of each text; default the published number.")
]
BosChoice = Annotated[
    str, typer.Option(help="Beginning-of-sequence token before each scored window: auto, always, never.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, once the new is whole.")]
KERNEL_NAMES = "auto, dense, cpu, portable, mma_sp, cutlass or cusparselt"
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but warnings and errors.")]


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
    device: Device = "auto",
    dtype: Dtype = "auto",
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
    learning_rate: Annotated[float | None, typer.Option(help="Of the block-wise training.")] = None,
    only: Annotated[str | None, typer.Option(help="Prune only modules whose full name matches this regex.")] = None,
    skip: Annotated[str | None, typer.Option(help="Leave modules dense whose full name matches this regex.")] = None,
    include: Annotated[str | None, typer.Option(help="lm_head: prune the output layer too.")] = None,
    batch_size: BatchSize = None,
    eval_windows: EvalWindows = None,
    bos: BosChoice = "auto",
    kernels: Annotated[
        str | None, typer.Option(help=f"2:4 only: score once more through packed kernels; {KERNEL_NAMES}.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Prune a model, score it before and after, and save it with a report."""
    from sparsegpt.console import RunDisplay, print_report
    from sparsegpt.run import RunOptions, default_data
    from sparsegpt.run import run as run_job
    from sparsegpt.settings import resolve_settings

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
        learning_rate=learning_rate,
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
        include_head=include == "lm_head",
        overwrite=overwrite,
        kernels=kernels,
    )
    console = _console()
    _silence_libraries()
    try:
        with RunDisplay(console, quiet=quiet) as display:
            report = run_job(options, settings, display)
    except KeyboardInterrupt:
        print(f"sparsegpt: interrupted; nothing was written to {options.out}", file=sys.stderr)
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Perplexity and bits per byte of a model, dense or pruned, by the published protocol."""
    from sparsegpt.eval.perplexity import score_text
    from sparsegpt.models import load_model
    from sparsegpt.run import default_data

    _silence_libraries()
    loaded = load_model(model, dtype=dtype, device=device)
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
    console = _console()
    for score in scores:
        console.print(
            f"{score.data}: perplexity {score.perplexity:.4f}, {score.bits_per_byte:.4f} bits per byte "
            f"({score.windows} windows of {length} tokens)"
        )
        if score.alarm:
            console.print(f"WARNING: {score.alarm}", style="bold red")


def _use_kernels(model: Any, kernels: str) -> str:
    """Pack what is 2:4 and dense in memory, set the kernels of all packed layers, say what was chosen."""
    from sparsegpt.kernels.linear import explain, pack_linears, set_kernels

    pack_linears(model, kernels=kernels)
    if not set_kernels(model, kernels):
        raise SparseGPTError("--kernels: no linear of this model keeps 2:4; prune it with --sparsity 2:4 first")
    return explain(model)


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="A model folder pruned to 2:4.")],
    out: Annotated[Path, typer.Argument(help="The packed folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a 2:4 model in packed form: 9/16 of its linears' half-precision bytes."""
    from sparsegpt.kernels.archive import pack_folder

    report = pack_folder(folder, out, overwrite=overwrite)
    before, after = report.dense_bytes / 2**20, report.packed_bytes / 2**20
    print(
        f"packed {len(report.packed)} linears: {before:.1f} -> {after:.1f} MiB ({after / before:.4f}), "
        f"{len(report.left_dense)} tensors left as they were; wrote {out}"
    )


@app.command()
def unpack(
    folder: Annotated[Path, typer.Argument(help="A packed folder.")],
    out: Annotated[Path, typer.Argument(help="The ordinary model folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Turn a packed folder back into an ordinary one, dense with zeros, that any server loads."""
    from sparsegpt.kernels.archive import unpack_folder

    print(f"unpacked {len(unpack_folder(folder, out, overwrite=overwrite))} linears; wrote {out}")


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A model folder with safetensors files.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What is sparse in a model folder; exit code 1 when a promised pattern is broken anywhere."""
    from sparsegpt.console import print_findings
    from sparsegpt.inspection import inspect_folder

    findings = inspect_folder(folder)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        print_findings(_console(), findings)
    broken = [finding for finding in findings if not finding.ok]
    if broken:
        raise SparseGPTError(
            f"{folder}: {len(broken)} of {len(findings)} weights break their pattern, "
            f"first {broken[0].name} ({broken[0].problem})"
        )


bench = typer.Typer(help="Measurements, each side by side in one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command(name="solver")
def bench_solver_command(
    device: Device = "auto",
    sizes: Annotated[
        str, typer.Option(help="Layers as ROWSxCOLUMNS, comma-separated.")
    ] = "768x768,2048x2048,4096x4096,8192x2048",
    patterns: Annotated[str, typer.Option(help="Patterns, comma-separated.")] = "2:4,0.5",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the fastest counts.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
) -> None:
    """The textbook column loop against this engine's solvers: time, ratio, loss."""
    from sparsegpt.console import solver_table
    from sparsegpt.eval.bench_solver import bench_solver
    from sparsegpt.models import pick_device

    rows = list(bench_solver(pick_device(device), _shapes(sizes), tuple(patterns.split(",")), repeats))
    _print_rows(rows, solver_table(rows), as_json=as_json)


@bench.command(name="pipeline")
def bench_pipeline_command(
    model: Model = "demo",
    calib: Annotated[str | None, typer.Option(help="Calibration text.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 256,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
) -> None:
    """One Hessian and one pass per shared input against one of each per linear: seconds and peak memory."""
    from sparsegpt.console import pipeline_table
    from sparsegpt.eval.bench_pipeline import bench_pipeline
    from sparsegpt.run import default_data

    rows = bench_pipeline(model, calib or default_data(model, "calibration"), samples, seqlen, device)
    _print_rows(rows, pipeline_table(rows), as_json=as_json)


@bench.command(name="quality")
def bench_quality_command(
    model: Model = "demo",
    calib: Annotated[str | None, typer.Option(help="Calibration text.")] = None,
    evaluate: Annotated[str | None, typer.Option("--eval", help="Evaluation text.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Draws the calibration windows.")] = 0,
    eval_windows: EvalWindows = None,
    methods: Annotated[str | None, typer.Option(help="Rows of the ladder, comma-separated; default all.")] = None,
    patterns: Annotated[str, typer.Option(help="Patterns, comma-separated.")] = "2:4,4:8,0.5,0.6,0.7",
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Figure to write, as .png and .svg.")] = Path("quality.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
) -> None:
    """Perplexity of every method at every sparsity, as a table and a figure."""
    from sparsegpt.console import quality_table
    from sparsegpt.eval.bench_quality import LADDER, QualityBench, draw
    from sparsegpt.run import default_data

    _silence_libraries()
    chosen = tuple(methods.split(",")) if methods else tuple(LADDER)
    if unknown := [name for name in chosen if name not in LADDER]:
        raise SparseGPTError(f"--methods {unknown[0]!r} is not known: choose from {', '.join(LADDER)}")
    job = QualityBench(
        model,
        calib or default_data(model, "calibration"),
        evaluate or default_data(model, "evaluation"),
        samples,
        seqlen,
        seed,
        device,
        eval_windows,
    )
    rows = []
    for row in job.run(chosen, tuple(patterns.split(","))):
        rows.append(row)
        print(f"{row.pattern} {row.method}: perplexity {row.perplexity:.3f}, {row.seconds:.0f} s", file=sys.stderr)
    _print_rows(rows, quality_table(rows), as_json=as_json)
    print(f"drawn: {', '.join(str(path) for path in draw(rows, f'{model}: {job.evaluation}', out))}", file=sys.stderr)


@bench.command(name="kernels")
def bench_kernels_command(
    device: Device = "auto",
    shapes: Annotated[str, typer.Option(help="Layers as OUTxIN, comma-separated.")] = "14336x4096,4096x14336",
    tokens: Annotated[str, typer.Option(help="Tokens of one product, comma-separated.")] = "1,4,16,64",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the candidates take turns.")] = 15,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
) -> None:
    """Every 2:4 kernel against the library's dense product: time, bandwidth, speed-up and its ceiling."""
    from sparsegpt.console import kernels_table
    from sparsegpt.kernels.bench import bench_kernels
    from sparsegpt.models import pick_device

    found = bench_kernels(
        device=str(pick_device(device)),
        shapes=_shapes(shapes),
        tokens=tuple(int(count) for count in tokens.split(",")),
        rounds=rounds,
    )
    _print_rows(found.rows, kernels_table(found), as_json=as_json)


@bench.command(name="decode")
def bench_decode_command(
    dense: Annotated[Path, typer.Argument(help="The pruned model folder.")],
    packed: Annotated[Path, typer.Argument(help="Its packed form.")],
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    kernels: Annotated[str, typer.Option(help=KERNEL_NAMES)] = "auto",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated in a round.")] = 48,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
) -> None:
    """A whole model generating, batch size 1, packed beside dense: tokens per second and memory."""
    from sparsegpt.console import decode_table
    from sparsegpt.kernels.bench import bench_decode
    from sparsegpt.models import DTYPES, pick_device

    _silence_libraries()
    if dtype not in DTYPES:
        raise SparseGPTError(f"dtype {dtype!r} is not known: expected {', '.join(DTYPES)}")
    place = str(pick_device(device))
    rows = bench_decode(dense, packed, device=place, dtype=DTYPES[dtype], kernels=kernels, new_tokens=new_tokens)
    _print_rows(rows, decode_table(rows), as_json=as_json)


@bench.command(name="gpu")
def bench_gpu_command(
    device: Device = "cuda",
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the log.")] = Path("bench-gpu"),
    small: Annotated[bool, typer.Option("--small", help="Tiny shapes: a rehearsal.")] = False,
) -> None:
    """Everything about a GPU in one go: correctness, a whole prune, solver, kernels; under nine minutes."""
    from sparsegpt.eval.bench_gpu import GpuBench
    from sparsegpt.models import pick_device

    _silence_libraries()
    results = GpuBench(pick_device(device), out, small).run(lambda part: print(f"bench gpu: {part}", file=sys.stderr))
    print(json.dumps(results, indent=2))
    if isinstance(results["correctness"], dict) and results["correctness"]["exit_code"]:
        raise SparseGPTError(
            f"the GPU tests failed: {results['correctness']['summary']}; see {out / 'correctness.log'}"
        )


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((int(rows), int(columns)) for rows, columns in (shape.split("x") for shape in text.split(",")))
    except ValueError as error:
        raise SparseGPTError(f"layers {text!r} are not understood: expected OUTxIN, as 2048x2048,4096x4096") from error


def _print_rows(rows: Sequence[Any], table: Table, *, as_json: bool) -> None:
    """Measurements for a program, one JSON object a line, or for a person."""
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        _console().print(table)


def _data_names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(name.strip() for name in text.split(",") if name.strip())


def _folder_name(model: str) -> str:
    """The last part of a Hub id or path, safe as a folder's name."""
    return re.sub(r"[^\w.\-]", "-", Path(model.rstrip("/")).name) or "model"


def _console() -> Console:
    """Colours and bars on a terminal; plain, unwrapped lines anywhere else."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160, no_color=True)


def _silence_libraries() -> None:
    """Progress bars and advice of the libraries below would break the display; their errors still come through."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
