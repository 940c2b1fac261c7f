"""The driver: a model pruned block by block.

For each decoder block: run it on the calibration activations, gather one Hessian per shared input, prune the linears
that read this input, go on to the next input; then run the finished block once more to get the next block's inputs.
With correction or reconstruction the dense model's activations flow beside the pruned model's. A block sees the dense
stream once, before anything in it is pruned; its inputs inside the block are kept until they have been compared.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsegpt.counting import counting
from sparsegpt.driver.accounting import UNREACHED, in_braces
from sparsegpt.driver.allocation import Shapes, Visit
from sparsegpt.driver.block_job import BlockJob
from sparsegpt.driver.choices import HEAD, Choices, check_block, check_linear, choose_linears, spread
from sparsegpt.driver.groups import GroupSolver, Task, scaled_grid
from sparsegpt.driver.progress import Progress
from sparsegpt.driver.ranks import ONE_RANK, Ranks
from sparsegpt.driver.reports import BlockReport, EpochReport, LayerReport, Listener, PruneReport
from sparsegpt.driver.rotating import rotate_first
from sparsegpt.driver.verification import WINDOWS, check_boundaries, verify_blocks
from sparsegpt.driver.windows import Windows, micro_batches, share_of
from sparsegpt.errors import SparseGPTError
from sparsegpt.grid import Grid
from sparsegpt.model.capture import ModelInputs
from sparsegpt.model.decoder import DecoderModel, evaluating
from sparsegpt.model.head import head_inputs, lm_head_of
from sparsegpt.model.residence import Residence
from sparsegpt.model.streams import ActivationStore, Streams
from sparsegpt.model.unfuse import unfused
from sparsegpt.recovery.distill import Distiller, distill
from sparsegpt.recovery.reconstruct import Reconstruction
from sparsegpt.recovery.training import Batch, counting_windows, training_batches
from sparsegpt.settings.prune_settings import LinearSettings, PruneSettings, resolve_settings
from sparsegpt.settings.selection import BlockRanges
from sparsegpt.solvers.correction import DriftAccumulator
from sparsegpt.solvers.hessian import HessianAccumulator
from sparsegpt.sparsity import Sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prune_model(
    model: "PreTrainedModel",
    windows: Windows,
    sparsity: str | float | Sparsity,
    *,
    preset: str = "default",
    select: Callable[[str], bool] = lambda name: True,
    only_blocks: str | BlockRanges | None = None,
    include_head: bool = False,
    boundary: int | None = None,
    **options: Any,
) -> PruneReport:
    """Prune a transformers causal language model in place.

    windows: calibration tokens, LongTensor [samples, sequence_length]. Lists, dicts with an attention_mask and a
    DataLoader are taken too. Ranks of a process group all call this, each with the model and with windows of its own,
    and prune it together, on the windows of all: the weights end alike on each. sparsity: "2:4", 0.5, "50%" or a
    pattern. Presets but `paper` write the model in other bases first (rotate="off" keeps its own), where a head that
    was the embedding's weight may get one of its own. select(name): whether to prune the linear of this full name.
    only_blocks: prune in these decoder blocks alone, as "0:12". include_head: prune lm_head too. boundary: the token
    with which each of several documents in a window begins: attention does not cross it. options: fields of
    `PruneSettings`, which win over the preset, such as method=..., recipe=read_recipe("mix.toml"), and keyword
    arguments of `prune_blocks`.
    Raises SparseGPTError, naming the layer, for input that cannot be pruned; the blocks before it are pruned by then.
    """
    names = {setting.name for setting in fields(PruneSettings)}
    given = {key: options.pop(key) for key in list(options) if key in names}
    settings = resolve_settings(sparsity, preset, **given)
    decoder = DecoderModel.of(model, boundary)
    choices = choose_linears(decoder, settings, select, only_blocks, include_head=include_head)
    ranks = Ranks.here()
    ranks.agree(lambda: _facts(decoder, settings, choices))
    rows = ranks.in_turn([row for batch in micro_batches(windows, decoder) for row in batch])
    return prune_blocks(decoder, rows, choices, ranks=ranks, **options)


def _facts(decoder: DecoderModel, settings: PruneSettings, choices: Choices) -> dict[str, str]:
    """What must be the same wherever a model is pruned together. Of its weights a few stand for all."""
    weights = hashlib.sha256()
    for parameter in decoder.model.parameters():
        flat = parameter.detach().reshape(-1)
        weights.update(flat[:: max(1, len(flat) // 16)].double().cpu().numpy().tobytes())
    return {
        "sparsegpt": version("sparsegpt"),
        "torch": torch.__version__,
        "settings": f"{settings.as_dict()}, {'; '.join(map(str, settings.recipe))}",
        "linears": ", ".join(in_braces(choices.pruned)),
        "weights": weights.hexdigest(),
    }


@torch.no_grad()
def prune_blocks(
    decoder: DecoderModel,
    windows: Windows,
    choices: Choices,
    *,
    device: torch.device | str | None = None,
    micro_batch: int | None = None,
    scratch: Path | None = None,
    residence: Residence | None = None,
    progress: Progress | None = None,
    report: PruneReport | None = None,
    listener: Listener | None = None,
    verify: bool = True,
    ranks: Ranks = ONE_RANK,
) -> PruneReport:
    """`prune_model` for a model that is known and choices that are made.

    windows: as for `prune_model`, those of all ranks. device: where one block computes at a time, by default where the
    blocks are; the activations between blocks stay on the embedding's device. micro_batch: windows of one forward pass.
    scratch: folder for files that hold the activations. residence: where the model's weights are and where they
    compute; by default, in place. progress: keeps finished blocks and knows those finished before, which are not
    pruned again; `report` then holds what was reported of them. listener: is told of every new report. verify: compare
    blocks run one by one with the whole model, before and after (see verification.py). ranks: who prunes it together.
    Raises SparseGPTError, naming the layer, for input that cannot be pruned.
    """
    everything = micro_batches(windows, decoder, micro_batch)
    batches = share_of(everything, ranks, trained=bool(choices.settings.reconstruct + choices.settings.distill))
    work = prepare(decoder, choices, finite=residence is not None)
    computing = decoder.model.dtype
    progress, in_place = progress or Progress(), residence is None
    residence = residence or Residence(torch.device(device) if device else None, computing, computing)
    report = report or PruneReport(choices.settings)
    report.begin(choices.settings, choices.linears, choices.notes)
    solver = GroupSolver(choices.settings, report, listener or Listener(), residence.as_stored, ranks)
    with evaluating(decoder.model):
        check_boundaries(decoder, everything)
        _rotate(work, solver, everything, residence, progress, in_place=in_place)
        if verify:
            unreached = _verify("before", work, solver, everything[0][:WINDOWS], residence)
            choices, work = choices.without(unreached, UNREACHED), work.without(unreached)
            report.begin(choices.settings, choices.linears, choices.notes)
        report.parameters = choices.accounting
        with solver.timed("capture"):
            store = ActivationStore(scratch)
            inputs = ModelInputs(decoder, batches, store.keep)
            work = work.spread(everything, residence.visit)
            streams = Streams.begin(inputs, store, with_dense=work.settings.needs_dense_stream)
        driver = _Driver(solver, streams, work, residence, progress)
        for index in range(len(decoder.blocks)):
            driver.visit_block(index)
        if work.trained:
            driver.distill(batches)
        if work.head is not None:
            driver.prune_head(work.head, batches)
        if verify:
            _verify("after", work, solver, everything[0][:WINDOWS], residence)
    return report


@dataclass(frozen=True)
class Work:
    """What is to be done, checked before any of it begins.

    linears: how each pruned linear is pruned, by its full name. shapes: [out_features, in_features] of those of each
    block, by their names inside it. head: the output layer, if it is pruned.
    """

    decoder: DecoderModel
    settings: PruneSettings
    linears: dict[str, LinearSettings]
    shapes: tuple[Shapes, ...]
    head: nn.Linear | None

    def of_block(self, index: int) -> dict[str, LinearSettings]:
        """How the linears of a block are pruned, by their names inside it."""
        prefix = self.decoder.prefix(index)
        return {name: self.linears[prefix + name] for name in self.shapes[index]}

    @property
    def trained(self) -> dict[int, list[str]]:
        """The pruned linears of each block that distillation trains; none without it."""
        pruned = {index: list(shapes) for index, shapes in enumerate(self.shapes) if shapes}
        return pruned if self.settings.distill else {}

    @property
    def grids(self) -> dict[int, dict[str, Grid]]:
        """The grids of each block's pruned linears, by their names inside it; those without one are left out."""
        return {
            index: {name: choice.quantize for name, choice in self.of_block(index).items() if choice.quantize}
            for index in range(len(self.shapes))
        }

    def without(self, names: tuple[str, ...]) -> "Work":
        """The same where linears of these full names stay dense."""
        prefixes = [prefix for prefix, _ in self.decoder.by_prefix()]
        shapes = tuple(
            {name: shape for name, shape in block.items() if prefix + name not in names}
            for prefix, block in zip(prefixes, self.shapes, strict=True)
        )
        linears = {name: choice for name, choice in self.linears.items() if name not in names}
        return replace(self, linears=linears, shapes=shapes)

    def spread(self, batches: Sequence[Tensor], visit: Visit) -> "Work":
        """The same with a share of zeros of its own for each linear, where the allocation says so."""
        return replace(self, linears=spread(self.settings, self.linears, self.decoder, self.shapes, batches, visit))

    def is_last(self, index: int) -> bool:
        """Whether nobody reads the streams after this block."""
        if self.head is not None or self.trained:
            return False
        return not any(self.shapes[index + 1 :])


