"""The driver: a model pruned block by block.

For each decoder block: run it on the calibration activations, gather one Hessian per shared input, prune the linears
that read this input, go on to the next input; then run the finished block once more to get the next block's inputs.
With correction or reconstruction the dense model's activations flow beside the pruned model's. A block sees the dense
stream once, before anything in it is pruned; its inputs inside the block are kept until they have been compared.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsegpt.driver.block_job import BlockJob
from sparsegpt.driver.choices import check_block, check_linear, choose_linears, spread
from sparsegpt.driver.groups import GroupSolver
from sparsegpt.driver.progress import Progress
from sparsegpt.driver.reports import BlockReport, EpochReport, LayerReport, PruneReport
from sparsegpt.errors import SparseGPTError
from sparsegpt.model.capture import ModelInputs
from sparsegpt.model.families import Family, decoder_blocks, family_of
from sparsegpt.model.head import head_inputs, lm_head_of
from sparsegpt.model.residence import Residence
from sparsegpt.model.streams import ActivationStore, Streams
from sparsegpt.model.unfuse import unfused
from sparsegpt.recovery.distill import Distiller, distill
from sparsegpt.recovery.training import counting_windows, training_batches
from sparsegpt.settings.prune_settings import (
    LinearSettings,
    PruneSettings,
    resolve_settings,
    without_residual_correction,
)
from sparsegpt.settings.recipe import idle_rules
from sparsegpt.settings.selection import BlockRanges
from sparsegpt.solvers.correction import DriftAccumulator
from sparsegpt.solvers.hessian import HessianAccumulator
from sparsegpt.sparsity import Sparsity

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
    options: fields of `settings.PruneSettings`, which win over the preset, such as recipe=read_recipe("mix.toml"), and
    arguments of `prune_blocks`.
    Raises SparseGPTError, naming the layer, for input that cannot be pruned; the blocks before it are pruned by then.
    """
    names = {setting.name for setting in fields(PruneSettings)}
    settings = {key: options.pop(key) for key in list(options) if key in names}
    return prune_blocks(model, windows, resolve_settings(sparsity, preset, **settings), **options)


