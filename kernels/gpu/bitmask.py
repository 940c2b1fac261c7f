"""Products with packed weights of any pattern in plain Triton, for any GPU that Triton serves and few tokens.

    matmul   out = activation(x W^T + b): kept values are loaded to their columns, `tl.dot` multiplies
    matvec   the same for one token: float32 multiply-adds
    swiglu   out = silu(x Wg^T) * (x Wu^T), both weights in one kernel, inputs read once

Values as they were, or int8 and int4 with a scale for each `group_size` columns: BITS is 0, 8 or 4. The format is that
of bitmask.py, nothing is rearranged. A thread has a byte of the mask, eight columns. Where its values begin is a prefix
sum over the bytes of the row; where each of the eight is, a prefix sum in the nibbles of one word. So a warp reads one
stretch of the values, as MACKO (arXiv:2511.13061) and SpInfer (EuroSys 2025) do. Not yet measured on a GPU: chosen by
itself only where `tune` has measured it. Torch twins: reference.py.
Tiles: T tokens, N rows of the weight, K columns."""

# mypy: disable-error-code="no-untyped-def,no-any-return,attr-defined,untyped-decorator"
# Triton's language is not typed: bodies of jitted functions are programs in it, not Python.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.bitmask import Bitmask
from sparsegpt.kernels.format.bitmask_integers import QuantizedBitmask
from sparsegpt.kernels.format.pack import padded_columns
from sparsegpt.kernels.gpu.portable import activate, dot, finish, launch, load_inputs, rows_contiguous
from sparsegpt.kernels.gpu.reference import check_operands

