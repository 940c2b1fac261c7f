"""The driver: a model pruned block by block.

For each decoder block: run it on the calibration activations, gather one Hessian per shared input, prune the linears
that read this input, go on to the next input; then run the finished block once more to get the next block's inputs.
With correction or reconstruction the dense model's activations flow beside the pruned model's, so that every layer
knows how far its inputs have already drifted.
"""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsegpt.blocks import Family, decoder_blocks, family_of, prunable_linears
from sparsegpt.capture import BlockCall, ModelInputs, record_inputs, shared_inputs, skip_products, watch_inputs
from sparsegpt.errors import SparseGPTError
from sparsegpt.hessian import DampedHessian, HessianAccumulator
from sparsegpt.settings import Order, PruneSettings, resolve_settings
from sparsegpt.solvers import METHODS, prune_layer
from sparsegpt.solvers.correction import DriftAccumulator, corrected_target
from sparsegpt.sparsity import Sparsity

# Tokens of one forward pass through a block, unless the caller says how many windows go together.
TOKENS_PER_STEP = 4096

# Linears of one block that read the same tensor, by their names inside the block.
Group = tuple[str, ...]


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear. relative_error: ||(W - W')X||^2 / ||WX||^2; sparsity: the pattern asked for."""

    name: str
    shape: tuple[int, int]
    sparsity: str
    zeros: float
    relative_error: float
    damping: float
    seconds: float


@dataclass(frozen=True)
class BlockReport:
    """One finished block: its place, the mean relative error of its layers, wall seconds."""

    index: int
    blocks: int
    relative_error: float
    seconds: float


@dataclass
class PruneReport:
    """What `prune_model` returns: one LayerReport a linear, and where the time went."""

    settings: PruneSettings
    layers: list[LayerReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"capture": 0.0, "solve": 0.0, "reconstruct": 0.0})

    @property
    def density(self) -> float:
        """Share of non-zero weights in the pruned linears."""
        total = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return sum((1 - layer.zeros) * layer.shape[0] * layer.shape[1] for layer in self.layers) / total

    def as_dict(self) -> dict[str, Any]:
        """Plain data for report.json."""
        settings = asdict(self.settings) | {"sparsity": str(self.settings.sparsity)}
        return {
            "sparsity": str(self.settings.sparsity),
            "method": self.settings.method,
            "settings": settings,
            "density_of_pruned_linears": self.density,
            "layers": [asdict(layer) for layer in self.layers],
        }


