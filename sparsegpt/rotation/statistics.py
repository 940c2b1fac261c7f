"""What is gathered, in a block, of the tensors that say how much each weight matters.

Dimension key: C features of a watched tensor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsegpt.solvers.hessian import DampedHessian, HessianAccumulator, check_finite

# Share of the mean diagonal added to a Hessian.
DAMPING = 0.01


class Watched(NamedTuple):
    """A tensor [..., C] to watch. width: C; whole: whether its Hessian is wanted, or the diagonal alone."""

    width: int
    whole: bool


class SquareSums:
    """Running diagonal [C] of the Hessian sum x x^T, of inputs [..., C]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.squares, self.tokens = torch.zeros(width, device=device), 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs of any float dtype."""
        x_TC = inputs.flatten(0, -2)
        self.squares += x_TC.float().square().sum(0)
        self.tokens += len(x_TC)

    def over(self, total: Callable[[Tensor], Tensor]) -> None:
        """Become the sum of what several have gathered. total: [...] -> the sum of theirs, in the same memory."""
        self.squares = total(self.squares)
        self.tokens = int(total(torch.tensor(self.tokens)))


@dataclass(frozen=True)
class Statistics:
    """The sums over the tensors watched in a block. prefix: of the block's names."""

    prefix: str
    sums: dict[str, HessianAccumulator | SquareSums]

    @classmethod
    def of(cls, prefix: str, watched: Mapping[str, Watched], device: torch.device) -> "Statistics":
        """Sums in which nothing is yet, for a block on this device."""
        kinds = {True: HessianAccumulator, False: SquareSums}
        return cls(prefix, {name: kinds[one.whole](one.width, device) for name, one in watched.items()})

    def see(self, name: str, tensor: Tensor) -> None:
        """Take up a watched tensor [..., C]."""
        self.sums[name].add(tensor)

    def has(self, name: str) -> bool:
        """Whether anything was seen of a tensor."""
        return name in self.sums and self.sums[name].tokens > 0

    def inverse(self, name: str) -> Tensor:
        """[C, C]: (H + damping)^-1. Raises SparseGPTError for activations that are not finite."""
        gram = self.sums[name]
        assert isinstance(gram, HessianAccumulator)
        hessian = DampedHessian(gram.take(), DAMPING, name=self.prefix + name.removesuffix("()"))
        return hessian.inverse_factor.T @ hessian.inverse_factor

    def scale(self, name: str) -> Tensor:
        """[C]: diag H + damping. Raises SparseGPTError for activations that are not finite."""
        sums = self.sums[name]
        assert isinstance(sums, SquareSums)
        check_finite(sums.squares, self.prefix + name)
        return sums.squares + DAMPING * sums.squares.mean()
