"""From saliency to masks: True = kept, exact counts, and among equal saliencies the earlier weight is kept.

`kept_by_sorting` says what that means. Counts and ties leave no choice, so every other way here is a shortcut to the
same mask that takes less time than a sort.

Dimension key: R out_features, C in_features, G groups, M inputs of one group, X groups side by side, P pairs of inputs.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import hardshrink

from sparsegpt.sparsity import NM, Sparsity
from sparsegpt.strips import transposed

# Up to this n the n-th largest of a group is found by maxima and minima, which take n steps a member.
EXTREMES_LIMIT = 8
# Up to this group size every pair is compared at once; the table of pairs grows with the square of it.
PAIRWISE_LIMIT = 16
# Values sorted to narrow the search for a threshold.
SAMPLE = 4096
# Values that stand for a whole layer where its threshold need not be exact.
ROUGH_SAMPLE = 32768


def kept_by_sorting(saliency: Tensor, keep: int, dim: int) -> Tensor:
    """[..., M, ...] -> bool of the same shape, True = kept: the `keep` largest along `dim`, of equals the earlier."""
    order = saliency.argsort(dim=dim, descending=True, stable=True)
    return torch.zeros_like(saliency, dtype=torch.bool).scatter_(dim, order.narrow(dim, 0, keep), True)


def layer_mask(saliency: Tensor, pattern: Sparsity) -> Tensor:
    """[R, C] -> bool [R, C], True = kept: n of every group of m, or the given fraction less of each row or the layer.

    C is divisible by m (`pattern.check`); a fraction of the weights is rounded to a whole number of them.
    """
    if isinstance(pattern, NM):
        return nm_mask(saliency, pattern)
    if pattern.per_row:
        return row_mask(saliency, round(pattern.fraction * saliency.shape[1]))
    return unstructured_mask(saliency, round(pattern.fraction * saliency.numel()))


def keeps_counts(mask: Tensor, pattern: Sparsity) -> bool:
    """bool [R, C] -> whether it keeps as many as the pattern says: in each group, in each row, or in the whole layer.

    A fraction of the layer may also be kept row by row.
    """
    if isinstance(pattern, NM):
        return bool((rearrange(mask, "r (g m) -> r g m", m=pattern.m).sum(-1) == pattern.n).all())
    columns = mask.shape[1]
    in_each_row = bool((mask.sum(1) == columns - round(pattern.fraction * columns)).all())
    if pattern.per_row or in_each_row:
        return in_each_row
    return int(mask.sum()) == mask.numel() - round(pattern.fraction * mask.numel())


def nm_mask(saliency: Tensor, pattern: NM) -> Tensor:
    """[R, C] -> bool [R, C], True = kept: the n most salient of every m consecutive columns. C is divisible by m.

    Where nothing is tied the n-th largest of a group, by maxima and minima of whole columns, tells the mask.
    """
    if pattern.n <= EXTREMES_LIMIT:
        mask_CR = _largest_and_ties(transposed(saliency), pattern).bool()
        if mask_CR.count_nonzero() * pattern.m == saliency.numel() * pattern.n:  # nothing tied
            return transposed(mask_CR)
    groups = rearrange(saliency, "r (g m) -> r g m", m=pattern.m)
    return rearrange(kept_by_sorting(groups, pattern.n, -1), "r g m -> r (g m)")


def group_mask(saliency_MX: Tensor, n: int) -> Tensor:
    """[M, X] -> bool [M, X], True = kept: the n most salient of the M members of each group X.

    With few members a comparison for every pair is less work than a sort.
    """
    if saliency_MX.shape[0] <= PAIRWISE_LIMIT:
        return _ranks_by_pairs(saliency_MX) < n
    return kept_by_sorting(saliency_MX, n, 0)


def row_mask(saliency: Tensor, zeros: int) -> Tensor:
    """[R, C] -> bool [R, C], True = kept: every row without its `zeros` least salient elements; 0 <= zeros <= C.

    One threshold a row is selected, not all of it sorted; of those equal to it the earlier are kept.
    """
    if zeros <= 0:
        return torch.ones_like(saliency, dtype=torch.bool)
    threshold_R1 = saliency.kthvalue(zeros, dim=1, keepdim=True).values
    mask = saliency > threshold_R1
    ties_kept_R1 = saliency.shape[1] - zeros - mask.sum(1, keepdim=True)
    if ties_kept_R1.any():
        ties = saliency == threshold_R1
        mask |= ties & (ties.cumsum(1) <= ties_kept_R1)
    return mask


def unstructured_mask(saliency: Tensor, zeros: int) -> Tensor:
    """[...] -> bool [...], True = kept: all but exactly `zeros` elements, the least salient of the whole tensor.

    A threshold is selected, on a CPU among the few values that can be it.
    """
    if zeros <= 0:
        return torch.ones_like(saliency, dtype=torch.bool)
    if zeros >= saliency.numel():
        return torch.zeros_like(saliency, dtype=torch.bool)
    flat = saliency.flatten()
    mask = None
    if not flat.is_cuda and flat.numel() >= 16 * SAMPLE:
        mask = _without_smallest_by_sample(flat, zeros)
    return (_without_smallest(flat, zeros) if mask is None else mask).view_as(saliency)


def _without_smallest(flat: Tensor, zeros: int) -> Tensor:
    """[C] -> bool [C] without the `zeros` smallest; 0 < zeros < C."""
    threshold = flat.kthvalue(zeros).values
    mask = flat > threshold
    ties_kept = flat.numel() - zeros - int(mask.count_nonzero())
    if ties_kept > 0:
        mask[(flat == threshold).nonzero()[:ties_kept, 0]] = True
    return mask


def _without_smallest_by_sample(flat: Tensor, zeros: int) -> Tensor | None:
    """`_without_smallest` that looks only at values around a sorted sample's threshold.

    None where these turn out not to hold the threshold, or to be most of the values (ties).
    """
    sample = flat[:: flat.numel() // SAMPLE | 1].sort().values  # odd: an even stride could meet few of the columns
    rank, margin = zeros * len(sample) // flat.numel(), 2 * math.isqrt(len(sample))  # at least 4 deviations
    low, high = sample[max(0, rank - margin)], sample[min(len(sample) - 1, rank + margin)]
    at_most_high = flat <= high
    candidates = (at_most_high & (flat >= low)).nonzero()[:, 0]
    below = int(at_most_high.count_nonzero()) - len(candidates)
    if not below <= zeros <= below + len(candidates) or 2 * len(candidates) > flat.numel():
        return None
    mask = at_most_high.logical_not_()
    mask[candidates] = unstructured_mask(flat[candidates], zeros - below)
    return mask


def _ranks_by_pairs(saliency_MX: Tensor) -> Tensor:
    """[M, X] -> each member's rank [M, X] in its group: how many are larger, or equal and earlier."""
    m = saliency_MX.shape[0]
    tally_MP, offset_M1 = _pair_tables(m, saliency_MX.device)
    later_wins_PX = saliency_MX.new_empty(tally_MP.shape[1], *saliency_MX.shape[1:], dtype=torch.float32)
    done = 0
    for distance in range(1, m):
        pairs = slice(done, done := done + m - distance)
        torch.gt(saliency_MX[distance:], saliency_MX[:-distance], out=later_wins_PX[pairs])
    # Small whole numbers: the product is exact in float32.
    return torch.addmm(offset_M1, tally_MP, later_wins_PX)


