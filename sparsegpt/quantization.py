"""Weights on a grid of integers (grid.py): which scales fit a weight, and the way to integers and back.

    w' = s d,   d an integer,   one scale s for `group_size` consecutive inputs of a row

On a symmetric grid of b bits d lies in [-2^(b-1), 2^(b-1) - 1], and s has either sign: the end that reaches further is
where the larger weights are (Cheng et al. 2023, arXiv:2309.05516). At 8 bits, where it hardly counts, -128 is left out.
Otherwise a group has a zero point z from 0 to 2^b - 1 and d lies in [-z, 2^b - 1 - z]. In files q = d + z, with 2^(b-1)
for z where symmetric. Scales are numbers that float16 and bfloat16 both hold, so every file format keeps them to the
bit, and s d is exact in float32.

Dimension key: R out_features, C in_features, G groups of a row, K inputs of a group.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from sparsegpt.errors import SparseGPTError
from sparsegpt.grid import Grid
from sparsegpt.strips import strips

# Clip search: the shares of the largest weight that are tried as the end of the grid. On 14 layers of a 15M-parameter
# Llama at 2:4, once scales are fitted anew on the integers, six finer shares leave 0.1% less.
SHRINK = (1.0, 0.9, 0.8, 0.7)
# Weights whose scales are searched at once: the steps then stay in a core's cache.
_SEARCHED = 1 << 16
# From here on both float16 and bfloat16 have 8 bits of every scale; smaller weights are nothing to any model.
LEAST_SCALE = 2.0**-17
LARGEST_SCALE = torch.finfo(torch.float16).max
# Neighbours of a scale, in its last bits, that rounding of the weights may have hidden.
_NUDGES = (0, 1, -1, 2, -2)


class Scales(NamedTuple):
    """Of a weight [R, C]: scales [R, G] and zero points [R, G], both float32; no zero points on a symmetric grid."""

    grid: Grid
    scale: Tensor
    zero: Tensor | None = None

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The least and the largest step of each group, [R, G] each."""
        if self.zero is None:
            return torch.full_like(self.scale, self.grid.least), torch.full_like(self.scale, self.grid.most)
        return -self.zero, self.grid.most - self.zero

    def per_weight(self, columns: int) -> Tensor:
        """The scale of each weight, [R, C], for C = `columns`."""
        return self.scale.repeat_interleave(self.grid.width(columns), 1)[:, :columns]


