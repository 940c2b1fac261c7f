"""The packed 2:4 format to and from its neighbours: torch's semi-structured tensors and the sparse-24-bitmask form.

CUTLASS (torch.sparse.SparseSemiStructuredTensorCUTLASS): the same values [N, K / 2]; metadata as int16 [N, K / 16] with
    rows reordered so that a tensor core's threads read whole words. Source of the order: torch
    `torch/sparse/_semi_structured_conversions.py` (CUTLASS `host_reorder.h`), restated here as one permutation:
        rows of 32 = (a=4, b=8), columns of 2 = c:   offset = ((c // 2) * N + row') * 2 + column'
        row' = 4 b + a;  the two middle corners of each 2 x 2 block then change places
bitmask (compressed-tensors "sparse-24-bitmask"): values [N, K / 2] and one bit a weight, uint8 [N, ceil(K / 8)],
    least significant bit first; always two bits set in each group.
Dimension key: N out_features, K in_features, G groups of four."""

from __future__ import annotations

import warnings

import torch
from einops import rearrange
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.pack import GROUP, Packed24, pack, words_to_nibbles


def to_cutlass(packed: Packed24) -> tuple[Tensor, Tensor]:
    """Values [N, K / 2] and reordered metadata int16 [N, K / 16], as torch's CUTLASS kernels take them.

    Raises SparseGPTError for dtypes other than float16 and bfloat16, N or K not divisible by 32.
    """
    rows, columns = packed.shape
    _check_cutlass(packed.values.dtype, rows, columns)
    meta = packed.meta.view(torch.int16)
    reordered = torch.empty_like(meta).flatten()
    reordered[_reordered_offsets(rows, columns // 16, meta.device)] = meta.flatten()
    return packed.values, reordered.view(rows, columns // 16)


def from_cutlass(values: Tensor, reordered: Tensor) -> Packed24:
    """Packed form of what `to_cutlass` or torch's own compression gave; the same refusals."""
    rows, columns = values.shape[0], 2 * values.shape[1]
    _check_cutlass(values.dtype, rows, columns)
    meta = reordered.flatten()[_reordered_offsets(rows, columns // 16, values.device)].view(rows, columns // 16)
    return Packed24(values.contiguous(), meta.view(torch.int32), (rows, columns))


def to_semi_structured(packed: Packed24) -> Tensor:
    """The weight as torch's CUTLASS semi-structured tensor subclass (its kernels need a GPU of Ampere or newer)."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    values, meta = to_cutlass(packed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch announces its prototype once; our dispatch says its own
        return SparseSemiStructuredTensorCUTLASS(
            torch.Size(packed.shape), values, meta, None, None, None, requires_grad=False
        )


def from_semi_structured(weight: Tensor) -> Packed24:
    """Packed form of a torch semi-structured tensor: exact for CUTLASS, through the dense weight for cuSPARSELt."""
    values, meta = getattr(weight, "packed", None), getattr(weight, "meta", None)
    if isinstance(values, Tensor) and isinstance(meta, Tensor):
        return from_cutlass(values, meta)
    return pack(weight.to_dense(), "semi-structured weight")


def to_bitmask(packed: Packed24) -> tuple[Tensor, Tensor]:
    """Values [N, K / 2] and bitmask uint8 [N, ceil(K / 8)] of the sparse-24-bitmask form."""
    columns = packed.shape[1]
    nibbles_NG = words_to_nibbles(packed.meta)
    one = torch.ones_like(nibbles_NG)
    bits_NG = (one << (nibbles_NG & 3)) | (one << (nibbles_NG >> 2))  # four bits a group
    even_NB, odd_NB = rearrange(bits_NG, "n (b two) -> two n b", two=2)
    bitmask = even_NB | odd_NB << 4
    if columns % 8:
        bitmask[:, columns // 8] &= 15  # the last byte describes one group only
    return packed.values[:, : columns // 2].contiguous(), bitmask[:, : -(-columns // 8)].contiguous()


def from_bitmask(values: Tensor, bitmask: Tensor, shape: tuple[int, int], name: str = "weight") -> Packed24:
    """Packed form of a sparse-24-bitmask pair for a dense weight of `shape`.

    Raises SparseGPTError naming the first group that does not have exactly two bits.
    """
    rows, columns = shape
    bits_NK = (bitmask[..., None] >> torch.arange(8, dtype=torch.uint8, device=bitmask.device)) & 1
    mask_NK = bits_NK.flatten(1)[:, :columns].bool()
    per_group_NG = rearrange(mask_NK, "n (g four) -> n g four", four=GROUP).sum(-1)
    if bool((per_group_NG != 2).any()):
        row, group = (per_group_NG != 2).nonzero()[0].tolist()
        raise SparseGPTError(
            f"{name}: bitmask of row {row}, columns {GROUP * group}..{GROUP * group + 3} sets "
            f"{int(per_group_NG[row, group])} bits; the sparse-24-bitmask form sets exactly two"
        )
    dense = values.new_zeros(rows, columns).masked_scatter_(mask_NK, values)
    return pack(dense, name)


def _check_cutlass(dtype: torch.dtype, rows: int, columns: int) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        raise SparseGPTError(f"torch's CUTLASS 2:4 layout holds float16 or bfloat16 (float32 is 1:2); found {dtype}")
    if rows % 32 or columns % 32:
        raise SparseGPTError(
            f"torch's CUTLASS 2:4 layout needs both dimensions divisible by 32; found ({rows}, {columns})"
        )


def _reordered_offsets(rows: int, words: int, device: torch.device) -> Tensor:
    """Where metadata word (row, column) of an [N, K / 16] int16 matrix lies in CUTLASS's interleaved memory."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(words, device=device)[None, :]
    row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    swap = (row % 2 == 0).int() * (column % 2 == 1).int() - (row % 2 == 1).int() * (column % 2 == 0).int()
    row, column = row + swap, column - swap
    return (column // 2 * (2 * rows) + row * 2 + column % 2).flatten()
