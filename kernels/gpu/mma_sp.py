"""Decoding on sparse tensor cores: out = activation(x W^T + b) for few tokens, and silu(x Wg^T) * (x Wu^T).

A Gluon kernel that issues PTX `mma.sp::ordered_metadata.m16n8k32` on weights in register order (fragments.py): the kept
values go from memory to the tensor core as they lie, so no instruction is spent on spreading them. One block computes
32 rows; its warps split the columns and add up at the end. While a warp multiplies STEPS steps of 32 columns, the next
STEPS are on their way, 16 bytes a lane for each tile of 16 rows: 32 KiB or more a block, enough for one to keep a
multiprocessor's memory busy.

    bytes read: 9/16 of a 16-bit dense weight, so at best 1.78 times dense where memory is the limit (few tokens)

Needs compute capability 8.0 (Ampere) or newer. Not yet run on a GPU: chosen by itself only where `tune` has measured
it.
Sources: PTX ISA 8.5, "Matrix multiply-accumulate with sparse A"; Mishra et al. 2021, arXiv:2104.08378."""

# mypy: disable-error-code="no-untyped-def,no-any-return,attr-defined,untyped-decorator"
# Gluon is not typed: bodies of jitted functions are programs in it, not Python.
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.pack import WORD_COLUMNS, padded_columns
from sparsegpt.kernels.gpu.fragments import PAIR_ROWS, Fragments, whole_inputs
from sparsegpt.kernels.gpu.reference import ACTIVATIONS


@gluon.constexpr_function
def _layout(WARPS, STEPS, BLOCKS):
    """[WARPS, STEPS, BLOCKS of 8 tokens, 32 lanes * 4 registers]: which thread holds which element."""
    powers = [1 << i for i in range(8)]
    registers = [[0, 0, 0, 1], [0, 0, 0, 2]]
    registers += [[0, 0, p, 0] for p in powers if p < BLOCKS] + [[0, p, 0, 0] for p in powers if p < STEPS]
    lanes = [[0, 0, 0, 4 << i] for i in range(5)]
    warps = [[p, 0, 0, 0] for p in powers if p < WARPS]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [WARPS, STEPS, BLOCKS, 128])


@gluon.constexpr_function
def instruction(TYPE, SELECTOR, REGISTER):
    """mma.sp text; of the four metadata registers that a pack of four elements holds, REGISTER is used."""
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{TYPE}.{TYPE}.f32 "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$12,$13,$14,$15}}, ${16 + REGISTER}, {SELECTOR};"
    )