class Integers(NamedTuple):
    """A weight [R, C] on a grid: its steps d [R, C], int16, and the scales that they count."""

    steps: Tensor
    scales: Scales

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight s d [R, C], exact in float32, rounded once to other dtypes."""
        return (self.steps * self.scales.per_weight(self.steps.shape[1])).to(dtype)


def representable(scale: Tensor) -> Tensor:
    """Scales [...] -> the nearest that float16 and bfloat16 both hold, float32 [...]; inf beyond float16."""
    # A number of float16 rounded to the 8 bits of bfloat16 is one of float16 still.
    return scale.float().abs().clamp_min(LEAST_SCALE).half().bfloat16().float().copysign(scale)


def search_scales(
    weight: Tensor, grid: Grid, *, importance: Tensor | None = None, clip: bool = True, name: str = "weight"
) -> Scales:
    """Weight [R, C] -> Scales: the end of the grid at the largest weight of a group or, with `clip`, a bit below.

    clip: of the ends SHRINK times that far the one is taken whose sum of importance (w - w')^2 is least.
    importance: [C], such as the mean squares of the inputs; None: all alike.
    Raises SparseGPTError, with the layer's name, where a scale is beyond float16.
    """
    weight_C = weight.new_ones(weight.shape[1]) if importance is None else importance
    weight_GK = grouped(weight_C.float()[None], grid)[0]
    rows_at_once = max(1, _SEARCHED // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    parts = [
        _search(grouped(weight[rows].float(), grid), weight_GK, grid, SHRINK if clip else ())
        for rows in strips(len(weight), rows_at_once)
    ]
    zero = None if grid.symmetric else torch.cat([part.zero for part in parts if part.zero is not None])
    found = Scales(grid, torch.cat([part.scale for part in parts]), zero)
    if not bool(torch.isfinite(found.scale).all()):
        raise SparseGPTError(
            f"{name}: a scale of {grid} is beyond float16, as weights lie above {grid.most * LARGEST_SCALE:.3g}: leave "
            "the layer out, or give more bits",
            settings=("skip", "quantize"),
        )
    return found


def encode(weight: Tensor, scales: Scales) -> Integers:
    """Weight [R, C] -> the nearest Integers on the grid of these scales."""
    steps_RGK = _rounded(grouped(weight.float(), scales.grid), scales)
    return Integers(_joined(steps_RGK, weight.shape[1]).to(torch.int16), scales)


def recover(weight: Tensor, grid: Grid, name: str = "weight") -> Integers:
    """Weight [R, C] of decoded numbers, in the dtype they were rounded to -> Integers that decode to its very bits.

    A group whose largest weight is k steps away from 0 has this weight over k as its scale, but for a rounding: so all
    k, and the neighbours that rounding may have hidden, are tried until all weights of the group come out to the bit.
    Where a symmetric grid's steps then reach one too far upwards, scale and steps change their signs.
    Where several grids give the same numbers (all steps even, say) any of them may be returned.
    Raises SparseGPTError, with the layer's name, where a group is on no such grid.
    """
    values_NK = rearrange(grouped(weight.detach(), grid), "r g k -> (r g) k")
    largest_N = values_NK.float().abs().amax(1)
    scale_N, steps_NK = torch.full_like(largest_N, LEAST_SCALE), torch.zeros_like(values_NK, dtype=torch.int16)
    left = largest_N.nonzero()[:, 0]
    counts = range(max(grid.most, -grid.least), 0, -1)
    tries_T2 = torch.cartesian_prod(torch.tensor(counts), torch.tensor(_NUDGES)).to(weight.device)
    for part in strips(len(tries_T2), max(1, _SEARCHED // max(1, values_NK.numel()))):
        if not len(left):
            break
        count_T, nudge_T = tries_T2[part].unbind(1)
        part_NK = values_NK[left]
        tried_TN = _nudged(representable(largest_N[left] / count_T[:, None]), nudge_T[:, None].to(torch.int16))
        found_TNK = (part_NK.float() / tried_TN[..., None]).round_()
        exact_TN = ((found_TNK * tried_TN[..., None]).to(weight.dtype) == part_NK).all(-1) & _fits(found_TNK, grid)
        exact_N, first_N = exact_TN.any(0), exact_TN.to(torch.uint8).argmax(0)
        done, chosen = left[exact_N], (first_N[exact_N], exact_N.nonzero()[:, 0])
        scale_N[done], steps_NK[done] = tried_TN[chosen], found_TNK[chosen].to(torch.int16)
        left = left[~exact_N]
    if len(left):
        raise SparseGPTError(
            f"{name}: {len(left)} of {len(largest_N)} groups are not on a grid {grid}: the weights were changed after "
            "they were rounded"
        )
    if grid.symmetric:
        turned_N = torch.where(steps_NK.amax(1) > grid.most, -1, 1)
        scale_N *= turned_N
        steps_NK *= turned_N[:, None]
    steps_RGK = rearrange(steps_NK, "(r g) k -> r g k", r=len(weight))
    zero = None if grid.symmetric else -steps_RGK.amin(-1).clamp_max(0).float()
    scales = Scales(grid, scale_N.view(len(weight), -1), zero)
    return Integers(_joined(steps_RGK, weight.shape[1]), scales)


def grouped(matrix: Tensor, grid: Grid) -> Tensor:
    """[R, C] -> [R, G, K], zeros after the last column."""
    width = grid.width(matrix.shape[1])
    return rearrange(pad(matrix, (0, -matrix.shape[1] % width)), "r (g k) -> r g k", k=width)


def _joined(groups_RGK: Tensor, columns: int) -> Tensor:
    return rearrange(groups_RGK, "r g k -> r (g k)")[:, :columns].contiguous()


def _search(groups_RGK: Tensor, weight_GK: Tensor, grid: Grid, shares: Sequence[float]) -> Scales:
    """The best scales of those whose grids reach to these shares of the largest weights; to all of it without any."""
    high_RG, low_RG = groups_RGK.amax(-1), groups_RGK.amin(-1)
    found, least_RG = _ends_at(high_RG, low_RG, grid), torch.full_like(high_RG, torch.inf)
    for share in shares:
        tried = _ends_at(high_RG * share, low_RG * share, grid)
        error_RGK = _rounded(groups_RGK, tried).mul_(tried.scale[..., None]).sub_(groups_RGK).square_()
        error_RG = torch.einsum("rgk,gk->rg", error_RGK, weight_GK)
        better_RG = error_RG < least_RG
        least_RG = torch.where(better_RG, error_RG, least_RG)
        found = _either(better_RG, tried, found)
    return found


def _ends_at(high_RG: Tensor, low_RG: Tensor, grid: Grid) -> Scales:
    """Scales of grids that reach from `low` to `high`, and hold 0."""
    high_RG, low_RG = high_RG.clamp_min(0), low_RG.clamp_max(0)
    if grid.symmetric:
        upright_RG = torch.maximum(high_RG / grid.most, low_RG / grid.least)
        turned_RG = torch.maximum(high_RG / -grid.least, low_RG / -grid.most)
        return Scales(grid, representable(torch.where(upright_RG <= turned_RG, upright_RG, -turned_RG)))
    scale_RG = representable((high_RG - low_RG) / grid.most)
    return Scales(grid, scale_RG, (-low_RG / scale_RG).round_().clamp_(0, grid.most))


def _rounded(groups_RGK: Tensor, scales: Scales) -> Tensor:
    """The nearest step of each weight."""
    steps_RGK = (groups_RGK / scales.scale[..., None]).round_()
    if scales.zero is None:
        return steps_RGK.clamp_(scales.grid.least, scales.grid.most)
    least_RG, most_RG = scales.bounds
    return steps_RGK.clamp_(least_RG[..., None], most_RG[..., None])


def _either(first_RG: Tensor, one: Scales, other: Scales) -> Scales:
    """One where `first`, else the other."""
    scale = torch.where(first_RG, one.scale, other.scale)
    if one.zero is None or other.zero is None:
        return Scales(one.grid, scale)
    return Scales(one.grid, scale, torch.where(first_RG, one.zero, other.zero))


def _nudged(scale_N: Tensor, units: Tensor) -> Tensor:
    """Scales moved by so many units of bfloat16's last place."""
    return representable((scale_N.bfloat16().view(torch.int16) + units).view(torch.bfloat16).float())


def _fits(steps_NK: Tensor, grid: Grid) -> Tensor:
    """[..., N, K] -> whether a group's steps lie on one grid, bool [..., N]."""
    if grid.symmetric:
        # Either end may reach further, as the scale has either sign.
        return torch.minimum(steps_NK.amax(-1), -steps_NK.amin(-1)) <= grid.most
    return steps_NK.amax(-1).clamp_min(0) - steps_NK.amin(-1).clamp_max(0) <= grid.most
