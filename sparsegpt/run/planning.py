"""What follows from a run's options before anything is loaded: refusals, and its plan, by the configuration alone."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from sparsegpt.calib_data import check_bos, check_documents, check_text, check_texts
from sparsegpt.calib_data.mixture import shares_of
from sparsegpt.calib_data.sources import OWN_TEXT
from sparsegpt.errors import SparseGPTError, unknown
from sparsegpt.incoming.dequantise import can_read
from sparsegpt.kernels.dispatch.route import KERNELS
from sparsegpt.model.loading import check_model, dtypes_for, load_config, sequence_length, stored_in_files
from sparsegpt.run.memory import available_memory
from sparsegpt.run.memory_plan import PUBLISHED, Plan, Workload, plan, published_config, shape_of
from sparsegpt.run.options import RunOptions
from sparsegpt.run.push import check_push
from sparsegpt.settings.machine import parse_dtype, pick_device
from sparsegpt.settings.prune_settings import PruneSettings
from sparsegpt.settings.selection import name_filter, parse_blocks
from sparsegpt.sparsity import NM

ACTIVATIONS = ("memory", "disk")
_KERNELS = ("kernels",)
# Freed memory goes back at once where a run may need more than this share of what is available: it then stays within
# its plan, and takes up to half as long again.
SCARCE = 1 / 3


def check_options(options: RunOptions, settings: PruneSettings) -> None:
    """Refuse what can be seen to be wrong by the options alone: names, expressions, ranges, kernels, device, folders.

    Raises SparseGPTError.
    """
    check_scoring((), kernels=options.kernels, bos=options.bos, dtype=options.dtype)
    check_task_options(options.eval_tasks, options.include_path, options.task_limit)
    if options.kernels is not None and NM(2, 4) not in settings.values_of("sparsity"):
        raise SparseGPTError(
            f"kernels run 2:4 weights only, not {settings.sparsity}: leave them out", settings=_KERNELS
        )
    check_documents(options.documents)
    if options.activations not in ACTIVATIONS:
        raise unknown("activations", options.activations, ACTIVATIONS, settings=("activations",))
    parse_blocks(options.blocks)
    name_filter(options.only, options.skip)
    if options.include_head and not name_filter(skip=options.skip)("lm_head"):
        raise SparseGPTError(
            "lm_head is to be pruned and to be skipped: give one of them", settings=("include_head", "skip")
        )
    if options.gpu_memory is None:  # else the plan is for another machine
        pick_device(options.device)
    _check_scratch(options)


def check_inputs(options: RunOptions) -> None:
    """Refuse a model and texts that are not there or cannot be read, before anything large is.

    Raises SparseGPTError.
    """
    check_model(options.model, options.revision)
    check_texts(options.calibration, "calibration")
    for name in options.evaluate:
        check_text(name, "evaluation")
    if options.push_to_hub is not None:
        check_push(options.push_to_hub)


def check_scoring(
    texts: Sequence[str], *, kernels: str | None, bos: str, dtype: str, device: str | None = None
) -> None:
    """The same for what scores a model. device None: it need not be here."""
    check_kernels(kernels)
    check_bos(bos)
    parse_dtype(dtype)
    if device is not None:
        pick_device(device)
    for name in texts:
        check_text(name, "evaluation")


def check_task_options(tasks: Sequence[str], include_path: Path | None, limit: int | None) -> None:
    """Raises SparseGPTError for settings of tasks without any."""
    given = {"include_path": include_path, "task_limit": limit}
    idle = [name for name, value in given.items() if value is not None]
    if idle and not tasks:
        raise SparseGPTError("a folder or a limit of tasks is given, but no task: name one", settings=idle)


def check_kernels(name: str | None) -> None:
    """Raises SparseGPTError for a name that no kernel has; None is for no kernels."""
    if name not in (None, *KERNELS):
        raise unknown("kernels", name, KERNELS, settings=_KERNELS)


def _check_scratch(options: RunOptions) -> None:
    folder = options.scratch
    if folder is None:
        return
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise SparseGPTError(f"scratch folder {folder} {found}: make it, or choose another", settings=("scratch",))
    if not os.access(folder, os.W_OK):
        raise SparseGPTError(f"scratch folder {folder} is not writable: choose another", settings=("scratch",))


def memory_is_scarce(options: RunOptions, planned: Plan) -> bool:
    """Whether to keep to the plan rather than be quick; who keeps activations in files has said so."""
    available = available_memory()
    return options.activations == "disk" or (available is not None and planned.total("memory") > SCARCE * available)


def plan_run(options: RunOptions, settings: PruneSettings, ranks: int = 1) -> Plan:
    """What each of so many ranks will need, from the model's configuration alone; nothing is loaded."""
    found = None
    if options.model in PUBLISHED:
        config = published_config(options.model)
    else:
        config = load_config(
            options.model, revision=options.revision, trust_remote_code=options.trust_remote_code, to_prune=True
        )
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
        packed=options.documents == "pack",
        writes=OWN_TEXT in {share.name for share in shares_of(options.calibration)},
        ranks=ranks,
    )
    shape = shape_of(config, stored, trust_remote_code=options.trust_remote_code)
    parse_blocks(options.blocks).indices(shape.blocks)  # refused if there are none of these numbers
    planned = plan(shape, settings, work)
    if can_read(config.to_dict()):
        planned.disk["weights made plain"] = shape.parameters * shape.stored.itemsize
    return planned


def free_gpu_memory(options: RunOptions) -> int | None:
    """Bytes free on the GPU that will compute; None when the CPU does."""
    if options.gpu_memory is not None:
        return int(options.gpu_memory * 1e9)
    device = pick_device(options.device)
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None
