"""The format of GPTQ, version 1, which vLLM and GPTQModel load.

    <linear>.qweight int32 [K b / 32, N]    d + 2^(b-1), packed along the inputs
    <linear>.qzeros  int32 [K / g, N b / 32]  2^(b-1) - 1 everywhere: version 1 keeps zero points less 1
    <linear>.scales  float16 [K / g, N]
    <linear>.g_idx   int32 [K]              the group of each input

Dimension key: N out_features, K in_features, b bits, g inputs of a group, G groups.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsegpt.files.bits import pack_bits
from sparsegpt.grid import Grid
from sparsegpt.quantization import Integers

NAME = "gptq"
BITS = (2, 3, 4, 8)


def refusal(grid: Grid, shape: tuple[int, int]) -> str | None:
    """Why a weight [N, K] on this grid does not fit the format; None where it does."""
    if not grid.symmetric:
        return f"{grid} has zero points, and symmetric integers are written: give {str(grid).removeprefix('u')}"
    if grid.bits not in BITS:
        return f"the format has {', '.join(map(str, BITS))} bits, not {grid.bits}"
    if uneven := [size for size in shape if size * grid.bits % 32]:
        return f"{uneven[0]} numbers of {grid.bits} bits do not fill words of 32"
    if grid.group_size is not None and shape[1] % grid.group_size:
        return f"{shape[1]} inputs do not divide into groups of {grid.group_size}, as the format wants"
    return None


def tensors(integers: Integers, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Integers of [N, K] -> (part's name, tensor); scales are float16 whatever the dtype of the model."""
    steps, scales, grid = integers.steps, integers.scales.scale, integers.scales.grid
    rows, columns = steps.shape
    yield "qweight", pack_bits(steps.to(torch.int32) + 2 ** (grid.bits - 1), grid.bits).T.contiguous()
    zeros = torch.full((scales.shape[1], rows), 2 ** (grid.bits - 1) - 1, dtype=torch.int32)
    yield "qzeros", pack_bits(zeros, grid.bits)
    yield "scales", scales.T.half().contiguous()
    yield "g_idx", torch.arange(columns, dtype=torch.int32) // grid.width(columns)


def settings(grids: Mapping[str, Grid], ignored: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config`; {linear: grid} are all on one grid."""
    grid = next(iter(grids.values()))
    return {
        "quant_method": NAME,
        "bits": grid.bits,
        "group_size": -1 if grid.group_size is None else grid.group_size,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": NAME,
        "lm_head": False,
        "modules_not_convert": list(ignored),
    }