@functools.cache
def _pair_tables(m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """tally [M, P] and offset [M, 1] of rank = offset + tally @ later_wins [P, X], pairs ordered by distance.

    Were all equal, a member's rank would be its index. A later one that is larger moves up, the earlier one down.
    """
    pairs = [(first, first + distance) for distance in range(1, m) for first in range(m - distance)]
    tally_MP = torch.zeros(m, len(pairs))
    for pair, (earlier, later) in enumerate(pairs):
        tally_MP[earlier, pair], tally_MP[later, pair] = 1, -1
    offset_M1 = torch.arange(m, device=device, dtype=torch.float32)[:, None]
    return tally_MP.to(device), offset_M1


def rough_projection(weights: Sequence[Tensor], pattern: Sparsity) -> Callable[[Tensor], Tensor]:
    """Parts [C, R] of a layer's weights -> a function that zeroes all but the largest weights of any of them.

    For a step of a search: quicker than `layer_mask`, and the counts may be off a bit. Equal magnitudes are kept
    together, and the threshold of a fraction of the layer comes from a sample.
    """
    if isinstance(pattern, NM) and pattern.n <= EXTREMES_LIMIT:
        return lambda part: _largest_and_ties(part.abs(), pattern).mul_(part)
    if isinstance(pattern, NM) or pattern.per_row:
        return lambda part: layer_mask(part.abs().T, pattern).T.to(part.dtype).mul_(part)
    stride = sum(part.numel() for part in weights) // ROUGH_SAMPLE | 1
    while any(math.gcd(stride, part.shape[1]) > 1 for part in weights):
        stride += 2  # with a factor in common it would meet some of the rows alone
    sample = torch.cat([part.flatten()[::stride] for part in weights]).abs()
    zeros = round(pattern.fraction * len(sample))
    if not zeros:
        return torch.clone
    return functools.partial(hardshrink, lambd=float(sample.kthvalue(zeros).values))


def _largest_and_ties(saliency: Tensor, pattern: NM) -> Tensor:
    """[C, R] -> [C, R] in its own memory: 1 where one of its group's n largest, or an equal of them, is, else 0."""
    saliency_GMR = rearrange(saliency, "(g m) r -> g m r", m=pattern.m)
    saliency_GMR.ge_(_nth_largest(saliency_GMR.unbind(1), pattern.n)[:, None])
    return saliency


def _nth_largest(members: Sequence[Tensor], n: int) -> Tensor:
    """Members [G, R] -> the n-th largest of them [G, R], element by element."""
    largest: list[Tensor] = []  # in falling order
    for member in members:
        rest = member
        for rank, value in enumerate(largest):
            largest[rank], rest = torch.maximum(value, rest), torch.minimum(value, rest)
        if len(largest) < n:
            largest.append(rest)
    return largest[-1]
