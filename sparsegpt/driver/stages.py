"""In which order the linears of a block are gathered and solved, how many of them in one pass, and by which rank.

The experts of a mixture do not feed one another, so one pass gathers the Hessians of all their up projections, the
next those of their down projections; as many at a time as fit EXPERT_BYTES.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from sparsegpt.driver.ranks import Ranks, Share
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


class Matrix(NamedTuple):
    """A weight [rows, columns] to be solved; by_rows: rows can be solved apart."""

    rows: int
    columns: int
    by_rows: bool


# The matrices of each shared input, by the full names of their linears.
Stage = Sequence[Mapping[str, Matrix]]


def share_out(stage: Stage, ranks: Ranks) -> dict[str, Share]:
    """Who solves what: whole shared inputs, or rows of each (whole matrices where rows are bound together).

    Whichever ends sooner. To share the rows of one input every rank must factor its Hessian.
    """
    return min(_by_inputs(stage, ranks), _by_rows(stage, ranks), key=lambda shares: _longest(stage, shares, ranks))


def _by_inputs(stage: Stage, ranks: Ranks) -> dict[str, Share]:
    owners = _balanced([_cost(group.values()) for group in stage], ranks)
    return {
        name: ranks.whole(matrix.rows, owner)
        for group, owner in zip(stage, owners, strict=True)
        for name, matrix in group.items()
    }


def _by_rows(stage: Stage, ranks: Ranks) -> dict[str, Share]:
    matrices = {name: matrix for group in stage for name, matrix in group.items()}
    bound = {name: matrix for name, matrix in matrices.items() if not matrix.by_rows}
    owners = dict(zip(bound, _balanced([_cost([matrix]) for matrix in bound.values()], ranks), strict=True))
    return {
        name: ranks.whole(matrix.rows, owners[name]) if name in owners else ranks.split(matrix.rows)
        for name, matrix in matrices.items()
    }


def _balanced(costs: Sequence[int], ranks: Ranks) -> list[int]:
    """A rank for each piece of work, the dearest first, each to the rank that has least to do."""
    loads, owners = [0] * ranks.world, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        owners[piece] = loads.index(min(loads))
        loads[owners[piece]] += costs[piece]
    return owners


def _longest(stage: Stage, shares: Mapping[str, Share], ranks: Ranks) -> int:
    """The cost of the rank that has most to do."""
    return max(
        sum(
            _cost(
                matrix._replace(rows=rows)
                for name, matrix in group.items()
                if (rows := shares[name].parts[rank].stop - shares[name].parts[rank].start)
            )
            for group in stage
        )
        for rank in range(ranks.world)
    )


def _cost(matrices: Iterable[Matrix]) -> int:
    """Of matrices that share an input: a factor costs about what as many rows cost as there are columns."""
    found = list(matrices)
    return sum(matrix.rows * matrix.columns**2 for matrix in found) + max((m.columns**3 for m in found), default=0)
