"""The library's product on a weight decompressed for the call, or once and kept.

On a CPU the weight is decompressed block by block of rows, so that the dense weight never leaves the cache."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from sparsegpt.kernels import cpu
from sparsegpt.kernels.format.pack import Packed24

_TILE_ROWS = 64
BLOCK_BYTES = 1 << 23  # of dense weight decompressed at a time on a CPU: what a last-level cache holds


def dense_weight(weight: Packed24) -> Tensor:
    """The decompressed weight [N, K]."""
    return cpu.unpack_fast(weight)


def prepare_dense(weight: Packed24) -> Packed24 | Tensor:
    """The weight itself on a CPU; elsewhere its dense form [N, K], which is kept."""
    return weight if weight.values.device.type == "cpu" else dense_weight(weight)


def block_rows(row_bytes: int) -> int:
    """Rows decompressed at a time: whole tiles of the library's product, which loses on odd numbers of rows."""
    return max(1, BLOCK_BYTES // max(1, row_bytes) // _TILE_ROWS) * _TILE_ROWS


def run_dense(weight: Packed24 | Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """inputs [T, K] -> [T, N]."""
    if isinstance(weight, Tensor):
        return functional.linear(inputs, weight, bias)
    rows, columns = weight.shape
    block = block_rows(columns * inputs.itemsize)
    if rows <= block:
        return functional.linear(inputs, dense_weight(weight), bias)
    outputs = inputs.new_empty(inputs.shape[0], rows)
    buffer = inputs.new_empty(block, columns)
    for start in range(0, rows, block):
        part = slice(start, min(start + block, rows))
        packed = Packed24(weight.values[part], weight.meta[part], (part.stop - start, columns))
        weight_NK = cpu.unpack_fast(packed, out=buffer[: part.stop - start])
        outputs[:, part] = functional.linear(inputs, weight_NK, None if bias is None else bias[part])
    return outputs
