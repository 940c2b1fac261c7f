"""Which linears of a model are pruned, and how each of them: decided and checked before any work begins."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsegpt.driver.accounting import Accounting, Survey, account, in_braces, survey, unasked_note
from sparsegpt.driver.allocation import Shapes, Visit, allocate
from sparsegpt.driver.refusals import check_weights
from sparsegpt.errors import SparseGPTError
from sparsegpt.files.mapped import chunks
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import prunable_linears
from sparsegpt.model.unfuse import unfused
from sparsegpt.settings.prune_settings import LinearSettings, PruneSettings, without_residual_correction
from sparsegpt.settings.recipe import choose, idle_rules, sets_sparsity
from sparsegpt.settings.selection import BlockRanges, parse_blocks

# What the output layer is called, whatever the model calls it.
HEAD = "lm_head"


@dataclass(frozen=True)
class Choices:
    """What is pruned, and how: decided once a run, by `choose_linears`.

    settings: as they hold for this model. linears: what applies to each selected linear, by its full name; None for
    those that a rule leaves dense. found: all that the model consists of. blocks: those selected, by index. notes: what
    the user should know of it.
    """

    settings: PruneSettings
    linears: dict[str, LinearSettings | None]
    found: Survey
    blocks: frozenset[int]
    notes: tuple[str, ...] = ()

    @property
    def pruned(self) -> dict[str, LinearSettings]:
        """The linears that are pruned."""
        return {name: choice for name, choice in self.linears.items() if choice is not None}

    @property
    def accounting(self) -> Accounting:
        """Every weight of the model: pruned, left dense by choice, or not prunable and why."""
        return account(self.found, self.linears, self.blocks, with_head=self.linears.get(HEAD) is not None)

    def without(self, names: Iterable[str], reason: str) -> "Choices":
        """The same where these linears cannot be pruned after all, for a reason of which the notes tell.

        Raises SparseGPTError when nothing is left to prune.
        """
        lost = [name for name in names if name in self.linears]
        if not lost:
            return self
        linears = {name: choice for name, choice in self.linears.items() if name not in lost}
        if not linears:
            raise SparseGPTError(f"no linear layer can be pruned: {', '.join(in_braces(lost))}: {reason}")
        note = f"left dense: {', '.join(in_braces(lost))}: {reason}"
        return replace(self, linears=linears, found=self.found.without(lost, reason), notes=(*self.notes, note))


def choose_linears(
    decoder: DecoderModel,
    settings: PruneSettings,
    select: Callable[[str], bool] = lambda name: True,
    only_blocks: str | BlockRanges | None = None,
    *,
    include_head: bool = False,
) -> Choices:
    """Which linears of a model are pruned, and how.

    select(name): whether to prune the linear of this full name. only_blocks: prune in these decoder blocks alone, as
    "0:12". include_head: prune lm_head too.
    Raises SparseGPTError when nothing is left to prune, for a pattern that does not fit a linear, for a correction
    that this model cannot have, and for weights that are no plain numbers in memory.
    """
    check_weights(decoder)
    settings, notes = without_residual_correction(settings, decoder.family.uncorrectable)
    found, blocks = survey(decoder), parse_blocks(only_blocks).indices(len(decoder.blocks))
    widths: dict[str, int] = {}
    for index in sorted(blocks):
        widths |= {name: in_features for name, (_, in_features) in found.of_block(index).items() if select(name)}
    if not widths and not include_head:
        raise _nothing_selected(found)
    linears = choose(settings, [*widths, HEAD] if include_head else list(widths))
    for name, width in widths.items():
        if (choice := linears[name]) is not None:
            choice.sparsity.check(width, name)
    choices = Choices(settings, linears, found, blocks)
    unasked = unasked_note(found, choices.accounting, select, tuple(decoder.prefix(index) for index in blocks))
    notes = [decoder.family.note, unasked, *notes, *idle_rules(settings, linears)]
    return replace(choices, notes=tuple(filter(None, notes)))


def _nothing_selected(found: Survey) -> SparseGPTError:
    """Why there is nothing to prune."""
    if found.linears:
        return SparseGPTError(
            "no linear layer is selected: loosen what selects them by expressions on full module names, or by blocks",
            settings=("only", "skip", "blocks"),
        )
    reasons = sorted({found.reasons.get(name, "") for name in found.matrices})
    return SparseGPTError(
        f"the blocks have no linear layer that can be pruned: their matrices are {'; '.join(reasons) or 'none'}"
    )


def check_block(block: nn.Module, prefix: str, pruned: Mapping[str, LinearSettings], *, finite: bool) -> Shapes:
    """Shapes of the pruned linears of a block; SparseGPTError, naming the linear, for one that cannot be pruned so.

    finite: the weights are known to be.
    """
    shapes = {}
    with unfused(block):
        for name, linear in prunable_linears(block).items():
            if prefix + name in pruned:
                check_linear(prefix + name, linear, finite=finite)
                shapes[name] = (linear.out_features, linear.in_features)
    return shapes


def check_linear(name: str, linear: nn.Linear, *, finite: bool) -> None:
    """Refuse before any work what would be refused in the middle of it."""
    if not finite and not all(torch.isfinite(part).all() for part in chunks(linear.weight)):
        raise SparseGPTError(f"{name}: weight contains NaN or infinite values; the checkpoint is damaged")


def spread(
    settings: PruneSettings,
    pruned: Mapping[str, LinearSettings],
    decoder: DecoderModel,
    shapes: Sequence[Shapes],
    batches: Sequence[Tensor],
    visit: Visit,
) -> dict[str, LinearSettings]:
    """`pruned` with the run's sparsity spread over the linears to which no rule gives one.

    shapes: block by block. batches: calibration tokens [batch, sequence].
    """
    if settings.allocation == "uniform":
        return dict(pruned)
    prefixes = [prefix for prefix, _ in decoder.by_prefix()]
    free = [
        {name: shape for name, shape in block.items() if not sets_sparsity(settings, prefix + name)}
        for prefix, block in zip(prefixes, shapes, strict=True)
    ]
    patterns = allocate(settings.sparsity, settings.allocation, decoder, free, batches, visit)
    found = dict(pruned)
    for prefix, by_name in zip(prefixes, patterns, strict=True):
        for name, pattern in by_name.items():
            found[prefix + name] = replace(found[prefix + name], sparsity=pattern)
    return found