@gluon.jit
def multiply_add(a, b, sums, e, TYPE: gl.constexpr, SELECTOR: gl.constexpr, REGISTER: gl.constexpr = 0):
    """One instruction for each four consecutive elements of the last axis, which are a lane's four registers."""
    return gl.inline_asm_elementwise(
        instruction(TYPE, SELECTOR, REGISTER), "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r", [a, b, sums, e],
        dtype=gl.float32, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def _sigmoid(x):
    return 1.0 / (1.0 + gl.exp(-x))


@gluon.jit
def _activate(x, ACTIVATION: gl.constexpr):
    if ACTIVATION == "relu":
        x = gl.maximum(x, 0.0)
    if ACTIVATION == "relu2":
        x = gl.maximum(x, 0.0)
        x = x * x
    if ACTIVATION == "silu":
        x = x * _sigmoid(x)
    if ACTIVATION == "gelu":  # tanh(u) = 2 sigmoid(2u) - 1
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@gluon.jit
def _load_tiles(A, E, at, element, step_mask, pair, WORDS):
    """The two 16-row tiles of a pair and their metadata; `at` are the steps (words of 32 columns)."""
    values = A + (pair * 2 * WORDS + at) * 128 + element
    a0 = gl.load(values, mask=step_mask, other=0)
    a1 = gl.load(values + WORDS * 128, mask=step_mask, other=0)
    return a0, a1, gl.load(E + (pair * WORDS + at) * 32 + element // 4, mask=step_mask, other=0x44444444)


@gluon.jit
def _add_tiles(a0, a1, e, b, upper, lower, TYPE: gl.constexpr):
    return multiply_add(a0, b, upper, e, TYPE, "0x0"), multiply_add(a1, b, lower, e, TYPE, "0x1")


@gluon.jit
def _over_warps(sums, L: gl.constexpr):
    """Sum over warps and steps: [BLOCKS, 128] in a layout of its own."""
    return gl.convert_layout(gl.sum(gl.sum(sums, 0), 0), gl.SliceLayout(0, gl.SliceLayout(0, L)))


@gluon.jit
def store(y, bias, out, row, token, TOKENS, ROWS, BIAS: gl.constexpr, ACTIVATION: gl.constexpr):
    """Bias, activation, and the results that lie inside the output."""
    if BIAS:
        y = y + gl.load(bias + row, mask=row < ROWS, other=0.0).to(gl.float32)
    y = _activate(y, ACTIVATION).to(out.dtype.element_ty)
    gl.store(out + token * ROWS + row, y, mask=(token < TOKENS) & (row < ROWS))


@gluon.jit
def decode_kernel(
    inputs, A, E, A_up, E_up, bias, out, TOKENS, ROWS, WORDS, stride,
    WARPS: gl.constexpr, STEPS: gl.constexpr, BLOCKS: gl.constexpr, TYPE: gl.constexpr,
    BIAS: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """32 rows and 8 * BLOCKS tokens; inputs are pairs [TOKENS, K/2] int32. GATED: out = silu(x W^T) * (x W_up^T)."""
    L: gl.constexpr = _layout(WARPS, STEPS, BLOCKS)
    pair = gl.program_id(0)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))))[:, None, None, None]
    step = gl.arange(0, STEPS, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))[None, :, None, None]
    block = gl.arange(0, BLOCKS, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))[None, None, :, None]
    element = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))[None, None, None, :]
    lane = element // 4
    token = ((gl.program_id(1) * BLOCKS + block) * 8 + lane // 4).to(gl.int64)
    # operand B: register r of lane 4 n + q holds the input pair q + 4 r of token n
    x = inputs + token * stride + lane % 4 + 4 * (element % 4)
    zero = gl.zeros([WARPS, STEPS, BLOCKS, 128], gl.float32, L)
    upper, lower, up_upper, up_lower = zero, zero, zero, zero
    at = warp * STEPS + step
    b = gl.load(x + at * 16, mask=(at < WORDS) & (token < TOKENS), other=0)
    a0, a1, e = _load_tiles(A, E, at, element, at < WORDS, pair, WORDS)
    if GATED:
        up0, up1, up_e = _load_tiles(A_up, E_up, at, element, at < WORDS, pair, WORDS)
    for _ in range(0, WORDS, WARPS * STEPS):
        # the next steps are on their way while these are multiplied: the assembler puts a load beside its use otherwise
        at += WARPS * STEPS
        next_b = gl.load(x + at * 16, mask=(at < WORDS) & (token < TOKENS), other=0)
        next0, next1, next_e = _load_tiles(A, E, at, element, at < WORDS, pair, WORDS)
        upper, lower = _add_tiles(a0, a1, e, b, upper, lower, TYPE)
        a0, a1, e = next0, next1, next_e
        if GATED:
            next0, next1, next_e = _load_tiles(A_up, E_up, at, element, at < WORDS, pair, WORDS)
            up_upper, up_lower = _add_tiles(up0, up1, up_e, b, up_upper, up_lower, TYPE)
            up0, up1, up_e = next0, next1, next_e
        b = next_b
    y0, y1 = _over_warps(upper, L), _over_warps(lower, L)
    if GATED:
        y0 = y0 * _sigmoid(y0) * _over_warps(up_upper, L)
        y1 = y1 * _sigmoid(y1) * _over_warps(up_lower, L)
    # result: register r of lane 4 g + q is row g + 8 (r // 2), token 2 q + r % 2
    R: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, L))
    element = gl.arange(0, 128, layout=gl.SliceLayout(0, R))[None, :]
    tokens = (gl.program_id(1) * BLOCKS + gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, R))[:, None]) * 8
    tokens = (tokens + 2 * (element // 4 % 4) + element % 2).to(gl.int64)
    row = pair * 32 + element // 16 + 8 * (element % 4 // 2)
    store(y0, bias, out, row, tokens, TOKENS, ROWS, BIAS, ACTIVATION)
    store(y1, bias, out, row + 16, tokens, TOKENS, ROWS, BIAS, ACTIVATION)


# ---------------------------------------------------------------- host side


@dataclass(frozen=True)
class Tile:
    """Warps that split the columns, steps in flight for each, blocks of eight tokens."""

    warps: int
    steps: int
    blocks: int


# {(blocks, gated): tile}; the tests compile each for sm_80 and sm_90 without spilling.
TILES = {(1, False): Tile(8, 4, 1), (2, False): Tile(8, 4, 2), (1, True): Tile(8, 4, 1), (2, True): Tile(8, 2, 2)}


def choose_tile(tokens: int, gated: bool) -> Tile:
    """One block of eight tokens while they fit, two above; a gated product holds twice the sums."""
    return TILES[1 if tokens <= 8 else 2, gated]


def refuse(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why mma.sp cannot multiply in `dtype` on a device, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"mma.sp needs an NVIDIA GPU; the weight is on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "mma.sp needs compute capability 8.0 (Ampere) or newer"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"mma.sp takes float16 or bfloat16; the weight is {dtype}"
    return None


def matmul(weight: Fragments, inputs: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """inputs [T, K] of the weight's dtype, on its device -> activation(inputs weight^T + bias) [T, N].

    Raises SparseGPTError for an unknown activation or operands that do not belong together.
    """
    return _launch(weight, None, inputs, bias, activation)


def swiglu(gate: Fragments, up: Fragments, inputs: Tensor) -> Tensor:
    """inputs [T, K] -> silu(inputs gate^T) * (inputs up^T) [T, N], in one kernel over both weights.

    Raises SparseGPTError for weights of two shapes, and as `matmul`.
    """
    if gate.shape != up.shape:
        raise SparseGPTError(f"swiglu: gate {gate.shape} and up {up.shape} must have one shape")
    return _launch(gate, up, inputs, None, "none")


def check_operands(weight: Fragments, inputs: Tensor, activation: str) -> None:
    """Raises SparseGPTError for an unknown activation, or inputs that are not [T, K] of the weight's dtype."""
    columns = weight.shape[1]
    if activation not in ACTIVATIONS:
        raise SparseGPTError(f"activation: expected one of {', '.join(ACTIVATIONS)}; found {activation!r}")
    if inputs.ndim != 2 or inputs.shape[1] != columns or inputs.dtype != weight.dtype:
        raise SparseGPTError(
            f"weight {weight.shape} {weight.dtype} expects inputs [T, {columns}] of its dtype; "
            f"found {tuple(inputs.shape)} {inputs.dtype}"
        )


def _launch(weight: Fragments, up: Fragments | None, inputs: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    check_operands(weight, inputs, activation)
    (rows, columns), tokens = weight.shape, inputs.shape[0]
    out = inputs.new_empty(tokens, rows)
    if tokens == 0:
        return out
    padded = padded_columns(columns)
    pairs = whole_inputs(inputs, padded).view(torch.int32)
    tile, second = choose_tile(tokens, up is not None), up or weight
    grid = (-(-rows // PAIR_ROWS), triton.cdiv(tokens, 8 * tile.blocks))
    with torch.cuda.device_of(inputs):  # Triton launches on the current device, wherever the tensors are
        decode_kernel[grid](
            pairs, weight.A, weight.E, second.A, second.E, out if bias is None else bias, out,
            tokens, rows, padded // WORD_COLUMNS, pairs.stride(0),
            WARPS=tile.warps, STEPS=tile.steps, BLOCKS=tile.blocks, TYPE=ptx_type(weight.dtype),
            BIAS=bias is not None, ACTIVATION=activation, GATED=up is not None, num_warps=tile.warps,
        )  # fmt: skip
    return out


def ptx_type(dtype: torch.dtype) -> str:
    """PTX name of a 16-bit type."""
    return "bf16" if dtype == torch.bfloat16 else "f16"
