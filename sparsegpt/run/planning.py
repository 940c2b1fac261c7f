"""What follows from a run's options before anything is loaded: its plan, from the model's configuration alone."""

import torch

from sparsegpt.model.loading import dtypes_for, load_config, pick_device, sequence_length, stored_in_files
from sparsegpt.run.memory import available_memory
from sparsegpt.run.memory_plan import PUBLISHED, Plan, Workload, plan, published_config, shape_of
from sparsegpt.run.options import RunOptions
from sparsegpt.settings.prune_settings import PruneSettings

# Freed memory goes back at once where a run may need more than this share of what is available: it then stays within
# its plan, and takes up to half as long again.
SCARCE = 1 / 3


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
    device = torch.device("cpu" if gpu_memory is None else "cuda")
    stored, computing = dtypes_for(config, options.dtype, device, found)
    work = Workload(
        samples=options.samples,
        sequence_length=sequence_length(options.model, config, options.sequence_length),
        computing=computing,
        gpu_memory=gpu_memory,
        activations=options.activations,
        micro_batch=options.micro_batch,
        scored=bool(options.evaluate),
    )
    return plan(shape_of(config, stored, trust_remote_code=options.trust_remote_code), settings, work)


def free_gpu_memory(options: RunOptions) -> int | None:
    """Bytes free on the GPU that will compute; None when the CPU does."""
    if options.gpu_memory is not None:
        return int(options.gpu_memory * 1e9)
    device = pick_device(options.device)
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None
