"""Products with packed 2:4 weights in plain Triton, for any GPU that Triton serves and few tokens.

    matmul   out = activation(x W^T + b): the weight is spread to dense in registers, `tl.dot` multiplies
    matvec   the same for one token: inputs are selected instead of the weight spread, float32 multiply-adds
    swiglu   out = silu(x Wg^T) * (x Wu^T), both weights in one kernel, inputs read once
    integer  the weight is int8 or int4 with a scale for each `group_size` columns (quantized.py)

The format is that of pack.py, nothing is rearranged. Not yet measured on a GPU: chosen by itself only where `tune` has
measured it. Torch twins: reference.py. Tiles: T tokens, N rows of the weight, K columns.

In the interpreter bfloat16 arithmetic and `tl.dot` are wrong (values are kept as 16-bit patterns), so operands are
widened there first, which is exact: the flag `_WIDEN`."""

# mypy: disable-error-code="no-untyped-def,no-any-return,attr-defined,untyped-decorator"
# Triton's language is not typed: bodies of jitted functions are programs in it, not Python.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.pack import Packed24, padded_columns
from sparsegpt.kernels.format.quantized import Quantized24
from sparsegpt.kernels.gpu.reference import check_operands

_WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


# ---------------------------------------------------------------- shared pieces


@triton.jit
def dot(a, b, sums):
    """a [M, K] times b [K, N], added to sums [M, N] float32."""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """x [...] float32 -> [...]: none, relu, relu2, silu or gelu."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    if ACTIVATION == "relu2":
        x = tl.maximum(x, 0.0)
        x = x * x
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    if ACTIVATION == "gelu":  # tanh(u) = 2 sigmoid(2u) - 1, so 0.5 x (1 + tanh(u)) = x sigmoid(2u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def _spread(values, words, N: tl.constexpr, K: tl.constexpr):
    """Values [N, K/2] and words [N, K/32] -> dense [N, K]."""
    v0, v1 = tl.split(tl.reshape(values, (N, K // 4, 2)))
    nibbles = tl.reshape(words[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :], (N, K // 4))
    i0 = nibbles & 3
    i1 = (nibbles >> 2) & 3
    zero = tl.zeros_like(v0)
    w0 = tl.where(i0 == 0, v0, zero)
    w1 = tl.where(i0 == 1, v0, tl.where(i1 == 1, v1, zero))
    w2 = tl.where(i0 == 2, v0, tl.where(i1 == 2, v1, zero))
    w3 = tl.where(i1 == 3, v1, zero)
    # join makes the last axis: [[w0, w1], [w2, w3]] flattened is the order of the columns
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (N, K))


@triton.jit
def _load_words(meta, rows, row_mask, first, COLUMNS, K: tl.constexpr):
    """Metadata words [N, K/32] of the columns first .. first + K; COLUMNS is the padded row length."""
    words = first // 32 + tl.arange(0, K // 32)
    mask = row_mask[:, None] & (words < COLUMNS // 32)[None, :]
    return tl.load(meta + rows[:, None] * (COLUMNS // 32) + words[None, :], mask=mask, other=0)


@triton.jit
def _load_values(values, rows, row_mask, first, COLUMNS, K: tl.constexpr):
    kept = first // 2 + tl.arange(0, K // 2)
    mask = row_mask[:, None] & (kept < COLUMNS // 2)[None, :]
    return tl.load(values + rows[:, None] * (COLUMNS // 2) + kept[None, :], mask=mask, other=0.0)


@triton.jit
def load_inputs(inputs, tokens, token_mask, first, COLUMNS, stride, K: tl.constexpr):
    """Inputs [K, T], transposed for `tl.dot`; COLUMNS is the real row length."""
    columns = first + tl.arange(0, K)
    mask = (columns < COLUMNS)[:, None] & token_mask[None, :]
    return tl.load(inputs + tokens[None, :] * stride + columns[:, None], mask=mask, other=0.0)


@triton.jit
def finish(sums, bias, out, rows, row_mask, tokens, token_mask, ROWS, BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """sums [N, T] with bias and activation to out [T, N]."""
    if BIAS:
        sums += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    sums = activate(sums, ACTIVATION)
    mask = row_mask[:, None] & token_mask[None, :]
    tl.store(out + tokens[None, :] * ROWS + rows[:, None], sums.to(out.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- products


@triton.jit
def matmul_kernel(
    inputs, values, meta, bias, out, TOKENS, ROWS, COLUMNS, PADDED, stride,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """A tile of N rows and T tokens of activation(x W^T + b)."""
    rows = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    tokens = (tl.program_id(1) * T + tl.arange(0, T)).to(tl.int64)
    row_mask = rows < ROWS
    token_mask = tokens < TOKENS
    sums = tl.zeros((N, T), dtype=tl.float32)
    for first in range(0, PADDED, K):
        kept = _load_values(values, rows, row_mask, first, PADDED, K)
        words = _load_words(meta, rows, row_mask, first, PADDED, K)
        x = load_inputs(inputs, tokens, token_mask, first, COLUMNS, stride, K)
        sums = dot(_spread(kept, words, N, K), x, sums)
    finish(sums, bias, out, rows, row_mask, tokens, token_mask, ROWS, BIAS, ACTIVATION)


@triton.jit
def matvec_kernel(
    inputs, values, meta, bias, out, ROWS, COLUMNS, PADDED,
    N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """N outputs for one token: each kept weight picks its input out of the group's four."""
    rows = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    row_mask = rows < ROWS
    sums = tl.zeros((N, K // 4), dtype=tl.float32)
    for first in range(0, PADDED, K):
        kept = _load_values(values, rows, row_mask, first, PADDED, K)
        words = _load_words(meta, rows, row_mask, first, PADDED, K)
        v0, v1 = tl.split(tl.reshape(kept, (N, K // 4, 2)))
        nibbles = tl.reshape(words[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :], (N, K // 4))
        i0 = nibbles & 3
        i1 = (nibbles >> 2) & 3
        groups = first + 4 * tl.arange(0, K // 4)
        live = groups < COLUMNS
        x0 = tl.load(inputs + groups, mask=live, other=0.0).to(tl.float32)[None, :]
        x1 = tl.load(inputs + groups + 1, mask=live, other=0.0).to(tl.float32)[None, :]
        x2 = tl.load(inputs + groups + 2, mask=live, other=0.0).to(tl.float32)[None, :]
        x3 = tl.load(inputs + groups + 3, mask=live, other=0.0).to(tl.float32)[None, :]
        a = tl.where(i0 == 0, x0, tl.where(i0 == 1, x1, x2))  # i0 is 0, 1 or 2
        b = tl.where(i1 == 1, x1, tl.where(i1 == 2, x2, x3))  # i1 is 1, 2 or 3
        sums += v0.to(tl.float32) * a + v1.to(tl.float32) * b
    y = tl.sum(sums, axis=1)
    if BIAS:
        y += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)
    tl.store(out + rows, activate(y, ACTIVATION).to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def swiglu_kernel(
    inputs, gate_values, gate_meta, up_values, up_meta, out, TOKENS, ROWS, COLUMNS, PADDED, stride,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of silu(x Wg^T) * (x Wu^T)."""
    rows = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    tokens = (tl.program_id(1) * T + tl.arange(0, T)).to(tl.int64)
    row_mask = rows < ROWS
    token_mask = tokens < TOKENS
    gate = tl.zeros((N, T), dtype=tl.float32)
    up = tl.zeros((N, T), dtype=tl.float32)
    for first in range(0, PADDED, K):
        x = load_inputs(inputs, tokens, token_mask, first, COLUMNS, stride, K)
        kept = _load_values(gate_values, rows, row_mask, first, PADDED, K)
        words = _load_words(gate_meta, rows, row_mask, first, PADDED, K)
        gate = dot(_spread(kept, words, N, K), x, gate)
        kept = _load_values(up_values, rows, row_mask, first, PADDED, K)
        words = _load_words(up_meta, rows, row_mask, first, PADDED, K)
        up = dot(_spread(kept, words, N, K), x, up)
    y = gate * tl.sigmoid(gate) * up
    finish(y, out, out, rows, row_mask, tokens, token_mask, ROWS, False, "none")


@triton.jit
def integer_kernel(
    inputs, quantized, scales, meta, bias, out, TOKENS, ROWS, COLUMNS, PADDED, stride, scale_stride,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """As `matmul_kernel` with integer values; K divides GROUP, so a step has one scale for each row."""
    FIELDS: tl.constexpr = 32 // BITS
    rows = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    tokens = (tl.program_id(1) * T + tl.arange(0, T)).to(tl.int64)
    row_mask = rows < ROWS
    token_mask = tokens < TOKENS
    sums = tl.zeros((N, T), dtype=tl.float32)
    shifts = (tl.arange(0, FIELDS) * BITS)[None, None, :]
    for first in range(0, PADDED, K):
        x = load_inputs(inputs, tokens, token_mask, first, COLUMNS, stride, K)
        at = first // 2 // FIELDS + tl.arange(0, K // 2 // FIELDS)
        mask = row_mask[:, None] & (at < PADDED // 2 // FIELDS)[None, :]
        q = tl.load(quantized + rows[:, None] * (PADDED // 2 // FIELDS) + at[None, :], mask=mask, other=0)
        fields = (q[:, :, None] << (32 - BITS - shifts)) >> (32 - BITS)  # shifting down keeps the sign
        kept = tl.reshape(fields, (N, K // 2))
        if _WIDEN:  # noqa: SIM108 - the branches of a compile-time constant have different types
            kept = kept.to(tl.float32)
        else:
            kept = kept.to(x.dtype)  # at most seven bits: exact in every input type
        words = _load_words(meta, rows, row_mask, first, PADDED, K)
        scale = tl.load(scales + rows * scale_stride + first // GROUP, mask=row_mask, other=0.0).to(tl.float32)
        part = dot(_spread(kept, words, N, K), x, tl.zeros((N, T), dtype=tl.float32))
        sums += part * scale[:, None]
    finish(sums, bias, out, rows, row_mask, tokens, token_mask, ROWS, BIAS, ACTIVATION)


# ---------------------------------------------------------------- host side

# Tiles that the tests compile for sm_80 and sm_90 without spilling.
MATMUL_TILE = {"T": 16, "N": 64, "K": 128}
MATVEC_TILE = {"N": 16, "K": 512}
SWIGLU_TILE = {"T": 16, "N": 64, "K": 64}
INTEGER_TILE = {"T": 16, "N": 64}


def matmul(weight: Packed24, inputs: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """inputs [T, K] -> activation(inputs weight^T + bias) [T, N]; one token goes through the matrix-vector kernel.

    Raises SparseGPTError for operands that do not belong together.
    """
    check_operands(weight, inputs, bias, activation)
    (rows, columns), tokens = weight.shape, inputs.shape[0]
    inputs = rows_contiguous(inputs)
    out = inputs.new_empty(tokens, rows)
    given = {"BIAS": bias is not None, "ACTIVATION": activation}
    bias = inputs if bias is None else bias  # never read then
    padded = padded_columns(columns)
    operands = (inputs, weight.values, weight.meta, bias, out)
    if tokens == 1:
        grid: tuple[int, ...] = (triton.cdiv(rows, MATVEC_TILE["N"]),)
        launch(matvec_kernel, grid, inputs, *operands, rows, columns, padded, **MATVEC_TILE, **given)
    elif tokens:
        grid = (triton.cdiv(rows, MATMUL_TILE["N"]), triton.cdiv(tokens, MATMUL_TILE["T"]))
        sizes = (tokens, rows, columns, padded, inputs.stride(0))
        launch(matmul_kernel, grid, inputs, *operands, *sizes, **MATMUL_TILE, **given)
    return out


def swiglu(gate: Packed24, up: Packed24, inputs: Tensor) -> Tensor:
    """inputs [T, K] -> silu(inputs gate^T) * (inputs up^T) [T, N] in one kernel.

    Raises SparseGPTError for operands that do not belong together, and weights of two shapes.
    """
    check_operands(gate, inputs)
    check_operands(up, inputs)
    (rows, columns), tokens = gate.shape, inputs.shape[0]
    if up.shape != gate.shape:
        raise SparseGPTError(f"swiglu: gate {gate.shape} and up {up.shape} must have one shape")
    inputs = rows_contiguous(inputs)
    out = inputs.new_empty(tokens, rows)
    operands = (inputs, gate.values, gate.meta, up.values, up.meta, out)
    if tokens:
        grid = (triton.cdiv(rows, SWIGLU_TILE["N"]), triton.cdiv(tokens, SWIGLU_TILE["T"]))
        sizes = (tokens, rows, columns, padded_columns(columns), inputs.stride(0))
        launch(swiglu_kernel, grid, inputs, *operands, *sizes, **SWIGLU_TILE)
    return out


def matmul_integer(weight: Quantized24, inputs: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """inputs [T, K] -> activation(inputs weight^T + bias) [T, N] for int8 or int4 values.

    Raises SparseGPTError for operands that do not belong together.
    """
    check_operands(weight, inputs, bias, activation)
    (rows, columns), tokens = weight.shape, inputs.shape[0]
    inputs = rows_contiguous(inputs)
    out = inputs.new_empty(tokens, rows)
    if tokens:
        grid = (triton.cdiv(rows, INTEGER_TILE["N"]), triton.cdiv(tokens, INTEGER_TILE["T"]))
        operands = (inputs, weight.words, weight.scales, weight.meta, inputs if bias is None else bias, out)
        sizes = (tokens, rows, columns, padded_columns(columns), inputs.stride(0), weight.scales.stride(0))
        constants = {**INTEGER_TILE, **integer_step(weight.bits, weight.group_size)}
        given = {"BIAS": bias is not None, "ACTIVATION": activation}
        launch(integer_kernel, grid, inputs, *operands, *sizes, **constants, **given)
    return out


def integer_step(bits: int, group_size: int) -> dict[str, Any]:
    """Columns of one step (the largest power of two that divides the scale group, at most 128) and its constants."""
    return {"K": min(128, group_size & -group_size), "BITS": bits, "GROUP": group_size}


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *operands: object, **constants: object) -> None:
    """Launch a kernel on the device of a tensor [...]."""
    with torch.cuda.device_of(on):  # Triton launches on the current device, wherever the tensors are
        kernel[grid](*operands, **constants)


def rows_contiguous(matrix: Tensor) -> Tensor:
    """[T, K] -> itself, or a copy where its rows are strided."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
