"""Experts of a mixture as whole groups: those leave without which a block says most nearly what it said."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsegpt.model.capture import BlockCall
from sparsegpt.shrinking.cutting import fill
from sparsegpt.shrinking.depth import Walk
from sparsegpt.shrinking.shapes import Anatomy

# Rounds in which experts leave: what is left is scored again in each.
ROUNDS = 4


@torch.no_grad()
def choose_experts(anatomy: Anatomy, walk: Walk, keep: int, seed: int | None = None) -> dict[int, Tensor]:
    """The experts that stay in each block that has any, ascending, LongTensor [N] by the block's index.

    The loss of a group of experts is ||block(x) - block without them (x)||^2 over the calibration tokens, with the
    router choosing among the rest. seed: draw them instead.
    """
    assert anatomy.full.experts is not None
    hidden, found = list(walk.inputs.hidden), {}
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for index in range(len(walk.decoder.blocks)):
        calls = [walk.inputs.calls(tokens, "shrinking")[index] for tokens in walk.inputs.batches]
        after = walk.through(index, hidden)
        if _has_experts(anatomy, index):
            if generator is not None:
                drawn = torch.randperm(anatomy.full.experts, generator=generator)[:keep]
                found[index] = drawn.sort().values
            else:
                found[index] = _left(anatomy, index, keep, calls, hidden, after)
        hidden = after
    return found


def _left(
    anatomy: Anatomy, index: int, keep: int, calls: list[BlockCall], hidden: list[Tensor], after: list[Tensor]
) -> Tensor:
    assert anatomy.full.experts is not None
    left = list(range(anatomy.full.experts))
    at_once = max(1, -(-(len(left) - keep) // ROUNDS))
    while len(left) > keep:
        fresh = _block_of(anatomy, index, len(left) - 1)
        losses = {}
        for expert in left:
            rest = [each for each in left if each != expert]
            fill(anatomy, index, fresh, experts=torch.tensor(rest))
            outputs = (call.run(fresh, states) for call, states in zip(calls, hidden, strict=True))
            losses[expert] = sum(
                float((ours - theirs).float().square().sum()) for ours, theirs in zip(outputs, after, strict=True)
            )
        gone = sorted(left, key=lambda expert: losses[expert])[: min(at_once, len(left) - keep)]
        left = [expert for expert in left if expert not in gone]
    return torch.tensor(left)


def _block_of(anatomy: Anatomy, index: int, experts: int) -> nn.Module:
    """A block like this one with so many experts, without weights."""
    model = anatomy.blueprint(replace(anatomy.full, experts=experts))
    blocks = model.get_submodule(anatomy.decoder.family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks[index].eval()


def _has_experts(anatomy: Anatomy, index: int) -> bool:
    return any("experts." in site.name for site in anatomy.sites[index])