@torch.no_grad()
def prune_model(
    model: nn.Module,
    windows: Tensor,
    sparsity: str | float | Sparsity,
    *,
    preset: str = "default",
    device: torch.device | str | None = None,
    micro_batch: int | None = None,
    select: Callable[[str], bool] = lambda name: True,
    on_layer: Callable[[LayerReport], None] = lambda report: None,
    on_block: Callable[[BlockReport], None] = lambda report: None,
    **settings: Any,
) -> PruneReport:
    """Prune a transformers causal language model in place.

    windows: LongTensor [samples, sequence_length] of calibration tokens. sparsity: "2:4", 0.5, "50%" or a pattern.
    preset and settings: see `settings.PruneSettings`; what is given here wins over the preset. device: where one block
    computes at a time, by default where the blocks are; the activations between blocks stay on the embedding's device.
    micro_batch: windows of one forward pass. select(name): whether to prune the linear of this name.
    on_layer, on_block: called with a report after each linear and each block.
    Raises SparseGPTError, naming the layer, for input that cannot be pruned; the blocks before it are pruned by then.
    """
    chosen = resolve_settings(sparsity, preset, **settings)
    if windows.ndim != 2 or windows.is_floating_point() or windows.numel() == 0:
        raise SparseGPTError(f"expected calibration windows [samples, sequence_length], found {list(windows.shape)}")
    family = family_of(model)
    blocks = decoder_blocks(model, family)
    _check_layers(blocks, family, chosen.sparsity, select)
    report = PruneReport(chosen)
    was_training = model.training
    model.eval()
    try:
        inputs = record_inputs(model, blocks, windows, micro_batch or max(1, TOKENS_PER_STEP // windows.shape[1]))
        driver = _Driver(chosen, family, inputs, report, select, on_layer, torch.device(device) if device else None)
        for index, block in enumerate(blocks):
            started = time.perf_counter()
            layers = driver.prune_block(block, index, last=index + 1 == len(blocks))
            error = sum(layer.relative_error for layer in layers) / max(1, len(layers))
            on_block(BlockReport(index, len(blocks), error, time.perf_counter() - started))
    finally:
        model.train(was_training)
    return report


def _check_layers(blocks: nn.ModuleList, family: Family, pattern: Sparsity, select: Callable[[str], bool]) -> None:
    """Refuse before any work what would be refused in the middle of it."""
    found = False
    for index, block in enumerate(blocks):
        for name, linear in prunable_linears(block).items():
            full_name = f"{family.blocks}.{index}.{name}"
            if select(full_name):
                found = True
                pattern.check(linear.in_features, full_name)
    if not found:
        raise SparseGPTError("no linear layer is selected: loosen --only or --skip, which match full module names")


class _Driver:
    """Carries the activation streams from block to block and prunes each block in turn."""

    def __init__(
        self,
        settings: PruneSettings,
        family: Family,
        inputs: ModelInputs,
        report: PruneReport,
        select: Callable[[str], bool],
        on_layer: Callable[[LayerReport], None],
        device: torch.device | None,
    ) -> None:
        self.settings, self.family, self.report = settings, family, report
        self.select, self.on_layer, self.device = select, on_layer, device
        self.calls = inputs.calls
        self.pruned_stream = inputs.hidden
        # The streams part at the first pruned linear; until then they are the same tensors.
        self.dense_stream = list(inputs.hidden) if settings.needs_dense_stream else None

    def prune_block(self, block: nn.Module, index: int, *, last: bool) -> list[LayerReport]:
        """Prune the block in place and move the streams behind it; the last block's outputs are not computed."""
        home = next(block.parameters()).device
        device = self.device or home
        block.to(device)
        dense_block = copy.deepcopy(block) if self.dense_stream is not None else None
        layers = self._prune_linears(block, dense_block, index)
        if dense_block is not None and self.dense_stream is not None and (not last or self.settings.reconstruct):
            self.dense_stream = self._advance(dense_block, self.dense_stream, index)
            if self.settings.reconstruct and layers:
                self._reconstruct(block, index)
        if not last:
            self.pruned_stream = self._advance(block, self.pruned_stream, index)
        block.to(home)
        return layers

    def _prune_linears(self, block: nn.Module, dense_block: nn.Module | None, index: int) -> list[LayerReport]:
        prefix = f"{self.family.blocks}.{index}."
        names = [name for name in prunable_linears(block) if self.select(prefix + name)]
        if not names:
            return []
        hidden = self.pruned_stream[0].to(next(block.parameters()).device)
        groups = shared_inputs(block, names, self._call(hidden, index), hidden)
        layers = []
        for stage in _stages(groups, self.settings.order):
            statistics = self._gather(block, dense_block, index, groups, stage)
            for group in stage:
                layers += self._prune_group(block, prefix, group, *statistics.pop(group))
        return layers

    def _gather(
        self,
        block: nn.Module,
        dense_block: nn.Module | None,
        index: int,
        groups: list[Group],
        stage: list[Group],
    ) -> dict[Group, tuple[HessianAccumulator, DriftAccumulator]]:
        """One pass over the calibration activations for all shared inputs of a stage."""
        started = time.perf_counter()
        device = next(block.parameters()).device
        statistics = {
            group: (HessianAccumulator(block.get_submodule(group[0]).in_features, device), DriftAccumulator())
            for group in stage
        }
        residuals = {group: self._residual_source(group) for group in stage}
        watched = {group[0] for group in stage} | {source for source in residuals.values() if source}
        # Whatever the last inputs of this stage lead to is not looked at.
        unused = [name for group in groups[groups.index(stage[-1]) :] for name in group] if stage[-1] in groups else []
        for step, hidden in enumerate(self.pruned_stream):
            pruned = self._look(block, hidden.to(device), index, watched, unused)
            dense = None
            if dense_block is not None and self.dense_stream is not None and self.settings.corrects:
                dense = self._look(dense_block, self.dense_stream[step].to(device), index, watched, unused)
            for group, (hessian, drift) in statistics.items():
                name, residual = group[0], residuals[group]
                hessian.add(pruned[name])
                if dense is not None:
                    drift.add_inputs(dense[name], pruned[name])
                if dense is not None and residual is not None:
                    drift.add_residual(dense[residual], pruned[residual], pruned[name])
        self.report.seconds["capture"] += time.perf_counter() - started
        return statistics

    def _residual_source(self, group: Group) -> str | None:
        """The submodule whose input is the residual stream that this group's only linear is added to."""
        return self.family.residuals.get(group[0]) if len(group) == 1 and self.settings.residual_correction else None

    def _look(
        self, block: nn.Module, hidden: Tensor, index: int, watched: Iterable[str], unused: list[str]
    ) -> dict[str, Tensor]:
        """The inputs of the watched submodules in one forward pass."""
        seen: dict[str, Tensor] = {}
        with watch_inputs(block, watched, seen.__setitem__), skip_products(block.get_submodule(n) for n in unused):
            self._call(hidden, index).run(block, hidden)
        return seen

    def _prune_group(
        self, block: nn.Module, prefix: str, group: Group, gram: HessianAccumulator, drift: DriftAccumulator
    ) -> list[LayerReport]:
        """Prune all linears of one shared input: they share its Hessian and what is derived from it."""
        started = time.perf_counter()
        hessian = DampedHessian(gram.hessian, self.settings.damping, name=prefix + group[0])
        layers = []
        for name in group:
            linear_started = time.perf_counter()
            linear = block.get_submodule(name)
            if not torch.isfinite(linear.weight).all():
                raise SparseGPTError(f"{prefix + name}: weight contains NaN or infinite values; the checkpoint is damaged")
            target = None
            if self.settings.corrects:
                shares = self.settings.error_correction, self.settings.residual_correction
                target = corrected_target(linear.weight, hessian, drift, *shares)
            pruned = prune_layer(
                linear.weight,
                hessian,
                self.settings.sparsity,
                METHODS[self.settings.method],
                self.settings.block_size,
                target=target,
            )
            linear.weight.copy_(pruned.weight)
            layers.append(
                LayerReport(
                    name=prefix + name,
                    shape=(linear.out_features, linear.in_features),
                    sparsity=str(self.settings.sparsity),
                    zeros=1 - float(pruned.mask.sum()) / pruned.mask.numel(),
                    relative_error=pruned.relative_error,
                    damping=pruned.damping,
                    seconds=time.perf_counter() - linear_started,
                )
            )
            self.on_layer(layers[-1])
        self.report.layers += layers
        self.report.seconds["solve"] += time.perf_counter() - started
        return layers

    def _reconstruct(self, block: nn.Module, index: int) -> None:
        raise NotImplementedError

    def _advance(self, block: nn.Module, stream: list[Tensor], index: int) -> list[Tensor]:
        """The stream behind the block; each micro-batch returns to where it was kept."""
        started = time.perf_counter()
        device = next(block.parameters()).device
        outputs = [self._call(h, index).run(block, h.to(device)).to(h.device) for h in stream]
        self.report.seconds["capture"] += time.perf_counter() - started
        return outputs

    def _call(self, hidden: Tensor, index: int) -> BlockCall:
        return self.calls[len(hidden)][index]


def _stages(groups: list[Group], order: Order) -> list[list[Group]]:
    """Which shared inputs are gathered in one pass: see PruneSettings.order."""
    if order == "block":
        return [groups]
    if order == "input":
        return [[group] for group in groups]
    return [[(name,)] for group in groups for name in group]
