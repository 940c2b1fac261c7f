"""Integers of a few bits in 32-bit words, as quantised files keep them: one string of bits a row, the lowest first.

Dimension key: N rows, C numbers of a row, W words of a row.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from sparsegpt.strips import strips

# Rows packed at once: a number takes one 32-bit word a bit meanwhile.
ROWS = 256


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """Numbers [N, C] from 0 to 2^bits - 1 -> int32 [N, W], W = ceil(C bits / 32); number i begins at bit i bits."""
    return torch.cat([_pack_rows(numbers[rows], bits) for rows in strips(len(numbers), ROWS)])


def unpack_bits(words: Tensor, bits: int, columns: int) -> Tensor:
    """Words int32 [N, W] -> the numbers [N, C], int32, C = `columns`."""
    return torch.cat([_unpack_rows(words[rows], bits, columns) for rows in strips(len(words), ROWS)])


def _unpack_rows(words: Tensor, bits: int, columns: int) -> Tensor:
    each = words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    digits = rearrange(each, "n w d -> n (w d)")[:, : columns * bits].unflatten(1, (columns, bits))
    shifts = torch.arange(bits, dtype=torch.int32, device=words.device)
    numbers: Tensor = (digits << shifts).sum(-1, dtype=torch.int32)
    return numbers


def _pack_rows(numbers: Tensor, bits: int) -> Tensor:
    digits = numbers.to(torch.int32)[..., None] >> torch.arange(bits, dtype=torch.int32, device=numbers.device) & 1
    string = rearrange(digits, "n c b -> n (c b)")
    words = rearrange(pad(string, (0, -string.shape[1] % 32)), "n (w d) -> n w d", d=32)
    # Disjoint bits: the sum is their union, the topmost the sign.
    packed: Tensor = (words << torch.arange(32, dtype=torch.int32, device=numbers.device)).sum(-1, dtype=torch.int32)
    return packed