def prepare(decoder: DecoderModel, choices: Choices, *, finite: bool) -> Work:
    """Check every linear that is to be pruned, and part the head from a tied embedding.

    finite: the weights come from a loader that has looked at all of them. Raises SparseGPTError, naming the linear.
    """
    pruned = choices.pruned
    shapes = tuple(check_block(block, prefix, pruned, finite=finite) for prefix, block in decoder.by_prefix())
    head = lm_head_of(decoder) if HEAD in pruned else None
    if head is not None:
        pruned[HEAD].sparsity.check(head.in_features, HEAD)
        check_linear(HEAD, head, finite=finite)
    return Work(decoder, choices.settings, pruned, shapes, head)


def _rotate(
    work: Work,
    solver: GroupSolver,
    batches: Sequence[Tensor],
    residence: Residence,
    progress: Progress,
    *,
    in_place: bool,
) -> None:
    """Write the model in bases in which the pattern drops less, as the settings say."""
    patterns = {name: choice.sparsity for name, choice in work.linears.items()}
    told = solver.report, solver.listener
    with solver.timed("rotate"):
        rotate_first(
            work.decoder,
            work.settings.rotate,
            patterns,
            batches,
            residence,
            progress,
            *told,
            in_place=in_place,
            ranks=solver.ranks,
        )


