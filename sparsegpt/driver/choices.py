"""Which linears of a model are pruned, and how each of them: decided and checked before any work begins."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from sparsegpt.driver.allocation import Shapes, Visit, allocate
from sparsegpt.errors import SparseGPTError
from sparsegpt.files.mapped import chunks
from sparsegpt.model.capture import ModelInputs
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
    those that a rule leaves dense. notes: what the user should know of it.
    """

    settings: PruneSettings
    linears: dict[str, LinearSettings | None]
    notes: tuple[str, ...] = ()

    @property
    def pruned(self) -> dict[str, LinearSettings]:
        """The linears that are pruned."""
        return {name: choice for name, choice in self.linears.items() if choice is not None}


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
    Raises SparseGPTError when nothing is left to prune, for a pattern that does not fit a linear, and for a correction
    that this model cannot have.
    """
    settings, notes = without_residual_correction(settings, decoder.family.uncorrectable)
    widths: dict[str, int] = {}
    for index in sorted(parse_blocks(only_blocks).indices(len(decoder.blocks))):
        inside = {decoder.prefix(index) + name: shape for name, shape in shapes_of(decoder.blocks[index]).items()}
        widths |= {name: in_features for name, (_, in_features) in inside.items() if select(name)}
    if not widths and not include_head:
        raise SparseGPTError(
            "no linear layer is selected: loosen what selects them by expressions on full module names, or by blocks",
            settings=("only", "skip", "blocks"),
        )
    linears = choose(settings, [*widths, HEAD] if include_head else list(widths))
    for name, width in widths.items():
        if (choice := linears[name]) is not None:
            choice.sparsity.check(width, name)
    notes = [decoder.family.note, *notes, *idle_rules(settings, linears)]
    return Choices(settings, linears, tuple(filter(None, notes)))


def shapes_of(block: nn.Module) -> dict[str, tuple[int, int]]:
    """Weight shape [out_features, in_features] of every linear of a block, by its name inside the block."""
    with unfused(block):
        return {name: (linear.out_features, linear.in_features) for name, linear in prunable_linears(block).items()}


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
    inputs: ModelInputs,
    visit: Visit,
) -> dict[str, LinearSettings]:
    """`pruned` with the run's sparsity spread over the linears to which no rule gives one; shapes: block by block."""
    prefixes = [prefix for prefix, _ in decoder.by_prefix()]
    free = [
        {name: shape for name, shape in block.items() if not sets_sparsity(settings, prefix + name)}
        for prefix, block in zip(prefixes, shapes, strict=True)
    ]
    patterns = allocate(settings.sparsity, settings.allocation, decoder.blocks, free, inputs, visit)
    found = dict(pruned)
    for prefix, by_name in zip(prefixes, patterns, strict=True):
        for name, pattern in by_name.items():
            found[prefix + name] = replace(found[prefix + name], sparsity=pattern)
    return found
