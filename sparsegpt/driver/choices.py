"""Which linears of a model are pruned, and how each of them: decided and checked before any work begins."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsegpt.driver.allocation import Shapes, Visit, allocate
from sparsegpt.errors import SparseGPTError
from sparsegpt.files.mapped import chunks
from sparsegpt.model.capture import ModelInputs
from sparsegpt.model.families import decoder_blocks, family_of, prunable_linears
from sparsegpt.model.unfuse import unfused
from sparsegpt.settings.prune_settings import LinearSettings, PruneSettings
from sparsegpt.settings.recipe import choose, sets_sparsity
from sparsegpt.settings.selection import BlockRanges, parse_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose_linears(
    model: "PreTrainedModel",
    settings: PruneSettings,
    select: Callable[[str], bool],
    only_blocks: str | BlockRanges | None,
    *,
    include_head: bool,
) -> dict[str, LinearSettings | None]:
    """What applies to each selected linear, by its full name; None for those a rule leaves dense.

    Raises SparseGPTError when nothing is left to prune, and for a pattern that does not fit a linear.
    """
    family = family_of(model)
    blocks = decoder_blocks(model, family)
    widths: dict[str, int] = {}
    for place in sorted(parse_blocks(only_blocks).places(len(blocks))):
        inside = {f"{family.blocks}.{place}.{name}": shape for name, shape in shapes_of(blocks[place]).items()}
        widths |= {name: in_features for name, (_, in_features) in inside.items() if select(name)}
    if not widths and not include_head:
        raise SparseGPTError(
            "no linear layer is selected: loosen --only or --skip, which match full module names, or --blocks"
        )
    chosen = choose(settings, [*widths, "lm_head"] if include_head else list(widths))
    for name, width in widths.items():
        if (choice := chosen[name]) is not None:
            choice.sparsity.check(width, name)
    return chosen


def shapes_of(block: nn.Module) -> dict[str, tuple[int, int]]:
    """Weight shape [out_features, in_features] of every linear of a block, by its name inside the block."""
    with unfused(block):
        return {name: (linear.out_features, linear.in_features) for name, linear in prunable_linears(block).items()}


def check_block(block: nn.Module, prefix: str, chosen: dict[str, LinearSettings], *, finite: bool) -> Shapes:
    """Shapes of the chosen linears of a block; SparseGPTError, naming the linear, for one that cannot be pruned so.

    finite: the weights are known to be.
    """
    shapes = {}
    with unfused(block):
        for name, linear in prunable_linears(block).items():
            if prefix + name in chosen:
                check_linear(prefix + name, linear, finite=finite)
                shapes[name] = (linear.out_features, linear.in_features)
    return shapes


def check_linear(name: str, linear: nn.Linear, *, finite: bool) -> None:
    """Refuse before any work what would be refused in the middle of it."""
    if not finite and not all(torch.isfinite(part).all() for part in chunks(linear.weight)):
        raise SparseGPTError(f"{name}: weight contains NaN or infinite values; the checkpoint is damaged")


def spread(
    settings: PruneSettings,
    chosen: dict[str, LinearSettings],
    blocks: nn.ModuleList,
    shapes: dict[str, Shapes],
    inputs: ModelInputs,
    visit: Visit,
) -> None:
    """Spread the run's sparsity over the linears to which no rule gives one; shapes: by block and name in it."""
    free = [
        {name: shape for name, shape in block.items() if not sets_sparsity(settings, prefix + name)}
        for prefix, block in shapes.items()
    ]
    patterns = allocate(settings.sparsity, settings.allocation, blocks, free, inputs, visit)
    for prefix, by_name in zip(shapes, patterns, strict=True):
        for name, pattern in by_name.items():
            chosen[prefix + name] = replace(chosen[prefix + name], sparsity=pattern)
