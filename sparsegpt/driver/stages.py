"""In which order the linears of a block are gathered and solved: shared inputs, and how many of them in one pass.

The experts of a mixture do not feed one another, so one pass gathers the Hessians of all their up projections, the
next those of their down projections; as many at a time as fit EXPERT_BYTES.
"""

import math
from collections.abc import Callable

from sparsegpt.model.routers import ExpertLinear, expert_of
from sparsegpt.settings.prune_settings import Order

# Linears of one block that read the same tensor, by their names inside the block.
Group = tuple[str, ...]
# Which expert a linear belongs to, by its name inside the block.
ExpertOf = Callable[[str], ExpertLinear | None]
# Bytes of experts' Hessians that may lie in memory at once: half of a small GPU, or all of Qwen3-MoE's 128 experts.
EXPERT_BYTES = 4 * 2**30
# An expert's Hessian is used from one token in 64 inputs on, and two at least. Held-out error of sparsegpt and admm at
# 2:4 as a share of magnitude's, on 256 correlated synthetic inputs: 0.78 to 0.99 with 4 or 8 tokens, 0.92 to 1.03 with
# 1 or 2.
INPUTS_PER_TOKEN = 64


def enough_tokens(width: int) -> int:
    """The number of tokens from which an expert's Hessian over `width` inputs is used."""
    return max(2, math.ceil(width / INPUTS_PER_TOKEN))


def waves(groups: list[Group], expert_of: ExpertOf = expert_of) -> list[list[Group]]:
    """Groups, in forward order, by what can be gathered together: one group, or the same linears of all experts."""
    found: dict[object, list[Group]] = {}
    for group in groups:
        expert = expert_of(group[0])
        found.setdefault((expert[0], expert[2]) if expert else group, []).append(group)
    return list(found.values())


def plan_stages(
    groups: list[list[Group]], order: Order, width_of: Callable[[str], int], expert_of: ExpertOf = expert_of
) -> list[list[Group]]:
    """Which groups are gathered in one pass, for the waves of a block: see PruneSettings.order.

    In order "block" it is everything, but for experts beyond EXPERT_BYTES: they follow in passes of their own.
    """
    if order == "block":
        routed = [group for wave in groups for group in wave if expert_of(group[0])]
        others = _within_budget(routed, width_of)[1:]
        later = {group for chunk in others for group in chunk}
        whole = [group for wave in groups for group in wave if group not in later]
        return [whole, *others] if whole else []
    if order == "linear":
        groups = [[(name,) for group in wave for name in group] for wave in groups]
    stages: list[list[Group]] = []
    for wave in groups:
        stages += _within_budget(wave, width_of) if expert_of(wave[0][0]) else [[group] for group in wave]
    return stages


def _within_budget(groups: list[Group], width_of: Callable[[str], int]) -> list[list[Group]]:
    """Groups cut into runs whose Hessians take at most EXPERT_BYTES; a run holds one group at least."""
    chunks: list[list[Group]] = []
    left = 0
    for group in groups:
        size = 4 * width_of(group[0]) ** 2
        if not chunks or size > left:
            chunks.append([])
            left = EXPERT_BYTES
        chunks[-1].append(group)
        left -= size
    return chunks
