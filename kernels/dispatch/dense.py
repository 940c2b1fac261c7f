"""The library's product on a weight decompressed for the call, or once and kept: the route that every format has.

For the call it is decompressed block by block of rows, so that the dense weight never leaves a CPU's cache.

Dimension key: N out_features, K in_features, T tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.kernels.dispatch.route import Route, RowsOf
from sparsegpt.strips import strips

_TILE_ROWS = 64
BLOCK_BYTES = 1 << 23  # of dense weight decompressed at a time: what a last-level cache holds

# On which devices the dense weight is kept.
Keeps = Callable[[torch.device], bool]


def everywhere(device: torch.device) -> bool:
    """Keep the dense weight beside the packed one."""
    return True


def nowhere(device: torch.device) -> bool:
    """Decompress for each call."""
    return False


def off_cpu(device: torch.device) -> bool:
    """Keep it where decompressing costs a large part of a product."""
    return device.type != "cpu"


def dense_route(rows_of: RowsOf, keeps: Keeps, on_the_way: int = 0) -> Route:
    """inputs [T, K] -> [T, N]: the route of a format with such rows, the dense weight kept on some devices.

    on_the_way: bytes that decompressing needs for each weight; 0 for those of the inputs' dtype.
    """

    def prepare(weight: Any) -> Any:
        return rows_of(weight, slice(0, weight.shape[0]), None) if keeps(weight.device) else weight

    def run(state: Any, inputs: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(state, Tensor):
            return functional.linear(inputs, state, bias)
        rows, columns = state.shape
        block = block_rows(columns * (on_the_way or inputs.itemsize))
        if rows <= block:
            return functional.linear(inputs, rows_of(state, slice(0, rows), None), bias)
        return _by_blocks(rows_of, state, inputs, bias, block)

    return Route(lambda weight: None, prepare, run)


def block_rows(row_bytes: int) -> int:
    """Rows decompressed at a time: whole tiles of the library's product, which loses on odd numbers of rows."""
    return max(1, BLOCK_BYTES // max(1, row_bytes) // _TILE_ROWS) * _TILE_ROWS


def _by_blocks(rows_of: RowsOf, weight: Any, inputs: Tensor, bias: Tensor | None, block: int) -> Tensor:
    """inputs [T, K] -> [T, N], the weight decompressed `block` rows at a time."""
    rows, columns = weight.shape
    outputs, buffer = inputs.new_empty(inputs.shape[0], rows), inputs.new_empty(block, columns)
    for part in strips(rows, block):
        weight_NK = rows_of(weight, part, buffer[: part.stop - part.start])
        outputs[:, part] = functional.linear(inputs, weight_NK, None if bias is None else bias[part])
    return outputs
