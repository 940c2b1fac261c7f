"""A smaller dense model of a larger one: `shrink_model`.

In this order: blocks and experts leave; what is left makes up for the blocks; then, block by block on the activations
of the smaller model, groups of heads and channels leave (the driver of every other pruning does it: what leaves is
zero); transformers builds the model of the new configuration, which gets what is kept; and it is trained, if asked.
"""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsegpt.driver.accounting import survey
from sparsegpt.driver.choices import Choices
from sparsegpt.driver.pipeline import prune_blocks
from sparsegpt.driver.refusals import check_weights
from sparsegpt.driver.reports import LayerReport, Listener
from sparsegpt.driver.verification import SHARE_WITH_EXPERTS, token_differences
from sparsegpt.driver.windows import Windows, micro_batches
from sparsegpt.errors import SparseGPTError
from sparsegpt.model.decoder import DecoderModel, evaluating
from sparsegpt.model.families import prunable_linears
from sparsegpt.model.unfuse import unfused
from sparsegpt.settings.prune_settings import LinearSettings, PruneSettings, without_residual_correction
from sparsegpt.shrinking.budget import budget_of, shapes_for
from sparsegpt.shrinking.cutting import Kept, KeptColumns, cut, rehearse
from sparsegpt.shrinking.depth import Walk, choose_blocks, divergences, make_up
from sparsegpt.shrinking.experts import choose_experts
from sparsegpt.shrinking.latency import LatencyTable, measure_latency
from sparsegpt.shrinking.rankings import Columns, structured
from sparsegpt.shrinking.recovery import Recovery
from sparsegpt.shrinking.settings import UPDATES, ShrinkSettings
from sparsegpt.shrinking.shapes import Anatomy, Shape, Site, feeders_of, width_in
from sparsegpt.sparsity import Unstructured

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# From this share of zeros among a linear's weights on, somebody has pruned it.
PRUNED = 0.1
# How far the smaller model may be off the one with zeros, as a share of a token's length: sums round otherwise.
AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
# Of the calibration windows a shape is chosen on one in so many; the last ones judge.
SHARE_TO_CHOOSE, JUDGING = 4, 4


@dataclass
class ShrinkReport:
    """What `shrink_model` has done.

    shape: how much is kept, of `full`. parameters: of the whole model, dense and shrunk; block_weights: of the matrices
    of its blocks. changes: entries of the configuration that differ. layers: one a projection that has lost columns.
    kept_blocks, kept_experts: by their indices in the dense model. divergence: of the shapes that were compared, in
    nats a token. latency: the table, where a speed-up was asked for. epochs: held-out divergences of the distillation.
    reconstruction: held-out losses after block-wise training, as shares of those before.
    """

    settings: ShrinkSettings
    full: Shape
    shape: Shape
    parameters: tuple[int, int] = (0, 0)
    block_weights: tuple[int, int] = (0, 0)
    changes: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    kept_experts: dict[int, list[int]] = field(default_factory=dict)
    divergence: dict[str, float] = field(default_factory=dict)
    latency: LatencyTable | None = None
    epochs: list[float] = field(default_factory=list)
    reconstruction: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def kept(self) -> float:
        """Share of the weights of the blocks' matrices that are still there."""
        dense, shrunk = self.block_weights
        return shrunk / dense

    def as_dict(self) -> dict[str, Any]:
        """Plain data for report.json."""
        sizes = {"parameters": self.parameters, "block_weights": self.block_weights}
        return {
            **{name: dict(zip(("dense", "shrunk"), pair, strict=True)) for name, pair in sizes.items()},
            "kept_of_blocks": self.kept,
            "config": self.changes,
            "kept_blocks": list(self.shape.blocks),
            "kept_experts": {str(index): kept for index, kept in self.kept_experts.items()},
            "divergence": self.divergence,
            "latency": None if self.latency is None else asdict(self.latency),
            "projections": [asdict(layer) for layer in self.layers],
            "epochs": self.epochs,
            "reconstruction": self.reconstruction,
        }


@dataclass(frozen=True)
class Shrunk:
    """The smaller model and what was done."""

    model: "PreTrainedModel"
    report: ShrinkReport


class ShrinkListener(Listener):
    """Told what happens; this one listens in silence."""

    def stage(self, text: str) -> None:
        """A new part of the work begins."""

    def trained(self, epoch: int, epochs: int, loss: float) -> None:
        """An epoch of distillation is over: its held-out divergence in nats a token."""


