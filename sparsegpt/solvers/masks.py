"""From saliency to masks: True = kept, exact counts, and among equal saliencies the earlier weight is kept.

Dimension key: R out_features, C in_features, G groups, M inputs of one group, P pairs of these.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import hardshrink

from sparsegpt.solvers.strips import transposed
from sparsegpt.sparsity import NM, Sparsity

# Up to this group size every pair is compared at once; above it the table of pairs costs more than a sort.
PAIRWISE_LIMIT = 16
# Values sorted to narrow the search for a threshold.
SAMPLE = 4096
# Values that stand for a whole layer where its threshold need not be exact.
ROUGH_SAMPLE = 32768
# Up to this n the n-th largest of a group is found by running minima and maxima.
ROUGH_LIMIT = 8


def nm_mask(saliency: Tensor, pattern: NM) -> Tensor:
    """Keep the n most salient of every m consecutive columns.

    saliency: [R, C] with C divisible by m. Returns a bool mask [R, C] with exactly n True in every group.
    """
    if pattern.n <= ROUGH_LIMIT:
        mask_CR = _keep_largest(transposed(saliency), pattern).bool()
        if mask_CR.count_nonzero() * pattern.m == saliency.numel() * pattern.n:  # nothing tied
            return transposed(mask_CR)
    columns = saliency.shape[1] // pattern.m
    mask_MX = group_mask(rearrange(saliency, "r (g m) -> m (r g)", m=pattern.m), pattern.n)
    return rearrange(mask_MX, "m (r g) -> r (g m)", g=columns)


def group_mask(saliency_MX: Tensor, n: int) -> Tensor:
    """Keep the n most salient of the M members of each group; groups X lie side by side: [M, X] -> bool [M, X]."""
    m = saliency_MX.shape[0]
    if m <= PAIRWISE_LIMIT:
        return _ranks_by_pairs(saliency_MX) < n
    order_MX = saliency_MX.argsort(dim=0, descending=True, stable=True)
    return torch.zeros_like(saliency_MX, dtype=torch.bool).scatter_(0, order_MX[:n], True)


def _ranks_by_pairs(saliency_MX: Tensor) -> Tensor:
    """Rank of each member: how many are larger, or equal and earlier. One comparison a pair, summed by a product."""
    m = saliency_MX.shape[0]
    tally_MP, offset_M1 = _pair_tables(m, saliency_MX.device)
    later_wins_PX = saliency_MX.new_empty(tally_MP.shape[1], *saliency_MX.shape[1:], dtype=torch.float32)
    done = 0
    for distance in range(1, m):
        pairs = slice(done, done := done + m - distance)
        torch.gt(saliency_MX[distance:], saliency_MX[:-distance], out=later_wins_PX[pairs])
    return torch.addmm(offset_M1, tally_MP, later_wins_PX)


@functools.cache
def _pair_tables(m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """rank = offset + tally @ later_wins, pairs ordered by distance: the loser of a pair moves one rank down."""
    pairs = [(first, first + distance) for distance in range(1, m) for first in range(m - distance)]
    tally_MP = torch.zeros(m, len(pairs))
    for place, (earlier, later) in enumerate(pairs):
        tally_MP[earlier, place], tally_MP[later, place] = 1, -1
    offset_M1 = torch.arange(m, device=device, dtype=torch.float32)[:, None]
    return tally_MP.to(device), offset_M1


def unstructured_mask(saliency: Tensor, zeros: int) -> Tensor:
    """Drop exactly `zeros` elements, the least salient of the whole tensor; any shape."""
    if zeros <= 0:
        return torch.ones_like(saliency, dtype=torch.bool)
    if zeros >= saliency.numel():
        return torch.zeros_like(saliency, dtype=torch.bool)
    return _without_smallest(saliency.flatten(), zeros).view_as(saliency)


def _without_smallest(flat: Tensor, zeros: int) -> Tensor:
    """Mask of a 1-D tensor without its `zeros` smallest values.

    On a CPU a sorted sample first narrows a large search to a few per cent of the values; when they turn out not to
    hold the answer, or to be most of the values (ties), the search is done over all.
    """
    if not flat.is_cuda and flat.numel() >= 16 * SAMPLE:
        sample = flat[:: flat.numel() // SAMPLE | 1].sort().values  # odd: an even stride could meet few of the columns
        place, margin = zeros * len(sample) // flat.numel(), 2 * math.isqrt(len(sample))  # at least 4 deviations
        low, high = sample[max(0, place - margin)], sample[min(len(sample) - 1, place + margin)]
        at_most_high = flat <= high
        places = (at_most_high & (flat >= low)).nonzero()[:, 0]
        below = int(at_most_high.count_nonzero()) - len(places)
        if below <= zeros <= below + len(places) and 2 * len(places) <= flat.numel():
            mask = at_most_high.logical_not_()
            mask[places] = unstructured_mask(flat[places], zeros - below)
            return mask
    threshold = flat.kthvalue(zeros).values
    mask = flat > threshold
    ties_kept = flat.numel() - zeros - int(mask.count_nonzero())
    if ties_kept > 0:
        mask[(flat == threshold).nonzero()[:ties_kept, 0]] = True
    return mask


def row_mask(saliency: Tensor, zeros: int) -> Tensor:
    """Drop exactly `zeros` elements, the least salient of their row, from every row of saliency [R, C]."""
    if zeros <= 0:
        return torch.ones_like(saliency, dtype=torch.bool)
    threshold_R1 = saliency.kthvalue(zeros, dim=1, keepdim=True).values
    mask = saliency > threshold_R1
    ties_kept_R1 = saliency.shape[1] - zeros - mask.sum(1, keepdim=True)
    if ties_kept_R1.any():
        ties = saliency == threshold_R1
        mask |= ties & (ties.cumsum(1) <= ties_kept_R1)
    return mask


def layer_mask(saliency: Tensor, pattern: Sparsity) -> Tensor:
    """Mask of a whole layer: n:m groups, or the given fraction of the layer or of each row. saliency [R, C]."""
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


def rough_projection(weights: Sequence[Tensor], pattern: Sparsity) -> Callable[[Tensor], Tensor]:
    """What zeroes all but the largest weights in a step of a search: a function from some of them, [C, R], to these.

    weights: all parts of a layer, [C, R] each. Quicker than `layer_mask`, and the counts may be off a bit: equal
    magnitudes are kept together, and the threshold of a fraction of the layer comes from a sample.
    """
    if isinstance(pattern, NM) and pattern.n <= ROUGH_LIMIT:
        return lambda part: _keep_largest(part.abs(), pattern).mul_(part)
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


def _keep_largest(saliency: Tensor, pattern: NM) -> Tensor:
    """Saliencies that lie as [C, R] to 1 where one of the n largest of its group is, else 0, in their own memory.

    Equal ones are kept together. n is at most ROUGH_LIMIT.
    """
    saliency_GMR = rearrange(saliency, "(g m) r -> g m r", m=pattern.m)
    saliency_GMR.ge_(_nth_largest(saliency_GMR.unbind(1), pattern.n)[:, None])
    return saliency


def _nth_largest(members: Sequence[Tensor], n: int) -> Tensor:
    """The n-th largest of all members, element by element."""
    largest: list[Tensor] = []
    for member in members:
        rest = member
        for place, value in enumerate(largest):
            largest[place], rest = torch.maximum(value, rest), torch.minimum(value, rest)
        if len(largest) < n:
            largest.append(rest)
    return largest[-1]