@torch.no_grad()
def prune_blocks(
    model: "PreTrainedModel",
    windows: Tensor,
    settings: PruneSettings,
    *,
    device: torch.device | str | None = None,
    micro_batch: int | None = None,
    select: Callable[[str], bool] = lambda name: True,
    only_blocks: str | BlockRanges | None = None,
    include_head: bool = False,
    scratch: Path | None = None,
    residence: Residence | None = None,
    progress: Progress | None = None,
    report: PruneReport | None = None,
    on_layer: Callable[[LayerReport], None] = lambda report: None,
    on_block: Callable[[BlockReport], None] = lambda report: None,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
) -> PruneReport:
    """`prune_model` for resolved settings.

    device: where one block computes at a time, by default where the blocks are; the activations between blocks stay
    on the embedding's device. micro_batch: windows of one forward pass. select(name): whether to prune the linear of
    this full name. only_blocks: prune in these decoder blocks alone, as "0:12". include_head: prune lm_head too.
    scratch: folder for files that hold the activations. residence: where the model's weights are and where they
    compute; by default, in place. progress: keeps finished blocks and knows those finished before, which are not
    pruned again; `report` then holds what was reported of them. on_layer, on_block, on_epoch: called with each new
    report.
    """
    _check_windows(windows, model)
    if getattr(model.config, "quantization_config", None) is not None:
        raise SparseGPTError("the model is packed or quantised: expected plain weights; `sparsegpt unpack` it first")
    family = family_of(model)
    blocks = decoder_blocks(model, family)
    settings, notes = without_residual_correction(settings, family.uncorrectable)
    by_prefix = {f"{family.blocks}.{index}.": block for index, block in enumerate(blocks)}
    choices = choose_linears(model, settings, select, only_blocks, include_head=include_head)
    chosen = {name: choice for name, choice in choices.items() if choice is not None}
    # With a residence the weights come from a loader that has looked at all of them: reading them twice takes long.
    finite = residence is not None
    shapes = {prefix: check_block(block, prefix, chosen, finite=finite) for prefix, block in by_prefix.items()}
    head = lm_head_of(model) if "lm_head" in chosen else None
    if head is not None:
        chosen["lm_head"].sparsity.check(head.in_features, "lm_head")
        check_linear("lm_head", head, finite=finite)
    batch = micro_batch or max(1, TOKENS_PER_STEP // windows.shape[1])
    residence = residence or Residence(torch.device(device) if device else None, model.dtype, model.dtype)
    progress, report = progress or Progress(), report or PruneReport(settings)
    report.settings, report.choices = settings, choices
    notes = [family.note, *notes, *idle_rules(settings, choices)]
    report.warnings += [note for note in notes if note and note not in report.warnings]
    solver = GroupSolver(settings, report, on_layer, residence.as_stored)
    was_training = model.training
    model.eval()
    try:
        with solver.timed("capture"):
            store = ActivationStore(scratch)
            inputs = ModelInputs(model, blocks, windows, batch, store.keep)
            spread(settings, chosen, blocks, shapes, inputs, residence.visit)
            streams = Streams.begin(inputs, store, with_dense=settings.needs_dense_stream)
        driver = _Driver(solver, streams, family, residence, progress)
        pruned = {index: list(linears) for index, linears in enumerate(shapes.values()) if linears}
        trained = pruned if settings.distill else {}
        read_until = len(blocks) if head is not None or trained else max(pruned, default=0)
        for index, (prefix, block) in enumerate(by_prefix.items()):
            last = index >= read_until
            if index < progress.finished:
                driver.pass_finished(block, index, last=last)
            else:
                wanted = {name: chosen[prefix + name] for name in shapes[prefix]}
                on_block(driver.prune_block(blocks, index, wanted, last=last))
        if trained:
            driver.distill(model, blocks, trained, windows.split(batch), on_epoch, go_on=head is not None)
        if head is not None:
            driver.prune_head(model, blocks, head, chosen["lm_head"], windows.split(batch))
    finally:
        model.train(was_training)
    return report


def _check_windows(windows: Tensor, model: "PreTrainedModel") -> None:
    if windows.ndim != 2 or windows.is_floating_point() or windows.numel() == 0:
        raise SparseGPTError(f"expected calibration windows [samples, sequence_length], found {list(windows.shape)}")
    known = len(model.get_input_embeddings().weight)
    if windows.min() < 0 or windows.max() >= known:
        raise SparseGPTError(
            f"expected token ids below {known}, found {int(windows.min())} to {int(windows.max())}: "
            "the tokenizer must be the model's own"
        )


@dataclass
class _Driver:
    """Carries the activation streams from block to block and prunes each block in turn."""

    solver: GroupSolver
    streams: Streams
    family: Family
    residence: Residence
    progress: Progress

    def prune_block(
        self, blocks: nn.ModuleList, index: int, choices: dict[str, LinearSettings], *, last: bool
    ) -> BlockReport:
        """Prune a block and move the streams behind it; behind the last one that is pruned nobody reads them."""
        started = time.perf_counter()
        report, settings, block = self.solver.report, self.solver.settings, blocks[index]
        with self.residence.visit(block):
            with unfused(block):
                job = BlockJob(self.solver, self.streams, self.family, block, index, choices)
                layers = job.prune_linears() if choices or not last else []
                share = self._reconstruct(job, blocks) if settings.reconstruct and layers else None
                if not last:
                    self._move_pruned(job)
            error = sum(layer.relative_error for layer in layers) / max(1, len(layers))
            seconds = time.perf_counter() - started
            report.blocks.append(BlockReport(index, len(blocks), len(layers), error, seconds, share))
            self._settle(block, self.progress.keep(index, self.residence.to_store(block), report))
        return report.blocks[-1]

    def _reconstruct(self, job: BlockJob, blocks: nn.ModuleList) -> float:
        behind = job.index + 1
        with ExitStack() as visits:
            ahead = list(blocks[behind : behind + self.solver.settings.look_ahead])
            for block in ahead:
                visits.enter_context(self.residence.visit(block))
            return job.reconstruct(ahead)

    def pass_finished(self, block: nn.Module, index: int, *, last: bool) -> None:
        """Put a block that was finished before in its place, and move both streams as its pruning moved them."""
        if not last and self.streams.dense is not None:
            with self._at_work(block, index) as job:
                job.move_dense()
        self._settle(block, self.progress.load(index))
        if not last:
            with self._at_work(block, index) as job:
                self._move_pruned(job)

    @contextmanager
    def _at_work(self, block: nn.Module, index: int) -> Iterator[BlockJob]:
        with self.residence.visit(block), unfused(block):
            yield BlockJob(self.solver, self.streams, self.family, block, index, {})

    def _move_pruned(self, job: BlockJob) -> None:
        with self.solver.timed("capture"):
            for step in range(len(self.streams.pruned)):
                self.streams.move_pruned(step, job.output(step))

    def _settle(self, block: nn.Module, tensors: dict[str, Tensor]) -> None:
        for name, parameter in block.named_parameters():
            self.residence.settle(parameter, tensors[name])

    def distill(
        self,
        model: "PreTrainedModel",
        blocks: nn.ModuleList,
        pruned: dict[int, list[str]],
        batches: tuple[Tensor, ...],
        on_epoch: Callable[[EpochReport], None],
        *,
        go_on: bool,
    ) -> None:
        """Train all pruned blocks together; both streams are behind the last block.

        go_on: compute the pruned stream anew, for what comes behind.
        """
        report, settings = self.solver.report, self.solver.settings
        assert self.streams.dense is not None
        with self.solver.timed("distill"):
            student = Distiller(model, blocks, self.streams.inputs, self.residence, self.streams.store, pruned)
            pairs = training_batches(batches, self.streams.dense)
            epochs, rate = settings.distill, settings.distill_rate
            student.restore(self.progress.load_training())
            with counting_windows("distillation", pairs):
                for epoch, loss in distill(student, pairs, epochs, rate, [known.loss for known in report.epochs]):
                    report.epochs.append(EpochReport(epoch, epochs, loss))
                    if epoch:
                        self.progress.keep_training(epoch, student.tensors(), report)
                    on_epoch(report.epochs[-1])
            before, after = report.epochs[0].loss, report.epochs[-1].loss
            if not after < before:
                report.warnings.append(
                    f"distillation raised the held-out divergence from {before:.4g} to {after:.4g} nats and was "
                    "rolled back; lower --distill-rate or give more --samples"
                )
                return
            for index in pruned:
                self._settle(blocks[index], self.progress.keep_distilled(index, student.finished(index)))
            for step, tokens in enumerate(batches if go_on else ()):
                hidden = student.hidden_behind(tokens)
                self.streams.move_pruned(step, hidden.to(self.streams.pruned[step]))

    def prune_head(
        self,
        model: "PreTrainedModel",
        blocks: nn.ModuleList,
        head: nn.Linear,
        choice: LinearSettings,
        batches: tuple[Tensor, ...],
    ) -> None:
        """Prune lm_head on what the final norm gives it, behind the last block."""
        statistics = HessianAccumulator(head.in_features, head.weight.device), DriftAccumulator()
        with self.solver.timed("capture"):
            for step, batch in enumerate(batches):
                pruned = head_inputs(model, blocks, batch, self.streams.pruned[step])
                statistics[0].add(pruned)
                if choice.corrects and self.streams.dense is not None:
                    statistics[1].add_inputs(head_inputs(model, blocks, batch, self.streams.dense[step]), pruned)
        with self.solver.timed("solve"):
            self.solver.prune({"lm_head": (head, choice)}, *statistics)