def shrink_model(
    model: "PreTrainedModel",
    windows: Windows,
    keep: str | float | None = None,
    *,
    settings: ShrinkSettings | None = None,
    seed: int = 0,
    micro_batch: int | None = None,
    bytes_each: int | None = None,
    listener: ShrinkListener | None = None,
    **options: Any,
) -> Shrunk:
    """A smaller causal language model of a larger one, which stays as it is.

    windows: calibration tokens, LongTensor [samples, sequence_length], or as for `prune_model`. keep: "75%" or 0.75 of
    the weights of the decoder blocks. options: fields of `ShrinkSettings`, such as heads="50%", blocks=24, speedup=1.5,
    method="wanda", distill=4; or all of them as `settings`. seed: of what is drawn. bytes_each: of a stored parameter,
    for a budget in bytes; by default the model's own. Both models share what stands outside of the blocks.
    Raises SparseGPTError, with what to do, for models that cannot be shrunk, or not so.
    """
    if settings is None:
        text = {name: str(value) for name, value in {"keep": keep, **_texts(options)}.items() if value is not None}
        settings = ShrinkSettings(**{**options, **text})
    elif keep is not None or options:
        raise SparseGPTError("settings say everything: give them, or a share and single settings")
    return _Job.of(model, windows, settings, seed, micro_batch, bytes_each, listener).run()


