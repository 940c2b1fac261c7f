"""Order in which the sparse tensor cores read a packed 2:4 weight (PTX ISA, mma.sp.m16n8k32, 16-bit types).

    out^T [N, T] = weight [N, K] inputs^T [K, T]: the weight is operand A, the inputs are operand B

A warp multiplies a tile of 16 rows and 32 columns. Lane l = 4 g + q holds four 32-bit registers of A with two kept
values each:
    register r: row g + 8 (r % 2), kept pair q + 4 (r // 2) of the tile's eight
so a tile is 32 lanes times 16 bytes, stored contiguously. Metadata: two tiles, one below the other, share a 32-bit
register of 32 lanes; the instruction's selector s takes the tile:
    lane 4 g + 2 s + h: low half = row g, high half = row g + 8, each sixteen columns of half h of the 32
These words are CUTLASS's reordered metadata up to a transposition of tiles.

    A [N/16, K/32, 32 lanes * 4 registers] int32        E [N/32, K/32, 32 lanes] int32

Rows are padded with zeros to a multiple of 32. A warpgroup of four warps reads the same registers for
wgmma.mma_async.sp.m64nNk32, each warp a pair of tiles (wgmma_sp.py).

Dimension key: N out_features, K in_features, L lanes, R registers, S steps of 32 columns, P pairs of tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.pack import EMPTY_WORD, Packed24

TILE_ROWS = 16
PAIR_ROWS = 32  # two tiles that share their metadata registers


@dataclass(frozen=True, eq=False)
class Fragments:
    """A weight [N, K] in register order: A and E as in the module's key, `shape` the dense (N, K), `dtype` 16-bit."""

    A: Tensor
    E: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype


def to_fragments(packed: Packed24) -> Fragments:
    """[N, K] packed -> register order. Raises SparseGPTError unless it is float16 or bfloat16."""
    if packed.values.dtype not in (torch.float16, torch.bfloat16):
        raise SparseGPTError(f"mma.sp weights are float16 or bfloat16; found {packed.values.dtype}")
    missing = -packed.shape[0] % PAIR_ROWS
    values = functional.pad(packed.values, (0, 0, 0, missing)).view(torch.int32)
    meta = functional.pad(packed.meta, (0, 0, 0, missing), value=EMPTY_WORD)
    return Fragments(_order_values(values), order_meta(meta), packed.shape, packed.values.dtype)


def whole_inputs(inputs: Tensor, columns: int) -> Tensor:
    """Inputs [T, K] -> [T, columns] with zeros, contiguous, its memory beginning at a multiple of 16 bytes.

    Inputs that are so already are returned as they are: a copy would cost a decode step its time.
    """
    missing = columns - inputs.shape[1]
    inputs = functional.pad(inputs, (0, missing)) if missing else inputs.contiguous()
    return inputs.clone() if inputs.data_ptr() % 16 else inputs


def register_positions() -> tuple[Tensor, Tensor]:
    """[L, R] twice: row and kept pair of register r in lane l within a tile of 16 rows and 32 columns."""
    lane, register = torch.arange(32)[:, None], torch.arange(4)[None, :]
    return lane // 4 + 8 * (register % 2), lane % 4 + 4 * (register // 2)


def _order_values(pairs_NP: Tensor) -> Tensor:
    """Kept values as int32 pairs [N, K/4] -> [N/16, K/32, 128]."""
    tiles = rearrange(pairs_NP, "(tile row) (step pair) -> tile step row pair", row=TILE_ROWS, pair=8)
    rows, pairs = register_positions()
    return tiles[:, :, rows.to(tiles.device), pairs.to(tiles.device)].flatten(2).contiguous()


def order_meta(meta_NS: Tensor) -> Tensor:
    """Words [N, S] -> [P, S, L], 32 rows a pair: rows g and g + 8 of a tile joined, halves of the columns apart."""
    halves = rearrange(
        meta_NS.contiguous().view(torch.int16),
        "(pair s high g) (step h) -> pair step g s h high",
        s=2,
        high=2,
        g=8,
        h=2,
    )
    return halves.contiguous().view(torch.int32).flatten(2)
