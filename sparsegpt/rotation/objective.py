"""What a pattern drops, as a function of the basis that a weight is written in.

Removing the single weight w_ij costs w_ij^2 / (H^-1)_jj (OBS; Hassibi & Stork 1993). In the basis R of its inputs this
is (W R)_ij^2 / (R^T H^-1 R)_jj. In a basis of its outputs it is (R^T W)_ij^2 times what column j costs; there the
cheaper H_jj stands for 1 / (H^-1)_jj, as in Wanda. A row's loss is the share of these that falls to the weights which
the pattern takes from it; a term is the mean over rows.

Every term takes a number of lines (rows, or columns where the basis turns rows) that are drawn anew at every call; None
for all of them.
Dimension key: R out_features, C in_features, G key-value heads, F values of a head, H heads a key-value head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsegpt.solvers.masks import layer_mask
from sparsegpt.sparsity import NM, Sparsity, Unstructured


def dropped_share(saliency_RC: Tensor, pattern: Sparsity) -> Tensor:
    """[R, C] -> mean over rows of the share of a row's saliency that falls to the weights it loses, a scalar.

    A fraction takes its share from every row alike. C is divisible by m of n:m.
    """
    by_row = pattern if isinstance(pattern, NM) else Unstructured(pattern.zeros, per_row=True)
    with torch.no_grad():
        kept_RC = layer_mask(saliency_RC, by_row)
    sums_R = saliency_RC.sum(1)
    return (saliency_RC.masked_fill(kept_RC, 0).sum(1) / sums_R.clamp_min(torch.finfo(sums_R.dtype).tiny)).mean()


@dataclass(frozen=True)
class InputTerm:
    """Weights [R, C] of linears that share their inputs, which are written in a basis [C, C].

    inverse: [C, C], (H + damping)^-1 of these inputs.
    """

    weights: tuple[Tensor, ...]
    patterns: tuple[Sparsity, ...]
    inverse: Tensor

    def losses(self, basis_CC: Tensor, lines: int | None, generator: torch.Generator) -> list[Tensor]:
        """The mean share that a row of each weight loses, scalars."""
        scale_C = ((self.inverse @ basis_CC) * basis_CC).sum(0)
        drawn = [weight_RC[some(len(weight_RC), lines, generator)] for weight_RC in self.weights]
        turned = (torch.cat(drawn) @ basis_CC).square() / scale_C
        parts = turned.split([len(weight_RC) for weight_RC in drawn])
        return [dropped_share(part, pattern) for part, pattern in zip(parts, self.patterns, strict=True)]


@dataclass(frozen=True)
class OutputTerm:
    """A weight [R, C] whose outputs are written in a basis [R, R]. scale: [C], what an input's squared weight costs."""

    weight: Tensor
    scale: Tensor
    pattern: Sparsity

    def losses(self, basis_RR: Tensor, lines: int | None, generator: torch.Generator) -> list[Tensor]:
        """The mean share that a row loses, a scalar."""
        columns = some(self.weight.shape[1], lines, generator, group_of(self.pattern))
        return [dropped_share((basis_RR.T @ self.weight[:, columns]).square() * self.scale[columns], self.pattern)]


@dataclass(frozen=True)
class HeadsTerm:
    """A weight [R, G, H, F] that reads values written in bases [G, F, F].

    inverse: [G, H, F, F], what of the inverse Hessian of its inputs lies within the heads.
    """

    weight: Tensor
    inverse: Tensor
    pattern: Sparsity

    def losses(self, basis_GFF: Tensor, lines: int | None, generator: torch.Generator) -> list[Tensor]:
        """The mean share that a row loses, a scalar."""
        weight_RGHF = self.weight[some(len(self.weight), lines, generator)]
        turned_RGHF = torch.einsum("rghf,gfe->rghe", weight_RGHF, basis_GFF)
        scale_GHF = torch.einsum("ghfk,gfe,gke->ghe", self.inverse, basis_GFF, basis_GFF)
        return [dropped_share((turned_RGHF.square() / scale_GHF).flatten(1), self.pattern)]


@dataclass(frozen=True)
class ValuesTerm:
    """A weight [G, F, C] that makes values written in bases [G, F, F]; scale as in OutputTerm."""

    weight: Tensor
    scale: Tensor
    pattern: Sparsity

    def losses(self, basis_GFF: Tensor, lines: int | None, generator: torch.Generator) -> list[Tensor]:
        """The mean share that a row loses, a scalar."""
        columns = some(self.weight.shape[2], lines, generator, group_of(self.pattern))
        turned_GFC = torch.einsum("gfe,gfc->gec", basis_GFF, self.weight[:, :, columns])
        return [dropped_share(turned_GFC.flatten(0, 1).square() * self.scale[columns], self.pattern)]


Term = InputTerm | OutputTerm | HeadsTerm | ValuesTerm


def group_of(pattern: Sparsity) -> int:
    """Columns that stay together when some are drawn."""
    return pattern.m if isinstance(pattern, NM) else 1


def some(count: int, lines: int | None, generator: torch.Generator, group: int = 1) -> Tensor | slice:
    """Indices of about `lines` of `count` lines, drawn in groups of neighbours; all of them where that is no more."""
    if lines is None or count <= lines:
        return slice(None)
    first = torch.randperm(count // group, generator=generator)[: max(1, lines // group)]
    return (first[:, None] * group + torch.arange(group)).flatten()
