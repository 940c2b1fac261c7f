"""The driver: a model pruned block by block.

For each decoder block: run it on the calibration activations, gather one Hessian per shared input, prune the linears
that read this input, go on to the next input; then run the finished block once more to get the next block's inputs.
With correction or reconstruction the dense model's activations flow beside the pruned model's. A block sees the dense
stream once, before anything in it is pruned; its inputs inside the block are kept until they have been compared.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsegpt.allocation import allocate
from sparsegpt.blocks import Family, decoder_blocks, family_of, prunable_linears
from sparsegpt.capture import ModelInputs, remember_outputs, run_watched, shared_inputs
from sparsegpt.errors import SparseGPTError
from sparsegpt.head import head_inputs, lm_head_of
from sparsegpt.hessian import DampedHessian, HessianAccumulator
from sparsegpt.reconstruct import reconstruct_block
from sparsegpt.reports import BlockReport, LayerReport, PruneReport
from sparsegpt.settings import Order, PruneSettings, resolve_settings
from sparsegpt.solvers import METHODS, prune_layer
from sparsegpt.solvers.correction import DriftAccumulator, corrected_target
from sparsegpt.sparsity import Sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of one forward pass through a block, unless the caller says how many windows go together.
TOKENS_PER_STEP = 4096

# Linears of one block that read the same tensor, by their names inside the block.
Group = tuple[str, ...]
# For each micro-batch, the dense model's tensor at each watched submodule.
DenseInputs = list[dict[str, Tensor]]


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
    on_layer: Callable[[LayerReport], None] = lambda report: None,
    on_block: Callable[[BlockReport], None] = lambda report: None,
) -> PruneReport:
    """`prune_model` for resolved settings.

    device: where one block computes at a time, by default where the blocks are; the activations between blocks stay
    on the embedding's device. micro_batch: windows of one forward pass. select(name): whether to prune the linear of
    this full name. include_head: prune lm_head too. on_layer, on_block: called with each report.
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
    was_training = model.training
    model.eval()
    try:
        inputs = ModelInputs(model, blocks, windows, batch)
        driver = _Driver(settings, family, inputs, torch.device(device) if device else None, on_layer)
        with driver.timed("capture"):
            patterns = allocate(settings.sparsity, settings.allocation, blocks, linears, inputs)
        for index, block in enumerate(blocks):
            outputs_wanted = include_head or index + 1 < len(blocks)
            on_block(driver.prune_block(block, index, len(blocks), patterns[index], outputs_wanted=outputs_wanted))
        if head is not None:
            driver.prune_head(model, blocks, head, windows.split(batch))
    finally:
        model.train(was_training)
    return driver.report


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

    settings: PruneSettings
    family: Family
    inputs: ModelInputs
    device: torch.device | None
    on_layer: Callable[[LayerReport], None]

    def __post_init__(self) -> None:
        self.report = PruneReport(self.settings)
        self.pruned_stream = self.inputs.hidden
        # The streams part at the first pruned linear; until then they are the same tensors.
        self.dense_stream = list(self.inputs.hidden) if self.settings.needs_dense_stream else None

    def prune_block(
        self, block: nn.Module, index: int, blocks: int, patterns: dict[str, Sparsity], *, outputs_wanted: bool
    ) -> BlockReport:
        """Prune the block in place and move the streams behind it, unless nobody reads them there."""
        started = time.perf_counter()
        home = next(block.parameters()).device
        block.to(self.device or home)
        job = _BlockJob(self, block, index, patterns)
        layers = job.prune_linears()
        share = job.reconstruct() if self.settings.reconstruct and layers else None
        if outputs_wanted:
            with self.timed("capture"):
                for step in range(len(self.pruned_stream)):
                    self.pruned_stream[step] = job.output(step)
        block.to(home)
        error = sum(layer.relative_error for layer in layers) / max(1, len(layers))
        self.report.blocks.append(BlockReport(index, blocks, error, time.perf_counter() - started, share))
        return self.report.blocks[-1]

    def prune_head(
        self, model: "PreTrainedModel", blocks: nn.ModuleList, head: nn.Linear, batches: tuple[Tensor, ...]
    ) -> None:
        """Prune lm_head on what the final norm gives it, behind the last block."""
        statistics = HessianAccumulator(head.in_features, head.weight.device), DriftAccumulator()
        with self.timed("capture"):
            for step, batch in enumerate(batches):
                pruned = head_inputs(model, blocks, batch, self.pruned_stream[step])
                statistics[0].add(pruned)
                if self.settings.corrects and self.dense_stream is not None:
                    statistics[1].add_inputs(head_inputs(model, blocks, batch, self.dense_stream[step]), pruned)
        with self.timed("solve"):
            self.prune_group({"lm_head": (head, self.settings.sparsity)}, *statistics)

    def prune_group(
        self, linears: dict[str, tuple[nn.Linear, Sparsity]], gram: HessianAccumulator, drift: DriftAccumulator
    ) -> list[LayerReport]:
        """Prune all linears of one shared input: they share its Hessian and everything derived from it."""
        settings = self.settings
        name = next(iter(linears))
        hessian = DampedHessian(gram.hessian, self._damping(name, gram), name=name)
        reports = []
        for name, (linear, pattern) in linears.items():
            started = time.perf_counter()
            target = None
            if settings.corrects:
                shares = settings.error_correction, settings.residual_correction
                target = corrected_target(linear.weight, hessian, drift, *shares)
            method = METHODS[settings.method]
            pruned = prune_layer(linear.weight, hessian, pattern, method, settings.block_size, target=target)
            linear.weight.copy_(pruned.weight)
            report = LayerReport(
                name=name,
                shape=(linear.out_features, linear.in_features),
                sparsity=str(pattern),
                zeros=1 - float(pruned.mask.sum()) / pruned.mask.numel(),
                relative_error=pruned.relative_error,
                damping=pruned.damping,
                tokens=gram.tokens,
                seconds=time.perf_counter() - started,
            )
            reports.append(report)
            self.on_layer(report)
        self.report.layers += reports
        return reports

    def _damping(self, name: str, gram: HessianAccumulator) -> float:
        """The damping asked for, raised where fewer tokens than inputs leave the Hessian singular, with a warning."""
        width = len(gram.hessian)
        damping = self.settings.damping_for(width, gram.tokens)
        if gram.tokens >= width:
            return damping
        raised = damping * width / gram.tokens
        self.report.warnings.append(
            f"{name}: only {gram.tokens} calibration tokens for {width} input features; damping raised from "
            f"{damping:g} to {raised:g}; give more --samples or a longer --seqlen"
        )
        return raised

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the wall seconds of a part of the work; a GPU is waited for."""
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.report.seconds[part] += time.perf_counter() - started


class _BlockJob:
    """One block on its way from dense to pruned."""

    def __init__(self, driver: _Driver, block: nn.Module, index: int, patterns: dict[str, Sparsity]) -> None:
        self.driver, self.block, self.index, self.patterns = driver, block, index, patterns
        self.settings = driver.settings
        self.prefix = f"{driver.family.blocks}.{index}."
        self.device = next(block.parameters()).device
        self.linears = {name: linear for name, linear in prunable_linears(block).items() if name in patterns}
        self.pruned_names: set[str] = set()
        # For each micro-batch of the pruned stream, the outputs of submodules that will not change any more.
        self.memos: list[dict[str, Any]] = [{} for _ in driver.pruned_stream]

    def prune_linears(self) -> list[LayerReport]:
        """Prune every selected linear, stage by stage in forward order."""
        with self.driver.timed("capture"):
            groups = self._shared_inputs()
            stages = _stages(groups, self.settings.order)
            dense_inputs = self._dense_pass(stages)
        layers: list[LayerReport] = []
        for stage in stages:
            with self.driver.timed("capture"):
                statistics = self._gather(stage, _linears_from(stage[-1], groups), dense_inputs)
            with self.driver.timed("solve"):
                for group, sums in statistics.items():
                    linears = {self.prefix + name: (self.linears[name], self.patterns[name]) for name in group}
                    layers += self.driver.prune_group(linears, *sums)
                    self.pruned_names.update(group)
        return layers

    def reconstruct(self) -> float:
        """Train the kept weights so that the block on pruned inputs gives the dense block's outputs.

        Returns the held-out loss as a share of what it was.
        """
        assert self.driver.dense_stream is not None
        with self.driver.timed("reconstruct"):
            result = reconstruct_block(
                self.block,
                list(self.linears),
                self.driver.pruned_stream,
                self.driver.dense_stream,
                lambda size: self.driver.inputs.call(size, self.index),
                epochs=self.settings.reconstruct,
                learning_rate=self.settings.learning_rate,
            )
        self.memos = [{} for _ in self.memos]
        if result.diverged:
            self.driver.report.warnings.append(
                f"{self.prefix[:-1]}: reconstruction diverged after {result.best_epoch} good epochs and was rolled "
                "back to the best; lower --learning-rate"
            )
        return result.after / result.before if result.before else 1.0

    def run(
        self, hidden: Tensor, watched: frozenset[str] = frozenset(), unused: Group = ()
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the watched submodules and the block's output, for one micro-batch; the output goes home."""
        call = self.driver.inputs.call(len(hidden), self.index)
        seen, output = run_watched(self.block, call, hidden.to(self.device), watched, unused)
        return seen, output.to(hidden.device)

    def run_pruned(
        self, step: int, watched: frozenset[str] = frozenset(), unused: Group = ()
    ) -> tuple[dict[str, Tensor], Tensor]:
        """`run` for a micro-batch of the pruned stream; finished submodules, such as attention, compute only once."""
        with remember_outputs(self.block, self._finished(), self.memos[step]):
            return self.run(self.driver.pruned_stream[step], watched, unused)

    def output(self, step: int) -> Tensor:
        """The finished block's output for a micro-batch; what is remembered serves once more and is let go."""
        memo, self.memos[step] = self.memos[step], {}
        with remember_outputs(self.block, list(memo), memo):
            return self.run(self.driver.pruned_stream[step])[1]

    def _finished(self) -> list[str]:
        """Direct submodules all of whose linears are pruned; a bare linear's output is wide and not worth keeping."""
        done = []
        for child, module in self.block.named_children():
            inside = {name for name in self.linears if name.startswith(f"{child}.")}
            if inside and inside <= self.pruned_names and not isinstance(module, nn.Linear):
                done.append(child)
        return done

    def _shared_inputs(self) -> list[Group]:
        hidden = self.driver.pruned_stream[0]
        call = self.driver.inputs.call(len(hidden), self.index)
        if not self.linears:
            return []
        return shared_inputs(self.block, self.linears, call, hidden.to(self.device), self.prefix)

    def _dense_pass(self, stages: list[list[Group]]) -> DenseInputs:
        """Move the dense stream through the still dense block; keep what the corrections will compare."""
        if self.driver.dense_stream is None:
            return []
        compared = [group for stage in stages for group in stage] if self.settings.corrects else []
        watched = frozenset(name for group in compared for name in self._watched(group))
        kept = []
        for step, hidden in enumerate(self.driver.dense_stream):
            seen, self.driver.dense_stream[step] = self.run(hidden, watched)
            kept.append({name: tensor.to(hidden.device) for name, tensor in seen.items()})
        return kept

    def _watched(self, group: Group) -> list[str]:
        """Where to look for a group: its own input and, for a projection, the residual stream it is added to."""
        residual = self._residual(group)
        return [group[0]] if residual is None else [group[0], residual]

    def _residual(self, group: Group) -> str | None:
        wanted = self.settings.residual_correction > 0 and len(group) == 1
        return self.driver.family.residuals.get(group[0]) if wanted else None

    def _gather(
        self, stage: list[Group], unused: Group, dense_inputs: DenseInputs
    ) -> dict[Group, tuple[HessianAccumulator, DriftAccumulator]]:
        """One pass of the pruned stream for all shared inputs of a stage; `unused` linears need not be computed."""
        statistics = {
            group: (
                HessianAccumulator(self.linears[group[0]].in_features, self.device),
                DriftAccumulator(),
            )
            for group in stage
        }
        watched = frozenset(name for group in stage for name in self._watched(group))
        for step in range(len(self.driver.pruned_stream)):
            pruned, _ = self.run_pruned(step, watched, unused)
            for group, (hessian, drift) in statistics.items():
                name, residual = group[0], self._residual(group)
                hessian.add(pruned[name])
                if not self.settings.corrects:
                    continue
                dense = dense_inputs[step]
                drift.add_inputs(dense[name].to(self.device), pruned[name])
                if residual is not None:
                    drift.add_residual(dense[residual].to(self.device), pruned[residual], pruned[name])
        return statistics


def _stages(groups: list[Group], order: Order) -> list[list[Group]]:
    """Which shared inputs are gathered in one pass: see PruneSettings.order."""
    if order == "block":
        return [groups] if groups else []
    if order == "input":
        return [[group] for group in groups]
    return [[(name,)] for group in groups for name in group]


def _linears_from(last: Group, groups: list[Group]) -> Group:
    """The linears of the group that holds `last`, and of all groups after it: their outputs lead nowhere yet."""
    place = next(place for place, group in enumerate(groups) if last[0] in group)
    return tuple(name for group in groups[place:] for name in group)