Masked = Bitmask | QuantizedBitmask
_WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _spread(mask, values, rows, row_mask, at, first, COLUMNS, K: tl.constexpr, BITS: tl.constexpr):
    """Columns first .. first + K of N rows whose values go on at `at` [N] -> dense [N, K / 8, 8], values taken [N]."""
    byte = first // 8 + tl.arange(0, K // 8)
    inside = row_mask[:, None] & (byte < COLUMNS // 8)[None, :]
    bits = tl.load(mask + rows[:, None] * (COLUMNS // 8) + byte[None, :], mask=inside, other=0).to(tl.int32)
    bits = (bits | (bits << 12)) & 0x000F000F  # bit i of a byte to bit 4 i
    bits = (bits | (bits << 6)) & 0x03030303
    bits = (bits | (bits << 3)) & 0x11111111
    sums = bits * 0x11111111  # nibble i: the bits up to i
    count = (sums >> 28) & 15
    before = tl.cumsum(count, axis=1) - count
    nibble = (tl.arange(0, 8) * 4)[None, None, :]
    kept = ((bits[:, :, None] >> nibble) & 1) != 0
    place = before[:, :, None] + (((sums - bits)[:, :, None] >> nibble) & 15)
    place = at[:, None, None] + place
    if BITS == 0:
        dense = tl.load(values + place, mask=kept, other=0.0)
    elif BITS == 8:
        dense = tl.load(values + place, mask=kept, other=0).to(tl.int8, bitcast=True)
    else:
        both = tl.load(values + (place >> 1), mask=kept, other=0).to(tl.int32)
        dense = (both << (28 - 4 * (place & 1)).to(tl.int32)) >> 28  # shifting down keeps the sign
    return dense, tl.sum(count, axis=1)


@triton.jit
def _add(sums, dense, x, scales, rows, row_mask, first, scale_stride, K: tl.constexpr, BITS: tl.constexpr,
         GROUP: tl.constexpr):  # fmt: skip
    """sums [N, T] + scale * dense [N, K / 8, 8] x [K, T]."""
    if BITS == 0:
        return dot(tl.reshape(dense, (sums.shape[0], K)), x, sums)
    if _WIDEN:  # noqa: SIM108 - the branches of a compile-time constant have different types
        dense = dense.to(tl.float32)
    else:
        dense = dense.to(x.dtype)  # at most seven bits: exact in every input type
    part = dot(tl.reshape(dense, (sums.shape[0], K)), x, tl.zeros_like(sums))
    scale = tl.load(scales + rows * scale_stride + first // GROUP, mask=row_mask, other=0.0).to(tl.float32)
    return sums + part * scale[:, None]


@triton.jit
def matmul_kernel(
    inputs, values, scales, mask, offsets, bias, out, TOKENS, ROWS, COLUMNS, PADDED, stride, scale_stride,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """A tile of N rows and T tokens of activation(x W^T + b)."""
    rows = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    tokens = (tl.program_id(1) * T + tl.arange(0, T)).to(tl.int64)
    row_mask = rows < ROWS
    token_mask = tokens < TOKENS
    at = tl.load(offsets + rows, mask=row_mask, other=0)
    sums = tl.zeros((N, T), dtype=tl.float32)
    for first in range(0, PADDED, K):
        x = load_inputs(inputs, tokens, token_mask, first, COLUMNS, stride, K)
        dense, count = _spread(mask, values, rows, row_mask, at, first, PADDED, K, BITS)
        sums = _add(sums, dense, x, scales, rows, row_mask, first, scale_stride, K, BITS, GROUP)
        at += count
    finish(sums, bias, out, rows, row_mask, tokens, token_mask, ROWS, BIAS, ACTIVATION)


@triton.jit
def matvec_kernel(
    inputs, values, scales, mask, offsets, bias, out, ROWS, COLUMNS, PADDED, scale_stride,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """N outputs for one token."""
    rows = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    row_mask = rows < ROWS
    at = tl.load(offsets + rows, mask=row_mask, other=0)
    sums = tl.zeros((N, K // 8, 8), dtype=tl.float32)
    for first in range(0, PADDED, K):
        dense, count = _spread(mask, values, rows, row_mask, at, first, PADDED, K, BITS)
        columns = first + tl.arange(0, K // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        x = tl.load(inputs + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)
        weight = dense.to(tl.float32)
        if BITS != 0:
            group = (first + tl.arange(0, K // 8) * 8) // GROUP
            inside = row_mask[:, None] & (group < scale_stride)[None, :]
            scale = tl.load(scales + rows[:, None] * scale_stride + group[None, :], mask=inside, other=0.0)
            weight *= scale.to(tl.float32)[:, :, None]
        sums += weight * x[None, :, :]
        at += count
    y = tl.sum(tl.sum(sums, axis=2), axis=1)
    if BIAS:
        y += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)
    tl.store(out + rows, activate(y, ACTIVATION).to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def swiglu_kernel(
    inputs, gate_values, gate_scales, gate_mask, gate_offsets, up_values, up_scales, up_mask, up_offsets, out,
    TOKENS, ROWS, COLUMNS, PADDED, stride, scale_stride,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of silu(x Wg^T) * (x Wu^T)."""
    rows = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    tokens = (tl.program_id(1) * T + tl.arange(0, T)).to(tl.int64)
    row_mask = rows < ROWS
    token_mask = tokens < TOKENS
    gate_at = tl.load(gate_offsets + rows, mask=row_mask, other=0)
    up_at = tl.load(up_offsets + rows, mask=row_mask, other=0)
    gate = tl.zeros((N, T), dtype=tl.float32)
    up = tl.zeros((N, T), dtype=tl.float32)
    for first in range(0, PADDED, K):
        x = load_inputs(inputs, tokens, token_mask, first, COLUMNS, stride, K)
        dense, count = _spread(gate_mask, gate_values, rows, row_mask, gate_at, first, PADDED, K, BITS)
        gate = _add(gate, dense, x, gate_scales, rows, row_mask, first, scale_stride, K, BITS, GROUP)
        gate_at += count
        dense, count = _spread(up_mask, up_values, rows, row_mask, up_at, first, PADDED, K, BITS)
        up = _add(up, dense, x, up_scales, rows, row_mask, first, scale_stride, K, BITS, GROUP)
        up_at += count
    y = gate * tl.sigmoid(gate) * up
    finish(y, out, out, rows, row_mask, tokens, token_mask, ROWS, False, "none")


# ---------------------------------------------------------------- host side

# Tiles that the tests compile for sm_80 and sm_90 without spilling.
MATMUL_TILE = {"T": 16, "N": 64}
MATVEC_TILE = {"N": 4, "K": 512}
SWIGLU_TILE = {"T": 16, "N": 32}


def matmul(weight: Masked, inputs: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Settled weight, inputs [T, K] -> activation(inputs weight^T + bias) [T, N]; one token has a kernel of its own.

    Raises SparseGPTError for operands that do not belong together.
    """
    check_operands(weight, inputs, bias, activation)
    (rows, columns), tokens = weight.shape, inputs.shape[0]
    inputs = rows_contiguous(inputs)
    out = inputs.new_empty(tokens, rows)
    operands = (inputs, *_tensors(weight), inputs if bias is None else bias, out)
    given: dict[str, Any] = {"BIAS": bias is not None, "ACTIVATION": activation}
    padded, constants = padded_columns(columns), integer_constants(weight)
    if tokens == 1:
        grid: tuple[int, ...] = (triton.cdiv(rows, MATVEC_TILE["N"]),)
        sizes: tuple[int, ...] = (rows, columns, padded, _scale_stride(weight))
        launch(matvec_kernel, grid, inputs, *operands, *sizes, **{**constants, **MATVEC_TILE}, **given)
    elif tokens:
        grid = (triton.cdiv(rows, MATMUL_TILE["N"]), triton.cdiv(tokens, MATMUL_TILE["T"]))
        sizes = (tokens, rows, columns, padded, inputs.stride(0), _scale_stride(weight))
        launch(matmul_kernel, grid, inputs, *operands, *sizes, **MATMUL_TILE, **constants, **given)
    return out


def swiglu(gate: Masked, up: Masked, inputs: Tensor) -> Tensor:
    """Settled weights, inputs [T, K] -> silu(inputs gate^T) * (inputs up^T) [T, N] in one kernel.

    Raises SparseGPTError for operands that do not belong together, and weights of two shapes or kinds of values.
    """
    check_operands(gate, inputs)
    check_operands(up, inputs)
    (rows, columns), tokens = gate.shape, inputs.shape[0]
    if up.shape != gate.shape or integer_constants(gate) != integer_constants(up):
        raise SparseGPTError(f"swiglu: gate {gate.shape} and up {up.shape} must have one shape and kind of values")
    inputs = rows_contiguous(inputs)
    out = inputs.new_empty(tokens, rows)
    if tokens:
        grid = (triton.cdiv(rows, SWIGLU_TILE["N"]), triton.cdiv(tokens, SWIGLU_TILE["T"]))
        sizes = (tokens, rows, columns, padded_columns(columns), inputs.stride(0), _scale_stride(gate))
        operands = (inputs, *_tensors(gate), *_tensors(up), out)
        launch(swiglu_kernel, grid, inputs, *operands, *sizes, **SWIGLU_TILE, **integer_constants(gate))
    return out


def integer_constants(weight: Masked) -> dict[str, int]:
    """Of a weight [N, K]: bits, columns of a scale and of a step, the largest power of two that divides both, to 64."""
    if isinstance(weight, Bitmask):
        return {"K": 64, "BITS": 0, "GROUP": 64}
    return {"K": min(64, weight.group_size & -weight.group_size), "BITS": weight.bits, "GROUP": weight.group_size}


def _tensors(weight: Masked) -> tuple[Tensor, ...]:
    """Values, scales (never read where there are none), the mask's bytes and offsets."""
    mask = weight.mask.view(torch.uint8)
    if isinstance(weight, Bitmask):
        return weight.values, weight.values, mask, weight.offsets
    return weight.integers, weight.scales, mask, weight.offsets


def _scale_stride(weight: Masked) -> int:
    return 1 if isinstance(weight, Bitmask) else weight.scales.stride(0)
