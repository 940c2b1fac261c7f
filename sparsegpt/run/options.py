"""What a run is told besides how to prune, each option written once: name, type, default and help."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from sparsegpt.grid import Grid
from sparsegpt.settings.option import Group, option
from sparsegpt.sparsity import NM, Sparsity

MODEL, SELECTION, MACHINE, OUTPUT = Group.MODEL, Group.SELECTION, Group.MACHINE, Group.OUTPUT
KERNEL_NAMES = "auto, dense, resident, cpu, portable, mma_sp, wgmma_sp, cutlass or cusparselt"
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class RunOptions:
    """What to run on and where to put it; how to prune is in PruneSettings.

    only, skip, blocks: which linears to prune, by regular expressions on their names and by ranges of blocks.
    sequence_length None: min(2048, the model's limit). evaluate: data names or files, may be empty. resume: go on with
    the unfinished run of this folder. scratch: the folder for activations in files and for weights that must be
    converted, by default beside `out`. gpu_memory: plan for a GPU with so many GB instead of `device`. kernels: with a
    name, the pruned 2:4 linears are packed in memory and scored once more through these kernels. sample_tokens: tokens
    that the dense and the pruned model write after openings of the evaluation texts. push_to_hub: the repository of the
    Hub that gets the result. preset, command: for the report and the model card, the name of the preset and the command
    line as typed.
    """

    model: str = field(
        metadata=option("Hub id, folder, short name such as opt-1.3b, or the embedded demo.", MODEL, default="demo")
    )
    calibration: str = field(
        metadata=option(
            "Calibration text: wikitext2, ptb, c4, pydoc, self (written by the model), a file, a folder, FILE:field or "
            "org/name:config:split:field; several with commas, in equal shares or as in a=0.7,b=0.3.",
            MODEL,
            flag="--calib",
            unset="pydoc for the demo, else c4",
        )
    )
    evaluate: tuple[str, ...] = field(
        metadata=option(
            "Texts to score on, as in --calib, comma-separated; none for none.",
            MODEL,
            flag="--eval",
            typed=str,
            unset="pydoc for the demo, else wikitext2",
        )
    )
    out: Path = field(
        metadata=option(
            "Folder to write.", OUTPUT, unset="pruned/<model>-<sparsity>, such as pruned/demo-2of4 or pruned/demo-50pct"
        )
    )
    documents: str = field(
        default="auto",
        metadata=option(
            "Documents of a calibration text: join them to one stream, pack several into a window with attention kept "
            "within each, or single, a window each; auto joins, but for c4.",
            MODEL,
        ),
    )
    samples: int = field(default=128, metadata=option("Calibration windows.", MODEL, minimum=1))
    sequence_length: int | None = field(
        default=None,
        metadata=option("Tokens a window.", MODEL, flag="--seqlen", minimum=2, unset="2048, or the model's limit"),
    )
    seed: int = field(
        default=0, metadata=option("Draws the calibration windows.", MODEL, minimum=0, maximum=LARGEST_SEED)
    )
    eval_windows: int | None = field(
        default=None,
        metadata=option(
            "Score at most so many windows of each text.", MODEL, minimum=1, unset="256 of c4, all of other texts"
        ),
    )
    eval_tasks: tuple[str, ...] = field(
        default=(),
        metadata=option(
            "lm-eval tasks to score on, comma-separated (the extra `tasks`).", MODEL, typed=str, unset="none"
        ),
    )
    include_path: Path | None = field(
        default=None, metadata=option("Folder of lm-eval task files of your own.", MODEL, unset="lm-eval's own tasks")
    )
    task_limit: int | None = field(
        default=None, metadata=option("Score at most so many questions of each task.", MODEL, minimum=1, unset="all")
    )
    bos: str = field(
        default="auto",
        metadata=option(
            "Beginning-of-sequence token before each window, in calibration and evaluation: auto, always or never.",
            MODEL,
        ),
    )
    revision: str | None = field(
        default=None, metadata=option("Branch, tag or commit of a Hub model.", MODEL, unset="main")
    )
    trust_remote_code: bool = field(
        default=False, metadata=option("Run code that comes with the model. Only if you trust it.", MODEL)
    )
    only: str | None = field(
        default=None,
        metadata=option("Prune only modules whose full name matches this regex.", SELECTION, unset="all linears"),
    )
    skip: str | None = field(
        default=None,
        metadata=option("Leave modules dense whose full name matches this regex.", SELECTION, unset="none"),
    )
    blocks: str | None = field(
        default=None,
        metadata=option(
            "Prune in these blocks alone, half-open ranges: 0:12, or 3, or :4,20: for both.", SELECTION, unset="all"
        ),
    )
    include_head: bool = field(
        default=False,
        metadata=option(
            "lm_head: prune the output layer too.", SELECTION, flag="--include", typed=str, unset="the blocks alone"
        ),
    )
    device: str = field(default="auto", metadata=option("auto, cpu, cuda or cuda:N.", MACHINE))
    dtype: str = field(
        default="auto",
        metadata=option(
            "auto, float32, float16 (fp16) or bfloat16 (bf16); auto is float32 on a CPU, else the file's.", MACHINE
        ),
    )
    batch_size: int | None = field(
        default=None,
        metadata=option("Windows scored in one forward pass.", MACHINE, minimum=1, unset="about 4096 tokens"),
    )
    micro_batch: int | None = field(
        default=None,
        metadata=option(
            "Calibration windows of one forward pass.",
            MACHINE,
            minimum=1,
            unset="about 4096 tokens; on a GPU by its memory",
        ),
    )
    activations: str = field(
        default="memory", metadata=option("Where activations live between blocks: memory or disk.", MACHINE)
    )
    scratch: Path | None = field(
        default=None, metadata=option("Folder for large temporary files.", MACHINE, unset="beside --out")
    )
    verify: bool = field(
        default=True,
        metadata=option(
            "Compare the blocks, run one by one, with the whole model, before and after.",
            MACHINE,
            flag="--verify/--no-verify",
        ),
    )
    gpu_memory: float | None = field(
        default=None,
        metadata=option("With --plan: for a GPU with so many GB.", MACHINE, minimum=1, unset="what --device has free"),
    )
    rank_timeout: float | None = field(
        default=None,
        metadata=option("With torchrun: minutes that a process waits for the others.", MACHINE, minimum=1, unset="30"),
    )
    overwrite: bool = field(default=False, metadata=option("Replace what is there, once the new is whole.", OUTPUT))
    resume: bool = field(default=False, metadata=option("Go on with the unfinished run of this folder.", OUTPUT))
    kernels: str | None = field(
        default=None,
        metadata=option(
            f"2:4 only: score once more through packed kernels; {KERNEL_NAMES}.", OUTPUT, unset="no such score"
        ),
    )
    sample_tokens: int = field(
        default=40,
        metadata=option(
            "Tokens that the model writes before and after, from openings of the texts to score on; 0 for none.",
            OUTPUT,
            minimum=0,
        ),
    )
    push_to_hub: str | None = field(
        default=None,
        metadata=option(
            "ORG/NAME: upload the result to the Hub; a repository that is not there is made, private.",
            OUTPUT,
            unset="nothing is uploaded",
        ),
    )
    preset: str | None = None
    command: str | None = None


def default_data(model: str, role: str) -> str:
    """The text used when none is named: pydoc for the demo, else c4 to calibrate and wikitext2 to evaluate."""
    from sparsegpt.settings.naming import DEMO

    if model == DEMO:
        return "pydoc"
    return "c4" if role == "calibration" else "wikitext2"


def default_folder(model: str, sparsity: Sparsity, grid: Grid | None = None) -> Path:
    """Where a run writes when nothing is named: pruned/demo-2of4, pruned/demo-33.3pct-per-row, pruned/demo-int4-128.

    The name has no character that a shell, a URL or another file system reads in its own way.
    """
    name = re.sub(r"[^\w.\-]", "-", Path(model.rstrip("/")).name) or "model"
    parts = [_pattern_name(sparsity)] if sparsity.zeros or grid is None else []
    parts += [] if grid is None else [str(grid).replace(":", "-")]
    return Path("pruned") / "-".join([name, *parts])


def _pattern_name(sparsity: Sparsity) -> str:
    if isinstance(sparsity, NM):
        return f"{sparsity.n}of{sparsity.m}"
    return f"{100 * sparsity.fraction:.6g}pct" + ("-per-row" if sparsity.per_row else "")
