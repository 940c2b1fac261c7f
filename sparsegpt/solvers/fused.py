"""One strip of the SparseGPT sweep as a Triton kernel: masks, pruning and error propagation without leaving the chip.

A column loop launches several tiny kernels a column; here a program keeps a tile of K columns x ROWS rows in registers
and walks through its columns alone. Rows are independent once the rule for the mask is given: n:m chooses within the
tile (KEEP of GROUP, at each group's start, with the weights as updated so far), an unstructured mask comes in ready.

Layout as in `solvers.sparsegpt`: weights lie as [C, R]. Dimension key: K columns of the strip (in the kernel a power of
two, not all of them in use), R out_features. Numerics are tested in Triton's interpreter, code generation for sm_80 and
sm_90 without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a strip, and rows and warps of one program: with these nothing spills on sm_80 or sm_90.
STRIP = 128
ROWS = 32
WARPS = 8


@triton.jit
def _strip_kernel(
    weight_ptr,  # [K, R], updated in place, zeros where pruned
    error_ptr,  # [K, R], written
    kept_ptr,  # [K, R] int8: read when GROUP == 0, else written
    factor_ptr,  # U of the strip, row stride `factor_stride`
    scale_ptr,  # [K] saliency scale: 1 / U_jj, 0 for a dead input
    columns,  # columns in use, at most K
    rows,
    factor_stride,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    column = tl.arange(0, K)[:, None]
    inside = (row < rows) & (column < columns)
    offsets = column * rows + row
    weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
    if GROUP == 0:
        kept = tl.load(kept_ptr + offsets, mask=inside, other=1).to(tl.int32)
    else:
        kept = tl.full((K, ROWS), 1, tl.int32)
        scale = tl.load(scale_ptr + column, mask=column < columns, other=0.0)
    for j in range(0, columns):
        if GROUP > 0:  # noqa: SIM102  two ifs: the outer one is decided when the kernel is compiled
            if j % GROUP == 0:
                saliency = weight * scale
                saliency = saliency * saliency
                rank = tl.zeros((K, ROWS), tl.int32)
                for k in range(0, GROUP):
                    other = tl.sum(tl.where(column == j + k, saliency, 0.0), axis=0)[None, :]
                    # A rival ranks higher when it is larger, or equal and further left.
                    beaten = (other > saliency) | ((other == saliency) & (j + k < column))
                    rank += beaten.to(tl.int32)
                in_group = (column >= j) & (column < j + GROUP)
                kept = tl.where(in_group, (rank < KEEP).to(tl.int32), kept)
        here = column == j
        # A tile in registers cannot be indexed: a column is read as a sum in which all others are zero.
        current = tl.sum(tl.where(here, weight, 0.0), axis=0)
        stays = tl.sum(tl.where(here, kept, 0), axis=0)
        diagonal = tl.load(factor_ptr + j * factor_stride + j)
        error = tl.where(stays > 0, 0.0, current / diagonal)
        tl.store(error_ptr + j * rows + row, error[None, :], mask=row < rows)
        right = (column > j) & (column < columns)
        factor = tl.load(factor_ptr + j * factor_stride + column, mask=right, other=0.0)
        weight -= factor * error[None, :]
    weight = tl.where(kept > 0, weight, 0.0)
    tl.store(weight_ptr + offsets, weight, mask=inside)
    if GROUP > 0:
        tl.store(kept_ptr + offsets, kept.to(tl.int8), mask=inside)


def sweep_strip(
    weight: Tensor, error: Tensor, kept: Tensor, factor: Tensor, scale: Tensor, keep: int, group: int
) -> None:
    """Weight [K, R], error [K, R], kept bool [K, R], factor [K, K], scale [K]: sweep one strip in place, K <= STRIP.

    weight, error: float32, contiguous; kept: contiguous, the mask to follow when group is 0, else written with `keep`
    of every `group` columns; factor: U of these columns with unit column stride; scale: of the saliency. On return
    pruned weights are zero and `error` holds what is to be moved further right.
    """
    columns, rows = weight.shape
    with torch.cuda.device_of(weight):
        _strip_kernel[(triton.cdiv(rows, ROWS),)](
            weight,
            error,
            kept.view(torch.int8),
            factor,
            scale,
            columns,
            rows,
            factor.stride(0),
            KEEP=keep,
            GROUP=group,
            K=STRIP,
            ROWS=ROWS,
            num_warps=WARPS,
        )