def _verify(when: str, work: Work, solver: GroupSolver, tokens: Tensor, residence: Residence) -> tuple[str, ...]:
    """Compare blocks run one by one with the whole model, and say in the report how far they agree.

    Returns the linears that no input reached, for which nothing can be done.
    """
    with solver.timed("verify"):
        found = solver.report.verification[when] = verify_blocks(work.decoder, tokens, residence)
    if not found.separable and work.settings.reconstruct + work.settings.distill:
        raise SparseGPTError(
            f"blocks of {work.decoder.name} leave keys and values, or more, for later blocks: they cannot be trained "
            "one by one; set reconstruct and distill to 0"
        )
    return found.unreached


@dataclass
class _Driver:
    """Carries the activation streams from block to block and prunes each block in turn."""

    solver: GroupSolver
    streams: Streams
    work: Work
    residence: Residence
    progress: Progress

    def visit_block(self, index: int) -> None:
        """Prune a block, or take it up where it was finished before; move the streams on."""
        if index < self.progress.finished:
            self.pass_finished(index)
        else:
            self.solver.listener.block(self.prune_block(index))

    def prune_block(self, index: int) -> BlockReport:
        """Prune a block and move the streams past it; after the last one that is pruned nobody reads them."""
        started, report, block = time.perf_counter(), self.solver.report, self._blocks[index]
        with self.residence.visit(block):
            with unfused(block):
                layers, training = self._solve_block(index)
            error = sum(layer.relative_error for layer in layers) / max(1, len(layers))
            seconds = time.perf_counter() - started
            block_report = BlockReport(index, len(self._blocks), len(layers), error, seconds)
            if training is not None:
                block_report = replace(block_report, reconstruction=training.share, losses=list(training.losses))
            report.blocks.append(block_report)
            self.residence.settle_all(block, self.progress.keep(index, self.residence.to_store(block), report))
        return report.blocks[-1]

    def _solve_block(self, index: int) -> tuple[list[LayerReport], Reconstruction | None]:
        """What was done to its linears, and what training brought."""
        choices, last = self.work.of_block(index), self.work.is_last(index)
        job = self._job(index, choices)
        job.scale_inputs()
        layers = job.prune_linears() if choices or not last else []
        training = self._reconstruct(job) if self.solver.settings.reconstruct and layers else None
        if training is not None:
            self._recount(index)
        if not last:
            self._move_pruned(job)
        return layers, training

    def _reconstruct(self, job: BlockJob) -> Reconstruction:
        following = job.index + 1
        with ExitStack() as visits:
            ahead = list(self._blocks[following : following + self.solver.settings.look_ahead])
            for block in ahead:
                visits.enter_context(self.residence.visit(block))
            return job.reconstruct(ahead)

    def pass_finished(self, index: int) -> None:
        """Take up a block that was finished before, and move both streams as its pruning moved them."""
        block, last = self._blocks[index], self.work.is_last(index)
        if not last and self.streams.dense is not None:
            with self._at_work(index) as job:
                job.move_dense()
        self.residence.settle_all(block, self.progress.load(index))
        if not last:
            with self._at_work(index) as job:
                self._move_pruned(job)

    def distill(self, batches: tuple[Tensor, ...]) -> None:
        """Train all pruned blocks together, after both streams have passed the last block.

        The pruned stream is computed anew where the head will read it.
        """
        assert self.streams.dense is not None
        with self.solver.timed("distill"):
            trained, store = self.work.trained, self.streams.store
            student = Distiller(
                self.work.decoder,
                self.streams.inputs,
                self.residence,
                store,
                trained,
                self.work.grids,
                trainers=self.solver.ranks,
            )
            pairs = training_batches(batches, self.streams.dense, trainers=self.solver.ranks.world)
            if not self._train(student, pairs):
                return
            for index in trained:
                self.residence.settle_all(
                    self._blocks[index], self.progress.keep_distilled(index, student.finished(index))
                )
                with self._at_work(index):
                    self._recount(index)
            for step, tokens in enumerate(batches if self.work.head is not None else ()):
                hidden = student.hidden_after(tokens)
                self.streams.move_pruned(step, hidden.to(self.streams.pruned[step]))

    def _train(self, student: Distiller, pairs: list[Batch]) -> bool:
        """All epochs, each kept and reported; whether they have helped."""
        report, settings = self.solver.report, self.solver.settings
        student.restore(self.progress.load_training())
        known = [epoch.loss for epoch in report.epochs]
        counted = counting(self.solver.listener.step, "training the model", "steps")
        with counting_windows("distillation", pairs):
            for epoch, loss in distill(student, pairs, settings.distill, settings.distill_rate, known, counted):
                report.epochs.append(EpochReport(epoch, settings.distill, loss))
                if epoch:
                    self.progress.keep_training(epoch, student.tensors(), report)
                self.solver.listener.epoch(report.epochs[-1])
        before, after = report.epochs[0].loss, report.epochs[-1].loss
        if after < before:
            return True
        report.warnings.append(
            f"distillation raised the held-out divergence from {before:.4g} to {after:.4g} nats and was "
            "rolled back; lower the distillation rate or give more samples"
        )
        return False

    def prune_head(self, head: nn.Linear, batches: tuple[Tensor, ...]) -> None:
        """Prune the output layer on what the final norm gives it."""
        choice, decoder = self.work.linears[HEAD], self.work.decoder
        if scaled_grid(choice) is not None:
            self.solver.tell_of_unscaled([HEAD])
        statistics = HessianAccumulator(head.in_features, head.weight.device), DriftAccumulator()
        with self.solver.timed("capture"):
            for step, batch in enumerate(batches):
                pruned = head_inputs(decoder, batch, self.streams.pruned[step])
                statistics[0].add(pruned)
                if choice.corrects and self.streams.dense is not None:
                    statistics[1].add_inputs(head_inputs(decoder, batch, self.streams.dense[step]), pruned)
            self.solver.ranks.add_up(*statistics)
        with self.solver.timed("solve"):
            self.solver.prune([Task({HEAD: (head, choice)}, *statistics)])

    @property
    def _blocks(self) -> nn.ModuleList:
        return self.work.decoder.blocks

    def _job(self, index: int, choices: dict[str, LinearSettings]) -> BlockJob:
        return BlockJob(self.solver, self.streams, self.work.decoder, index, choices)

    @contextmanager
    def _at_work(self, index: int) -> Iterator[BlockJob]:
        """A block that is not pruned here, as it computes."""
        block = self._blocks[index]
        with self.residence.visit(block), unfused(block):
            yield self._job(index, {})

    def _recount(self, index: int) -> None:
        """Count the zeros of a trained block anew; inside `unfused`."""
        names, prefix = self.work.shapes[index], self.work.decoder.prefix(index)
        block = self._blocks[index]
        self.solver.report.recount({prefix + name: block.get_parameter(f"{name}.weight") for name in names})

    def _move_pruned(self, job: BlockJob) -> None:
        with self.solver.timed("capture"):
            for step in range(len(self.streams.pruned)):
                self.streams.move_pruned(step, job.output(step))
