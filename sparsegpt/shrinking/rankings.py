"""Which groups of columns leave a projection: RANKINGS, one row a way to choose, each a `Method` of the driver.

While a block is at work, what leaves is zero and still there. So the driver's streams, Hessians and corrections work
on it as on any other sparsity.
Dimension key: R out_features, C in_features, G groups.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsegpt.shrinking.settings import UPDATES
from sparsegpt.shrinking.surgeon import choose_groups, refit_columns
from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.solvers.methods import Method
from sparsegpt.sparsity import Sparsity, Unstructured


@dataclass(frozen=True)
class Columns(Unstructured):
    """Whole groups of `group` neighbouring input columns are zero: `removed` groups of a linear. See `of`."""

    group: int = 1
    removed: int = 0

    @classmethod
    def of(cls, width: int, group: int, removed: int) -> "Columns":
        """The pattern of a linear with `width` inputs."""
        return cls(removed * group / width, per_row=True, group=group, removed=removed)

    def __str__(self) -> str:
        return f"{self.removed} groups of {self.group} columns"


@dataclass(frozen=True)
class Question:
    """What a ranking is asked: weight [R, C], its Hessian, how wide a group is, how many leave.

    feeders: [G], sums of squares of the weights whose outputs feed each group. seed: of what is drawn.
    """

    weight: Tensor
    hessian: DampedHessian
    group: int
    remove: int
    feeders: Tensor
    seed: int = 0

    def of_groups(self, values: Tensor) -> Tensor:
        """[C] -> [G]: sums over the columns of each group."""
        found: Tensor = values.unflatten(0, (-1, self.group)).sum(-1)
        return found


Ranking = Callable[[Question], Tensor]


def _lowest(scores: Tensor, count: int) -> Tensor:
    return scores.argsort(stable=True)[:count]


def by_magnitude(question: Question) -> Tensor:
    """Question on [R, C] -> [remove]: the groups with the least sum of squares, what feeds them included."""
    squares_G = question.of_groups(question.weight.square().sum(0))
    return _lowest(squares_G + question.feeders.to(squares_G), question.remove)


def by_wanda(question: Question) -> Tensor:
    """Question on [R, C] -> [remove]: the least sums of |w_ij| ||x_j|| (Sun et al. 2023, arXiv:2306.11695)."""
    saliency_C = question.weight.abs().sum(0) * question.hessian.raw.diagonal().sqrt()
    return _lowest(question.of_groups(saliency_C), question.remove)


def at_random(question: Question) -> Tensor:
    """Question on [R, C] -> [remove]: any, drawn by the seed and the linear's name."""
    seed = question.seed + zlib.crc32(question.hessian.name.encode())
    groups = question.weight.shape[1] // question.group
    drawn = torch.randperm(groups, generator=torch.Generator().manual_seed(seed))[: question.remove]
    return drawn.to(question.weight.device)


def by_surgeon(question: Question) -> Tensor:
    """Question on [R, C] -> [remove]: by the exact loss of each group (surgeon.py)."""
    factor = question.hessian.inverse_factor
    return choose_groups(question.weight, factor.T @ factor, question.group, question.remove)


RANKINGS: dict[str, Ranking] = {
    "obs": by_surgeon,
    "magnitude": by_magnitude,
    "wanda": by_wanda,
    "random": at_random,
}


def structured(name: str, feeders: Tensor, seed: int = 0) -> Method:
    """[G] sums of squares of what feeds each group -> the method of RANKINGS of this name, for one linear."""
    return Method(
        name, solve=_Solve(RANKINGS[name], name in UPDATES, feeders, seed), updates_weights=name in UPDATES, whole=True
    )


@dataclass(frozen=True)
class _Solve:
    """The solve function of a method: see `Method`."""

    ranking: Ranking
    updates: bool
    feeders: Tensor = field(compare=False)
    seed: int = 0

    def __call__(
        self, weight: Tensor, hessian: DampedHessian, pattern: Sparsity, *, block_size: int
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(pattern, Columns)
        # Inputs that never fire cost nothing, whatever stands in for their diagonal.
        alive = weight.masked_fill(hessian.dead, 0) if self.updates else weight
        gone = self.ranking(Question(alive, hessian, pattern.group, pattern.removed, self.feeders, self.seed))
        kept_G = torch.ones(weight.shape[1] // pattern.group, dtype=torch.bool, device=weight.device)
        kept_G[gone] = False
        kept_C = kept_G.repeat_interleave(pattern.group)
        found = refit_columns(weight, hessian.damped, kept_C) if self.updates else weight.masked_fill(~kept_C, 0)
        return found, kept_C.expand_as(weight).clone()
