"""What a run is told besides how to prune, and what follows from that before anything is loaded: its plan."""

from dataclasses import dataclass
from pathlib import Path

import torch

from sparsegpt.model.loading import DEMO, dtypes_for, load_config, pick_device, sequence_length, stored_in_files
from sparsegpt.run.memory import available_memory
from sparsegpt.run.memory_plan import PUBLISHED, Plan, Workload, plan, published_config, shape_of
from sparsegpt.settings.prune_settings import PruneSettings

# Freed memory goes back at once where a run may need more than this share of what is available: it then stays within
# its plan, and takes up to half as long again.
SCARCE = 1 / 3


@dataclass(frozen=True)
class RunOptions:
    """What to run on and where to put it; how to prune is in PruneSettings.

    only, skip, blocks: which linears to prune, by regular expressions on their names and by ranges of blocks.
    sequence_length None: min(2048, the model's limit). evaluate: data names or files, may be empty; eval_windows: score
    at most so many windows of each. resume: go on with the unfinished run of this folder. activations: "memory" or
    "disk"; scratch: the folder for them and for weights that must be converted, by default beside `out`. micro_batch:
    calibration windows of one forward pass. gpu_memory: plan for a GPU with so many GB instead of `device`. kernels:
    with a name, the pruned 2:4 linears are packed in memory and scored once more through these kernels. preset,
    command: for the report and the model card, the name of the preset and the command line as typed.
    """

    model: str
    calibration: str
    evaluate: tuple[str, ...]
    out: Path
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    eval_windows: int | None = None
    bos: str = "auto"
    only: str | None = None
    skip: str | None = None
    blocks: str | None = None
    include_head: bool = False
    overwrite: bool = False
    resume: bool = False
    activations: str = "memory"
    scratch: Path | None = None
    micro_batch: int | None = None
    gpu_memory: float | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    kernels: str | None = None
    preset: str | None = None
    command: str | None = None


def default_data(model: str, role: str) -> str:
    """The text used when none is named: pydoc for the demo, else c4 to calibrate and wikitext2 to evaluate."""
    if model == DEMO:
        return "pydoc"
    return "c4" if role == "calibration" else "wikitext2"


def memory_is_scarce(options: RunOptions, planned: Plan) -> bool:
    """Whether to keep to the plan rather than be quick; who keeps activations in files has said so."""
    available = available_memory()
    return options.activations == "disk" or (available is not None and planned.total("memory") > SCARCE * available)


def plan_run(options: RunOptions, settings: PruneSettings) -> Plan:
    """What the run will need, from the model's configuration alone; nothing is loaded."""
    found = None
    if options.model in PUBLISHED:
        config = published_config(options.model)
    else:
        config = load_config(options.model, revision=options.revision, trust_remote_code=options.trust_remote_code)
        found = stored_in_files(options.model, options.revision)
    gpu_memory = free_gpu_memory(options)
    place = torch.device("cpu" if gpu_memory is None else "cuda")
    stored, computing = dtypes_for(config, options.dtype, place, found)
    work = Workload(
        samples=options.samples,
        sequence_length=sequence_length(options.model, config, options.sequence_length),
        computing=computing,
        gpu_memory=gpu_memory,
        activations=options.activations,
        micro_batch=options.micro_batch,
        scored=bool(options.evaluate),
    )
    shape = shape_of(config, stored, trust_remote_code=options.trust_remote_code)
    return plan(shape, settings, work)


def free_gpu_memory(options: RunOptions) -> int | None:
    """Bytes free on the GPU that will compute; None when the CPU does."""
    if options.gpu_memory is not None:
        return int(options.gpu_memory * 1e9)
    device = pick_device(options.device)
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None