def _texts(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that may be given as numbers."""
    return {name: options.get(name) for name in ("parameters", "size", "heads", "channels", "experts", "blocks")}


@dataclass
class _Job:
    """One model on its way to a smaller one."""

    anatomy: Anatomy
    settings: ShrinkSettings
    batches: tuple[Tensor, ...]
    seed: int
    bytes_each: int
    listener: ShrinkListener
    report: ShrinkReport

    @classmethod
    def of(
        cls,
        model: "PreTrainedModel",
        windows: Windows,
        settings: ShrinkSettings,
        seed: int,
        micro_batch: int | None,
        bytes_each: int | None,
        listener: ShrinkListener | None,
    ) -> "_Job":
        decoder = DecoderModel.of(model)
        check_weights(decoder)
        anatomy = Anatomy.of(decoder)
        refuse_pruned(decoder)
        batches = micro_batches(windows, decoder, micro_batch)
        report = ShrinkReport(settings, anatomy.full, anatomy.full)
        each = bytes_each or next(model.parameters()).element_size()
        return cls(anatomy, settings, batches, seed, each, listener or ShrinkListener(), report)

    def run(self) -> Shrunk:
        with evaluating(self.anatomy.decoder.model):
            shape = self._choose_shape()
            smaller = self._make(shape, self.batches)
            self._recover(smaller)
        full, found = (self.anatomy.size(each) for each in (self.anatomy.full, self.report.shape))
        self.report.parameters, self.report.block_weights = (full.total, found.total), (full.blocks, found.blocks)
        self.report.changes = self.anatomy.changes(self.report.shape)
        return Shrunk(smaller.model, self.report)

    def _choose_shape(self) -> Shape:
        """The shape that the budget and the settings lead to; by divergence, where that is to choose."""
        seconds = None
        if self.settings.speedup is not None:
            self.listener.stage("measuring widths")
            table = self.report.latency = self._timed("latency", lambda: measure_latency(self.anatomy, self.batches[0]))
            seconds = table.seconds
        budget = budget_of(self.anatomy, self.settings, self.bytes_each, seconds)
        shapes = shapes_for(self.anatomy, self.settings, budget)
        if len(shapes) == 1:
            return shapes[0]
        few = self.batches[: max(1, len(self.batches) // SHARE_TO_CHOOSE)]
        for shape in shapes:
            self.listener.stage(f"trying {shape}")
            self.report.divergence[str(shape)] = self._timed("choose", functools.partial(self._judge, shape, few))
        return min(shapes, key=lambda shape: self.report.divergence[str(shape)])

    def _judge(self, shape: Shape, batches: tuple[Tensor, ...]) -> float:
        """The divergence of a quick model of a shape from the dense one, on the last windows."""
        quiet = replace(self, listener=ShrinkListener(), report=ShrinkReport(self.settings, self.anatomy.full, shape))
        smaller = quiet._make(shape, batches)
        judging = [self.batches[-1][-JUDGING:]]
        dense, ours = Walk.of(self.anatomy.decoder, judging), Walk.of(smaller, judging)
        with torch.no_grad():
            theirs = list(dense.logits(dense.end(range(len(self.anatomy.full.blocks)))))
            return divergences(theirs, ours, ours.end(range(len(shape.blocks))))

    def _make(self, shape: Shape, batches: tuple[Tensor, ...]) -> DecoderModel:
        """The model of this shape, before any training."""
        rehearse(self.anatomy, shape)
        shape, part = self._without_blocks(shape, batches)
        self.report.shape = shape
        choices = self._choices(part, shape)
        if not choices.linears:
            return part.decoder
        self.listener.stage(f"to {shape}")
        found = prune_blocks(part.decoder, batches, choices, listener=self.listener)
        self.report.layers += found.layers
        self.report.warnings += [text for text in found.warnings if text not in self.report.warnings]
        for name, seconds in found.seconds.items():
            self.report.seconds[name] = self.report.seconds.get(name, 0.0) + seconds
        columns = {index: _kept_columns(part, index, shape) for index in part.full.blocks}
        inner = replace(shape, blocks=part.full.blocks)
        smaller = DecoderModel.of(cut(part, inner, Kept(part.full.blocks, columns, {})))
        _check_agreement(part, smaller, batches[0][:2])
        return smaller

    def _without_blocks(self, shape: Shape, batches: tuple[Tensor, ...]) -> tuple[Shape, Anatomy]:
        """A model of its own with fewer blocks and experts, and all widths; and the shape, which now says which."""
        anatomy, settings = self.anatomy, self.settings
        fewer = len(shape.blocks) < len(anatomy.full.blocks)
        few = batches[: max(1, len(batches) // SHARE_TO_CHOOSE)]
        if fewer:
            self.listener.stage(f"choosing {len(shape.blocks)} of {len(anatomy.full.blocks)} blocks")
            walk = Walk.of(anatomy.decoder, few)
            shape = replace(
                shape, blocks=self._timed("depth", lambda: choose_blocks(walk, len(shape.blocks), settings.depth))
            )
        experts: dict[int, Tensor] = {}
        if shape.experts is not None and shape.experts != anatomy.full.experts:
            keep = shape.experts
            self.listener.stage(f"choosing {keep} of {anatomy.full.experts} experts")
            seed = self.seed if settings.method == "random" else None
            walk = Walk.of(anatomy.decoder, few)
            experts = self._timed("experts", lambda: choose_experts(anatomy, walk, keep, seed))
            self.report.kept_experts = {index: found.tolist() for index, found in experts.items()}
        middle = replace(anatomy.full, blocks=shape.blocks, experts=shape.experts)
        part = Anatomy.of(DecoderModel.of(cut(anatomy, middle, Kept(shape.blocks, {}, experts))))
        share = settings.corrections[1]
        if fewer and share and settings.method in UPDATES:
            damping = 0.01 if settings.damping is None else settings.damping
            changed = self._timed(
                "depth", lambda: make_up(anatomy.decoder, part, shape.blocks, batches, share, damping)
            )
            if not changed:
                self.report.warnings.append("the blocks that stay do not make up for those that left: see the docs")
        return shape, part

    def _choices(self, part: Anatomy, shape: Shape) -> Choices:
        """How many groups leave each projection of the model, as choices of the driver."""
        error, residual = self.settings.corrections
        settings = PruneSettings(
            Unstructured(0.0), damping=self.settings.damping, error_correction=error, residual_correction=residual
        )
        settings, notes = without_residual_correction(settings, part.decoder.family.uncorrectable)
        config = part.decoder.model.config
        linears: dict[str, LinearSettings | None] = {}
        for index, (prefix, block) in enumerate(part.decoder.by_prefix()):
            with unfused(block):
                for site in part.sites[index]:
                    removed = (site.width - width_in(site, shape, config)) // site.group
                    if removed:
                        linears[prefix + site.name] = self._choice(block, site, removed, settings)
        found = survey(part.decoder)
        return Choices(settings, linears, found, frozenset(part.full.blocks), tuple(notes))

    def _choice(self, block: nn.Module, site: Site, removed: int, settings: PruneSettings) -> LinearSettings:
        method = structured(self.settings.method, _feeder_squares(block, site), self.seed)
        updates = method.updates_weights
        return LinearSettings(
            Columns.of(site.width, site.group, removed),
            method=method,
            damping=settings.damping,
            error_correction=settings.error_correction if updates else 0.0,
            residual_correction=settings.residual_correction if updates else 0.0,
        )

    def _recover(self, smaller: DecoderModel) -> None:
        models, kept = (self.anatomy.decoder, smaller), self.report.shape.blocks
        recovery = Recovery(*models, kept, self.batches, self.settings, self.listener.step)
        if self.settings.reconstruct:
            self.listener.stage("training block by block")
            self.report.reconstruction = self._timed("reconstruct", recovery.reconstruct)
        if self.settings.distill:
            self.listener.stage("training on the dense model's predictions")
            epochs = self.settings.distill
            self.report.epochs = self._timed(
                "distill", lambda: recovery.distill(lambda epoch, loss: self.listener.trained(epoch, epochs, loss))
            )
            if self.report.epochs[-1] >= self.report.epochs[0]:
                self.report.warnings.append(
                    f"distillation left the held-out divergence at {self.report.epochs[-1]:.4g} nats, from "
                    f"{self.report.epochs[0]:.4g}, and was rolled back; lower its rate or give more samples"
                )

    def _timed(self, part: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = work()
        self.report.seconds[part] = self.report.seconds.get(part, 0.0) + time.perf_counter() - started
        return found


def refuse_pruned(decoder: DecoderModel) -> None:
    """Raise SparseGPTError for a model that was pruned already: whole columns of it would leave with their zeros."""
    for prefix, block in decoder.by_prefix():
        with unfused(block):
            for name, linear in prunable_linears(block).items():
                zeros = float((linear.weight == 0).float().mean())
                if zeros > PRUNED:
                    raise SparseGPTError(
                        f"{prefix}{name} has {zeros:.0%} zeros: the model was pruned already; shrink the dense model "
                        "first, then prune what comes of it, then pack"
                    )


def _feeder_squares(block: nn.Module, site: Site) -> Tensor:
    """[G]: sums of squares of the rows that feed each group of a site; inside `unfused`."""
    total = torch.zeros(site.width // site.group)
    for name, sections in feeders_of(site).items():
        squares = block.get_parameter(f"{name}.weight").detach().float().square().sum(1).cpu()
        sizes = [_section_size(site, section) for section in sections]
        for part in squares.split(sizes):
            total += part.unflatten(0, (len(total), -1)).sum(1)
    return total


def _section_size(site: Site, section: str) -> int:
    return {"own": site.width, "pairs": 2 * site.width, "keys": site.width // site.group * site.head}[section]


def _kept_columns(anatomy: Anatomy, index: int, shape: Shape) -> KeptColumns:
    """The columns that stay of each site of a block that has lost some: all but so many groups of zeros."""
    block, found = anatomy.decoder.blocks[index], {}
    with unfused(block):
        for site in anatomy.sites[index]:
            removed = (site.width - width_in(site, shape, anatomy.decoder.model.config)) // site.group
            if removed:
                empty_C = ~block.get_parameter(f"{site.name}.weight").any(0)
                empty_G = empty_C.unflatten(0, (-1, site.group)).all(-1)
                gone = empty_G.nonzero()[:removed, 0]  # others that are empty may as well stay
                stays_G = torch.ones_like(empty_G)
                stays_G[gone] = False
                found[site.name] = stays_G.repeat_interleave(site.group).nonzero()[:, 0]
    return found


@torch.no_grad()
def _check_agreement(part: Anatomy, smaller: DecoderModel, tokens: Tensor) -> None:
    """The smaller model must say what the one with zeros says: else its configuration means something else."""
    models = part.decoder, smaller
    theirs, ours = (each.model(input_ids=tokens.to(each.device), use_cache=False).logits for each in models)
    difference_T = token_differences(ours, theirs)
    off, most = float((difference_T > AGREEMENT[ours.dtype]).float().mean()), float(difference_T.max())
    if off > (0 if part.full.experts is None else SHARE_WITH_EXPERTS):
        raise SparseGPTError(
            f"{smaller.name}: the smaller model computes otherwise than the one that it was cut from, by up to "
            f"{most:.2g} of a token's length: models of this form cannot be shrunk"
        )
