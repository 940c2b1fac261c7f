"""The format `pack-quantized` of compressed-tensors, which transformers and vLLM load.

    <linear>.weight_packed int32 [N, ceil(K b / 32)]    d + 2^(b-1), as `bits.pack_bits` has it
    <linear>.weight_scale  [N, K / g]                   in the model's dtype
    <linear>.weight_shape  int64 [2]                    N, K

Dimension key: N out_features, K in_features, b bits, g inputs of a group.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsegpt.files.bits import pack_bits
from sparsegpt.grid import Grid
from sparsegpt.quantization import Integers

NAME = "compressed-tensors"
_LIKED = (128, 96, 64, 32)


def refusal(grid: Grid, shape: tuple[int, int]) -> str | None:
    """Why a weight [N, K] on this grid does not fit the format; None where it does."""
    if not grid.symmetric:
        return f"{grid} has zero points, and symmetric integers are written: give {str(grid).removeprefix('u')}"
    if grid.group_size is not None and shape[1] % grid.group_size:
        return (
            f"{shape[1]} inputs do not divide into groups of {grid.group_size}, as the format wants: quantise with "
            f"int{grid.bits}:{_divisor(shape[1], grid.group_size)}"
        )
    return None


def tensors(integers: Integers, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Integers of [N, K], dtype of the model -> (part's name, tensor)."""
    steps, bits = integers.steps, integers.scales.grid.bits
    yield "weight_packed", pack_bits(steps.to(torch.int32) + 2 ** (bits - 1), bits)
    yield "weight_scale", integers.scales.scale.to(dtype)
    yield "weight_shape", torch.tensor(steps.shape)


def settings(grids: Mapping[str, Grid], ignored: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` for {linear: grid} and the linears that stay as they are."""
    groups: dict[Grid, list[str]] = {}
    for linear, grid in grids.items():
        groups.setdefault(grid, []).append(linear)
    targets = {grid: ["Linear"] if len(groups) == 1 else linears for grid, linears in groups.items()}
    return {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {"targets": targets[grid], "weights": _weights(grid)} for index, grid in enumerate(groups)
        },
        "ignore": list(ignored),
    }


def _weights(grid: Grid) -> dict[str, Any]:
    group = {"strategy": "channel"} if grid.group_size is None else {"strategy": "group", "group_size": grid.group_size}
    return {"num_bits": grid.bits, "type": "int", "symmetric": True, "dynamic": False, **group}


def _divisor(columns: int, most: int) -> int:
    """The largest divisor up to `most`, of those that kernels like if there is one."""
    sizes = (*(size for size in _LIKED if size <= most), *range(most, 0, -1))
    found: int = next(size for size in sizes if columns % size == 0)
    return found
