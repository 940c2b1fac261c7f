"""The packed 2:4 format as torch's semi-structured tensors.

CUTLASS (torch.sparse.SparseSemiStructuredTensorCUTLASS): the same values [N, K / 2]; metadata as int16 [N, K / 16] with
    rows reordered so that a tensor core's threads read whole words. Source of the order: torch
    `torch/sparse/_semi_structured_conversions.py` (CUTLASS `host_reorder.h`), restated here as one permutation:
        rows of 32 = (a=4, b=8), columns of 2 = c:   offset = ((c // 2) * N + row') * 2 + column'
        row' = 4 b + a;  the two middle corners of each 2 x 2 block then change places
Dimension key: N out_features, K in_features."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.pack import Packed24


def to_cutlass(packed: Packed24) -> tuple[Tensor, Tensor]:
    """Packed [N, K] -> values [N, K / 2] and reordered metadata int16 [N, K / 16], for torch's CUTLASS kernels.

    Raises SparseGPTError for dtypes other than float16 and bfloat16, N or K not divisible by 32.
    """
    rows, columns = packed.shape
    _check_cutlass(packed.dtype, rows, columns)
    meta = packed.meta.view(torch.int16)
    reordered = torch.empty_like(meta).flatten()
    reordered[_reordered_offsets(rows, columns // 16, meta.device)] = meta.flatten()
    return packed.values, reordered.view(rows, columns // 16)


def to_semi_structured(packed: Packed24) -> Tensor:
    """Packed [N, K] -> torch's CUTLASS tensor subclass [N, K], whose kernels need a GPU of Ampere or newer.

    Raises as `to_cutlass`.
    """
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    values, meta = to_cutlass(packed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch announces its prototype once; our dispatch says its own
        return SparseSemiStructuredTensorCUTLASS(
            torch.Size(packed.shape), values, meta, None, None, None, requires_grad=False
        )


def _check_cutlass(dtype: torch.dtype, rows: int, columns: int) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        raise SparseGPTError(f"torch's CUTLASS 2:4 layout holds float16 or bfloat16 (float32 is 1:2); found {dtype}")
    if rows % 32 or columns % 32:
        raise SparseGPTError(
            f"torch's CUTLASS 2:4 layout needs both dimensions divisible by 32; found ({rows}, {columns})"
        )


def _reordered_offsets(rows: int, words: int, device: torch.device) -> Tensor:
    """[N * K / 16]: where metadata word (row, column) of an int16 matrix lies in CUTLASS's interleaved memory."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(words, device=device)[None, :]
    row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    swap = (row % 2 == 0).int() * (column % 2 == 1).int() - (row % 2 == 1).int() * (column % 2 == 0).int()
    row, column = row + swap, column - swap
    return (column // 2 * (2 * rows) + row * 2 + column % 2).flatten()
