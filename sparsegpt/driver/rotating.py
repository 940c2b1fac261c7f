"""The first thing that a prune does: write the model in bases in which the pattern drops less.

From here on everything sees a rotated dense model: calibration, corrections, training, what is saved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsegpt.driver.choices import choose_linears
from sparsegpt.driver.progress import Progress
from sparsegpt.driver.ranks import ONE_RANK, Ranks
from sparsegpt.driver.reports import Listener, PruneReport, RotationReport
from sparsegpt.driver.verification import SHARE_WITH_EXPERTS, TOLERANCE, token_differences
from sparsegpt.driver.windows import Windows, dealt, micro_batches
from sparsegpt.errors import SparseGPTError
from sparsegpt.model.decoder import DecoderModel, evaluating
from sparsegpt.model.residence import Residence
from sparsegpt.rotation.bases import Bases, rotate_block, rotate_entry, rotate_exit
from sparsegpt.rotation.rotatable import Rotatable
from sparsegpt.rotation.search import find_bases, tokens_wanted
from sparsegpt.settings.prune_settings import resolve_settings
from sparsegpt.sparsity import Sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A head of its own may add this share to a model's bytes before `auto` leaves the stream as it is.
UNTIED_SHARE = 0.05
# Tokens by which the rotated model is compared with the model.
TOKENS_COMPARED = 128


@dataclass(frozen=True)
class Wanted:
    """Which bases a run looks for."""

    stream: bool
    values: bool

    def __bool__(self) -> bool:
        return self.stream or self.values


def wanted_bases(model: Rotatable, rotate: str) -> Wanted:
    """What a choice of --rotate comes to for a model.

    Raises SparseGPTError where it asks for what the model does not have.
    """
    if rotate != "auto":
        wanted = Wanted(stream=rotate in ("stream", "all"), values=rotate in ("values", "all"))
        try:
            model.check(stream=wanted.stream, values=wanted.values)
        except SparseGPTError as error:
            raise SparseGPTError(f"{error}; leave the choice to auto", settings=("rotate",)) from error
        return wanted
    stream = not model.no_stream and model.untied_share <= UNTIED_SHARE
    return Wanted(stream, not model.no_values)


def rotate_model(
    model: "PreTrainedModel",
    windows: Windows,
    sparsity: str | float | Sparsity,
    *,
    rotate: str = "all",
    device: torch.device | str | None = None,
    micro_batch: int | None = None,
    seed: int = 0,
) -> RotationReport:
    """Write a transformers model, in place, in bases in which pruning to `sparsity` drops less; nothing is pruned.

    windows, device, micro_batch: as for `prune_model`. rotate: "values", "stream", "all", or "auto" for what fits the
    model. seed: draws the rows that are looked at.
    Raises SparseGPTError for bases that the model does not have.
    """
    settings = resolve_settings(sparsity, "paper", rotate=rotate)
    decoder = DecoderModel.of(model)
    choices = choose_linears(decoder, settings)
    report = PruneReport(settings)
    patterns = {name: choice.sparsity for name, choice in choices.pruned.items()}
    residence = Residence(torch.device(device) if device else None, decoder.model.dtype, decoder.model.dtype)
    batches = micro_batches(windows, decoder, micro_batch)
    told = report, Listener()
    with evaluating(model):
        rotate_first(decoder, rotate, patterns, batches, residence, Progress(), *told, in_place=True, seed=seed)
    return report.rotation or RotationReport(None, None, 0, 0)


@torch.no_grad()
def rotate_first(
    decoder: DecoderModel,
    rotate: str,
    patterns: Mapping[str, Sparsity],
    batches: Sequence[Tensor],
    residence: Residence,
    progress: Progress,
    report: PruneReport,
    listener: Listener,
    *,
    in_place: bool,
    seed: int = 0,
    ranks: Ranks = ONE_RANK,
) -> None:
    """Write a model in bases that are known from before, or that are looked for now, as `rotate` says.

    patterns: of the linears that are pruned, by their full names. batches: calibration tokens [batch, sequence] of all
    ranks, which look for the bases together.
    in_place: rotate every block now, rather than each time it comes to work until it is settled.
    Raises SparseGPTError for bases that the model does not have, and where it computes something else in them.
    """
    model = Rotatable(decoder)
    wanted = wanted_bases(model, rotate)
    if not wanted or not any(pattern.zeros for pattern in patterns.values()):
        return
    known = progress.load_bases()
    if known is None:
        unties = wanted.stream and model.unties
        share = dealt(_first(batches, tokens_wanted(model)), ranks)
        found = find_bases(
            model,
            share,
            residence,
            patterns,
            stream=wanted.stream,
            values=wanted.values,
            seed=seed,
            add_up=ranks.add_up,
        )
        bases = found.bases
        added = model.head_parameters if unties and bases.stream is not None else 0
        report.rotation = RotationReport(found.stream, found.values, len(bases.values), added)
        listener.rotated(report.rotation)
        progress.keep_bases(bases.tensors(), report)
    else:
        bases = Bases.of_tensors(known)
    if bases:
        _apply(model, bases, residence, progress, batches[0][:1, :TOKENS_COMPARED], in_place=in_place)


def _first(batches: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """So many batches that they hold these tokens, or all."""
    taken: list[Tensor] = []
    for batch in batches:
        if sum(map(torch.numel, taken)) >= tokens:
            break
        taken.append(batch)
    return taken


def _apply(
    model: Rotatable, bases: Bases, residence: Residence, progress: Progress, tokens: Tensor, *, in_place: bool
) -> None:
    decoder = model.decoder
    before = _logits(decoder, tokens)
    if bases.stream is not None:
        _rotate_outside(model, bases.stream, residence, progress)
    for index, block in enumerate(decoder.blocks):
        if in_place:
            with residence.visit(block):
                rotate_block(model, index, bases)
                residence.settle_all(block, residence.to_store(block))
        else:
            residence.on_arrival(block, partial(rotate_block, model, index, bases))
    _compare(decoder, before, _logits(decoder, tokens))


def _rotate_outside(model: Rotatable, basis: Tensor, residence: Residence, progress: Progress) -> None:
    outside = model.outside()
    for place, module in enumerate(outside.entries):
        with residence.visit(module):
            rotate_entry(module, basis)
            _settle(module, f"entry-{place}", residence, progress)
    ending = nn.ModuleList(module for module in (outside.norm, outside.exit) if module is not None)
    with residence.visit(ending):
        rotate_exit(outside.norm, outside.exit, model.layout.unit, basis)
        _settle(ending, "exit", residence, progress)


def _settle(module: nn.Module, name: str, residence: Residence, progress: Progress) -> None:
    residence.settle_all(module, progress.keep_outside(name, residence.to_store(module)))


def _logits(decoder: DecoderModel, tokens: Tensor) -> Tensor:
    logits: Tensor = decoder.model(**decoder.inputs(tokens)).logits
    return logits


def _compare(decoder: DecoderModel, before: Tensor, after: Tensor) -> None:
    """Raise SparseGPTError unless the rotated model says what the model has said; logits [1, sequence, tokens]."""
    # What stands around the blocks is kept in its own dtype, and rounded to it anew.
    tolerance = max(TOLERANCE.get(parameter.dtype, 0.0) for parameter in decoder.model.parameters())
    off_T = token_differences(after, before) > max(tolerance, TOLERANCE[before.dtype])
    share = float(off_T.float().mean())
    if share > SHARE_WITH_EXPERTS:
        raise SparseGPTError(
            f"{decoder.name} computes something else in another basis, for {share:.0%} of the tokens: models of this "
            "form cannot be rotated; leave it off",
            settings=("rotate",),
        )
