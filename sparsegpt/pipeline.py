"""The driver: a model pruned block by block.

For each decoder block: run it on the calibration activations, gather one Hessian per shared input, prune the linears
that read this input, go on to the next input; then run the finished block once more to get the next block's inputs.
With correction or reconstruction the dense model's activations flow beside the pruned model's. A block sees the dense
stream once, before anything in it is pruned; its inputs inside the block are kept until they have been compared.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsegpt.allocation import allocate
from sparsegpt.block_job import BlockJob
from sparsegpt.blocks import Family, decoder_blocks, family_of, prunable_linears
from sparsegpt.capture import ModelInputs
from sparsegpt.errors import SparseGPTError
from sparsegpt.groups import GroupSolver
from sparsegpt.head import head_inputs, lm_head_of
from sparsegpt.hessian import HessianAccumulator
from sparsegpt.reports import BlockReport, LayerReport, PruneReport
from sparsegpt.residence import Residence
from sparsegpt.settings import PruneSettings, resolve_settings
from sparsegpt.solvers.correction import DriftAccumulator
from sparsegpt.sparsity import Sparsity
from sparsegpt.streams import ActivationStore, Streams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of one forward pass through a block, unless the caller says how many windows go together.
TOKENS_PER_STEP = 4096


def prune_model(
    model: "PreTrainedModel",
    windows: Tensor,
    sparsity: str | float | Sparsity,
    *,
    preset: str = "default",
    **options: Any,
) -> PruneReport:
    """Prune a transformers causal language model in place.

    windows: LongTensor [samples, sequence_length] of calibration tokens. sparsity: "2:4", 0.5, "50%" or a pattern.
    options: fields of `settings.PruneSettings`, which win over the preset, and arguments of `prune_blocks`.
    Raises SparseGPTError, naming the layer, for input that cannot be pruned; the blocks before it are pruned by then.
    """
    names = {setting.name for setting in fields(PruneSettings)}
    settings = {key: options.pop(key) for key in list(options) if key in names}
    return prune_blocks(model, windows, resolve_settings(sparsity, preset, **settings), **options)


class Progress:
    """Where finished blocks go, and which were finished before; this one keeps nothing beyond the model itself."""

    finished = 0

    def load(self, index: int) -> dict[str, Tensor]:
        """The stored tensors of a finished block, by their names inside it."""
        raise LookupError(index)

    def keep(self, index: int, tensors: dict[str, Tensor], report: PruneReport) -> dict[str, Tensor]:
        """Keep the stored tensors of a block that is finished now; the model goes on with those returned."""
        return tensors


@torch.no_grad()
def prune_blocks(
    model: "PreTrainedModel",
    windows: Tensor,
    settings: PruneSettings,
    *,
    device: torch.device | str | None = None,
    micro_batch: int | None = None,
    select: Callable[[str], bool] = lambda name: True,
    include_head: bool = False,
    scratch: Path | None = None,
    residence: Residence | None = None,
    progress: Progress | None = None,
    report: PruneReport | None = None,
    on_layer: Callable[[LayerReport], None] = lambda report: None,
    on_block: Callable[[BlockReport], None] = lambda report: None,
) -> PruneReport:
    """`prune_model` for resolved settings.

    device: where one block computes at a time, by default where the blocks are; the activations between blocks stay
    on the embedding's device. micro_batch: windows of one forward pass. select(name): whether to prune the linear of
    this full name. include_head: prune lm_head too. scratch: folder for files that hold the activations. residence:
    where the model's weights are and where they compute; by default, in place. progress: keeps finished blocks and
    knows those finished before, which are not pruned again; `report` then holds what was reported of them.
    on_layer, on_block: called with each new report.
    """
    if windows.ndim != 2 or windows.is_floating_point() or windows.numel() == 0:
        raise SparseGPTError(f"expected calibration windows [samples, sequence_length], found {list(windows.shape)}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise SparseGPTError("the model is packed or quantised: expected plain weights; `sparsegpt unpack` it first")
    family = family_of(model)
    blocks = decoder_blocks(model, family)
    head = lm_head_of(model) if include_head else None
    linears = [_selected(block, f"{family.blocks}.{index}.", select) for index, block in enumerate(blocks)]
    _check_layers(linears, head, settings.sparsity, family)
    batch = micro_batch or max(1, TOKENS_PER_STEP // windows.shape[1])
    residence = residence or Residence(torch.device(device) if device else None, model.dtype, model.dtype)
    progress, report = progress or Progress(), report or PruneReport(settings)
    solver = GroupSolver(settings, report, on_layer, residence.as_stored)
    was_training = model.training
    model.eval()
    try:
        with solver.timed("capture"):
            store = ActivationStore(scratch)
            inputs = ModelInputs(model, blocks, windows, batch, store.keep)
            patterns = allocate(settings.sparsity, settings.allocation, blocks, linears, inputs)
            streams = Streams.begin(inputs, store, with_dense=settings.needs_dense_stream)
        driver = _Driver(solver, streams, family, residence, progress)
        for index, block in enumerate(blocks):
            last = index + 1 == len(blocks) and not include_head
            if index < progress.finished:
                driver.pass_finished(block, index, last=last)
            else:
                on_block(driver.prune_block(block, index, len(blocks), patterns[index], last=last))
        if head is not None:
            driver.prune_head(model, blocks, head, windows.split(batch))
    finally:
        model.train(was_training)
    return report


def _selected(block: nn.Module, prefix: str, select: Callable[[str], bool]) -> dict[str, nn.Linear]:
    """The linears of a block to prune, by their names inside the block."""
    return {name: linear for name, linear in prunable_linears(block).items() if select(prefix + name)}


def _check_layers(
    linears: list[dict[str, nn.Linear]], head: nn.Linear | None, pattern: Sparsity, family: Family
) -> None:
    """Refuse before any work what would be refused in the middle of it."""
    if head is None and not any(linears):
        raise SparseGPTError("no linear layer is selected: loosen --only or --skip, which match full module names")
    named = {
        f"{family.blocks}.{index}.{name}": module
        for index, block in enumerate(linears)
        for name, module in block.items()
    }
    for name, linear in named.items() if head is None else [*named.items(), ("lm_head", head)]:
        pattern.check(linear.in_features, name)
        if not torch.isfinite(linear.weight).all():
            raise SparseGPTError(f"{name}: weight contains NaN or infinite values; the checkpoint is damaged")


@dataclass
class _Driver:
    """Carries the activation streams from block to block and prunes each block in turn."""

    solver: GroupSolver
    streams: Streams
    family: Family
    residence: Residence
    progress: Progress

    def prune_block(
        self, block: nn.Module, index: int, blocks: int, patterns: dict[str, Sparsity], *, last: bool
    ) -> BlockReport:
        """Prune the block and move the streams behind it; behind the last one nobody reads them."""
        started = time.perf_counter()
        report = self.solver.report
        with self.residence.visit(block):
            job = BlockJob(self.solver, self.streams, self.family, block, index, patterns)
            layers = job.prune_linears()
            share = job.reconstruct() if self.solver.settings.reconstruct and layers else None
            if not last:
                self._move_pruned(job)
            error = sum(layer.relative_error for layer in layers) / max(1, len(layers))
            seconds = time.perf_counter() - started
            report.blocks.append(BlockReport(index, blocks, len(layers), error, seconds, share))
            self._settle(block, self.progress.keep(index, self.residence.to_store(block), report))
        return report.blocks[-1]

    def pass_finished(self, block: nn.Module, index: int, *, last: bool) -> None:
        """Put a block that was finished before in its place, and move both streams as its pruning moved them."""
        job = BlockJob(self.solver, self.streams, self.family, block, index, {})
        if not last and self.streams.dense is not None:
            with self.residence.visit(block):
                job.move_dense()
        self._settle(block, self.progress.load(index))
        if not last:
            with self.residence.visit(block):
                self._move_pruned(job)

    def _move_pruned(self, job: BlockJob) -> None:
        with self.solver.timed("capture"):
            for step in range(len(self.streams.pruned)):
                self.streams.move_pruned(step, job.output(step))

    def _settle(self, block: nn.Module, tensors: dict[str, Tensor]) -> None:
        for name, parameter in block.named_parameters():
            self.residence.settle(parameter, tensors[name])

    def prune_head(
        self, model: "PreTrainedModel", blocks: nn.ModuleList, head: nn.Linear, batches: tuple[Tensor, ...]
    ) -> None:
        """Prune lm_head on what the final norm gives it, behind the last block."""
        statistics = HessianAccumulator(head.in_features, head.weight.device), DriftAccumulator()
        with self.solver.timed("capture"):
            for step, batch in enumerate(batches):
                pruned = head_inputs(model, blocks, batch, self.streams.pruned[step])
                statistics[0].add(pruned)
                if self.solver.settings.corrects and self.streams.dense is not None:
                    statistics[1].add_inputs(head_inputs(model, blocks, batch, self.streams.dense[step]), pruned)
        with self.solver.timed("solve"):
            self.solver.prune({"lm_head": (head, self.solver.settings.sparsity)}, *statistics)
