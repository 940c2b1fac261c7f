"""Commands on a model that is there: eval, inspect, pack, unpack."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsegpt.cli.console import open_console, say, silence_libraries
from sparsegpt.cli.options import (
    AsJson,
    BatchSize,
    BosChoice,
    Device,
    Dtype,
    EvalTasks,
    EvalWindows,
    IncludePath,
    Length,
    Model,
    Overwrite,
    Revision,
    TaskLimit,
    TrustRemoteCode,
    at_home,
    data_names,
    folder_of,
)
from sparsegpt.errors import SparseGPTError, unknown
from sparsegpt.run.options import KERNEL_NAMES, default_data
from sparsegpt.settings.option import Group

VALUES = ("int8", "int4")
Kernels = Annotated[
    str | None,
    typer.Option(
        help=f"Pack the pruned linears in memory; {KERNEL_NAMES}.",
        rich_help_panel=Group.MACHINE,
        show_default="as the folder is",
    ),
]
EvalData = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Texts to score on: wikitext2, ptb, c4, pydoc, files or folders, comma-separated.",
        rich_help_panel=Group.MODEL,
        show_default="none with --tasks; pydoc for the demo, else wikitext2",
    ),
]


def evaluate_model(
    model: Model = "demo",
    evaluate: EvalData = None,
    sequence_length: Length = None,
    eval_windows: EvalWindows = None,
    tasks: EvalTasks = None,
    include_path: IncludePath = None,
    task_limit: TaskLimit = None,
    bos: BosChoice = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    kernels: Kernels = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity and bits per byte of a model, dense, pruned or packed, by the published protocol; tasks by lm-eval."""
    from sparsegpt.calib_data import load_text
    from sparsegpt.cli.display import RunDisplay, print_evaluation
    from sparsegpt.counting import Counted, counting
    from sparsegpt.eval.perplexity import score_text
    from sparsegpt.eval.tasks import load_tasks, score_tasks
    from sparsegpt.model import loading
    from sparsegpt.run.planning import check_scoring, check_task_options

    silence_libraries()
    task_names = () if tasks is None else data_names(tasks, "tasks")
    usual = "none" if task_names else default_data(model, "evaluation")
    names = data_names(usual if evaluate is None else evaluate)
    check_task_options(task_names, include_path, task_limit)
    check_scoring(names, kernels=kernels, bos=bos, dtype=dtype, device=device)
    loading.check_model(model, revision)
    config = loading.load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    length = loading.sequence_length(model, config, sequence_length)
    texts = [load_text(name, "evaluation") for name in names]
    loaded_tasks = load_tasks(task_names, include_path, task_limit)
    loaded = loading.load_model(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    if kernels is not None:
        say(use_kernels(loaded.model, kernels))
    scored: tuple[Any, Any] = loaded.model, loaded.tokenizer
    steps: dict[str, Any] = {"batch_size": batch_size, "bos": bos}
    protocol = {"max_windows": eval_windows, **steps}
    with loaded.source.files.meanwhile(), RunDisplay(open_console(), quiet=as_json) as display:

        def told(name: str, unit: str) -> Counted:
            return counting(display.step, f"scoring on {name}", unit)

        scores = [score_text(*scored, text, length, counted=told(text.name, "windows"), **protocol) for text in texts]
        counted = told(", ".join(task_names), "answers")
        task_scores = score_tasks(*scored, loaded_tasks, counted=counted, **steps)
    if as_json:
        print(json.dumps([*map(asdict, scores), *map(asdict, task_scores)]))
    else:
        print_evaluation(open_console(), scores, length, task_scores)


def use_kernels(model: Any, kernels: str) -> str:
    """Pack what is pruned and dense in memory, set the kernels of all packed layers, say what was chosen."""
    from sparsegpt.kernels.hf.in_place import pack_linears
    from sparsegpt.kernels.layers.linear import explain, set_kernels

    pack_linears(model, kernels=kernels)
    if not set_kernels(model, kernels):
        raise SparseGPTError(
            "no linear of this model keeps 2:4 or a zero in eight weights: prune it first", settings=("kernels",)
        )
    return explain(model)


def inspect(
    folder: Annotated[str, typer.Argument(help="A model folder with safetensors files, or a Hub id.")],
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """What is sparse in a model folder; exit code 1 when a promised pattern is broken anywhere."""
    from sparsegpt.cli.display import print_findings
    from sparsegpt.run.inspection import inspect_folder

    findings = inspect_folder(folder_of(folder, revision), trust_remote_code=trust_remote_code)
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


def pack(
    folder: Annotated[str, typer.Argument(help="A pruned model folder, or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="The packed folder to write.", callback=at_home)],
    pattern: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="2:4 for weights that keep it, or bitmask for any pattern.",
            show_default="2:4 where most weights keep it, else bitmask",
        ),
    ] = None,
    values: Annotated[
        str | None,
        typer.Option(help="Round kept values to int8 or int4, to nearest.", show_default="keep every bit"),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale, with --values.", show_default="128")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a pruned model without its zeros: 9/16 of its linears' half-precision bytes at half of the weights.

    Fewer with more zeros, and with --values.
    """
    from sparsegpt.kernels.checkpoint.archive import pack_folder
    from sparsegpt.kernels.layers.forms import FORMATS, usual_forms

    if pattern is not None and pattern not in FORMATS:
        raise unknown("format", pattern, FORMATS, settings=("format",))
    if values not in (None, *VALUES):
        raise unknown("values", values, VALUES, settings=("values",))
    if group_size is not None and values is None:
        raise SparseGPTError("--group-size is for rounded values: give --values int8 or int4 too")
    source = folder_of(folder, revision)
    forms = usual_forms(pattern, int(values.removeprefix("int")) if values else None, group_size)
    report = pack_folder(source, out, form=forms, overwrite=overwrite, trust_remote_code=trust_remote_code)
    before, after = report.dense_bytes / 2**20, report.packed_bytes / 2**20
    print(
        f"packed {len(report.packed)} linears to {report.form.pattern}, "
        f"{before:.1f} -> {after:.1f} MiB ({after / before:.4f}), "
        f"{len(report.left_dense)} tensors left as they were; wrote {out}"
        + (f"; {report.form.rounding}: score the packed model" if report.form.rounding else "")
    )


def unpack(
    folder: Annotated[str, typer.Argument(help="A packed folder, or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="The ordinary model folder to write.", callback=at_home)],
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a packed folder back into an ordinary one, dense with zeros, that any server loads.

    Values packed as integers come back rounded: what the integers stand for, not the weights before packing.
    """
    from sparsegpt.kernels.checkpoint.archive import unpack_folder

    linears = unpack_folder(folder_of(folder, revision), out, overwrite=overwrite)
    print(f"unpacked {len(linears)} linears; wrote {out}")


def export(
    folder: Annotated[str, typer.Argument(help="The folder of a run with --quantize, or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.", callback=at_home)],
    format: Annotated[
        str, typer.Option(help="compressed-tensors (vLLM, transformers) or gptq (vLLM, GPTQModel).")
    ] = "compressed-tensors",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Write the integers of a run for other programs: dense, with zeros where weights were pruned."""
    from sparsegpt.kernels.export.folder import export_folder

    source = folder_of(folder, revision)
    report = export_folder(source, out, format, overwrite=overwrite, trust_remote_code=trust_remote_code)
    before, after = report.dense_bytes / 2**20, report.packed_bytes / 2**20
    print(
        f"exported {len(report.linears)} linears: {before:.1f} -> {after:.1f} MiB ({after / before:.4f}); wrote {out}"
    )
