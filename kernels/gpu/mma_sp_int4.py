"""Decoding with int4 values on sparse tensor cores: out = activation(x W^T + b), W = q * scale with 2:4 zeros.

    bytes read: 2 bits of value, 1 of metadata and 16 / group_size of scale for each weight, 3.1 of a dense 16

As mma_sp.py, with the kept values as nibbles q + 8. Two of them become a register of two 16-bit floats without a
conversion: OR the nibble into the mantissa of a power of two (1024 in float16, 128 in bfloat16), then take the power
and the 8 away by one fused multiply-add, exactly. Scales multiply the float32 sums once for each 128 columns.

    Q [N/16, K/128, 32 lanes * 4 steps] int32   nibbles i and i + 4 are the two values of register i of that step
    E [N/32, K/128, 32 lanes * 4 steps] int32   metadata of fragments.py, four steps together
    S [N, K/group_size] float16

Marrying the two is Sparse-MARLIN's idea (Frantar et al. 2024, arXiv:2408.11743). Needs compute capability 8.0. Not yet
run on a GPU: chosen by itself only where `tune` has measured it."""

# mypy: disable-error-code="no-untyped-def,no-any-return,attr-defined,untyped-decorator"
# Gluon is not typed: bodies of jitted functions are programs in it, not Python.
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.pack import EMPTY_WORD
from sparsegpt.kernels.format.quantized import Quantized24, unpack_integers
from sparsegpt.kernels.gpu.fragments import PAIR_ROWS, TILE_ROWS, order_meta, register_positions, whole_inputs
from sparsegpt.kernels.gpu.mma_sp import multiply_add, ptx_type, store
from sparsegpt.kernels.gpu.reference import ACTIVATIONS

STEP_COLUMNS = 128  # four instructions of 32 columns
WARPS = 8
_ZERO_OFFSET = 8


@gluon.constexpr_function
def _widen_text(TYPE, STEP):
    """Registers $0..$3 of operand A from word $(4 + STEP) of the four steps' nibbles."""
    power, minus, one = ("0x64006400", "0xe408e408", "0x3c003c00") if TYPE == "f16" else (
        "0x43004300", "0xc308c308", "0x3f803f80")  # fmt: skip
    lines = [f"{{ .reg .b32 t, one, minus; mov.b32 one, {one}; mov.b32 minus, {minus};"]
    for register in range(4):
        lines.append(f"shr.u32 t, ${4 + STEP}, {4 * register};")
        lines.append(f"lop3.b32 t, t, 0x000f000f, {power}, 0xEA;")  # (t & mask) | power
        lines.append(f"fma.rn.{TYPE}x2 ${register}, t, one, minus;")
    return " ".join(lines) + " }"


@gluon.jit
def _widen(q, TYPE: gl.constexpr, STEP: gl.constexpr):
    return gl.inline_asm_elementwise(
        _widen_text(TYPE, STEP), "=&r,=&r,=&r,=&r,r,r,r,r", [q], dtype=gl.int32, is_pure=True, pack=4
    )


@gluon.constexpr_function
def _layout(WARPS, BLOCKS):
    """[WARPS, BLOCKS of 8 tokens, 32 lanes * 4]."""
    powers = [1 << i for i in range(8)]
    registers = [[0, 0, 1], [0, 0, 2]] + [[0, p, 0] for p in powers if p < BLOCKS]
    lanes = [[0, 0, 4 << i] for i in range(5)]
    return gl.DistributedLinearLayout(
        registers, lanes, [[p, 0, 0] for p in powers if p < WARPS], [], [WARPS, BLOCKS, 128]
    )


@gluon.jit
def _load_step(Q, E, scales, at, element, pair, STEPS, scale_stride, STEPS_OF_SCALE: gl.constexpr):
    """Nibbles of the two 16-row tiles of a pair, metadata and scales of step `at` of 128 columns."""
    live = at < STEPS
    q0 = gl.load(Q + (pair * 2 * STEPS + at) * 128 + element, mask=live, other=0)
    q1 = gl.load(Q + (pair * 2 * STEPS + STEPS + at) * 128 + element, mask=live, other=0)
    e = gl.load(E + (pair * STEPS + at) * 128 + element, mask=live, other=0x44444444)
    s0 = gl.load(scales + at // STEPS_OF_SCALE, mask=live, other=0.0)
    return q0, q1, e, s0, gl.load(scales + 16 * scale_stride + at // STEPS_OF_SCALE, mask=live, other=0.0)


@gluon.jit
def _add_step(loaded, x, at, STEPS, inside, upper, lower, zero, TYPE: gl.constexpr):
    """The sums of both tiles with the products of a loaded step added; `inside`: tokens that there are."""
    q0, q1, e, s0, s1 = loaded
    part0, part1 = zero, zero
    for step in gl.static_range(4):
        b = gl.load(x + at * 64 + step * 16, mask=(at < STEPS) & inside, other=0)
        part0 = multiply_add(_widen(q0, TYPE, step), b, part0, e, TYPE, "0x0", step)
        part1 = multiply_add(_widen(q1, TYPE, step), b, part1, e, TYPE, "0x1", step)
    return upper + part0 * s0.to(gl.float32), lower + part1 * s1.to(gl.float32)


@gluon.jit
def int4_kernel(
    inputs, Q, E, S, bias, out, TOKENS, ROWS, STEPS, stride, scale_stride,
    WARPS: gl.constexpr, BLOCKS: gl.constexpr, TYPE: gl.constexpr, STEPS_OF_SCALE: gl.constexpr,
    BIAS: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """32 rows and 8 * BLOCKS tokens; STEPS of 128 columns; inputs are pairs [TOKENS, K/2] int32."""
    L: gl.constexpr = _layout(WARPS, BLOCKS)
    pair = gl.program_id(0)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    block = gl.arange(0, BLOCKS, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    element = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    lane = element // 4
    token = ((gl.program_id(1) * BLOCKS + block) * 8 + lane // 4).to(gl.int64)
    x = inputs + token * stride + lane % 4 + 4 * (element % 4)
    scales = S + (pair * 32 + lane // 4 + 8 * (element % 4 // 2)) * scale_stride
    zero = gl.zeros([WARPS, BLOCKS, 128], gl.float32, L)
    upper, lower = zero, zero
    # of two steps one is on its way while the other is multiplied
    at = warp
    one = _load_step(Q, E, scales, at, element, pair, STEPS, scale_stride, STEPS_OF_SCALE)
    two = _load_step(Q, E, scales, at + WARPS, element, pair, STEPS, scale_stride, STEPS_OF_SCALE)
    for _ in range(0, STEPS, 2 * WARPS):
        upper, lower = _add_step(one, x, at, STEPS, token < TOKENS, upper, lower, zero, TYPE)
        one = _load_step(Q, E, scales, at + 2 * WARPS, element, pair, STEPS, scale_stride, STEPS_OF_SCALE)
        upper, lower = _add_step(two, x, at + WARPS, STEPS, token < TOKENS, upper, lower, zero, TYPE)
        two = _load_step(Q, E, scales, at + 3 * WARPS, element, pair, STEPS, scale_stride, STEPS_OF_SCALE)
        at += 2 * WARPS
    R: gl.constexpr = gl.SliceLayout(0, L)
    element = gl.arange(0, 128, layout=gl.SliceLayout(0, R))[None, :]
    tokens = (gl.program_id(1) * BLOCKS + gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, R))[:, None]) * 8
    tokens = (tokens + 2 * (element // 4 % 4) + element % 2).to(gl.int64)
    row = pair * 32 + element // 16 + 8 * (element % 4 // 2)
    y0, y1 = gl.convert_layout(gl.sum(upper, 0), R), gl.convert_layout(gl.sum(lower, 0), R)
    store(y0, bias, out, row, tokens, TOKENS, ROWS, BIAS, ACTIVATION)
    store(y1, bias, out, row + 16, tokens, TOKENS, ROWS, BIAS, ACTIVATION)


# ---------------------------------------------------------------- host side


@dataclass(frozen=True, eq=False)
class IntegerFragments:
    """An int4 weight [N, K] in register order: Q, E, S as in the module's key, `shape` the dense (N, K)."""

    Q: Tensor
    E: Tensor
    S: Tensor
    shape: tuple[int, int]
    group_size: int


def prepare(weight: Quantized24) -> IntegerFragments:
    """[N, K] with int4 values -> registers. Raises SparseGPTError for int8 or a group_size not divisible by 128."""
    if weight.bits != 4 or weight.group_size % STEP_COLUMNS:
        raise SparseGPTError(
            f"the int4 kernel needs 4 bits and a group_size divisible by {STEP_COLUMNS}; "
            f"found {weight.bits} bits, group_size {weight.group_size}"
        )
    rows, words = -weight.shape[0] % PAIR_ROWS, -weight.meta.shape[1] % (STEP_COLUMNS // 32)
    q = functional.pad(unpack_integers(weight.words, 4), (0, 16 * words, 0, rows)) + _ZERO_OFFSET
    meta = functional.pad(weight.meta, (0, words, 0, rows), value=EMPTY_WORD)
    E = rearrange(order_meta(meta), "pair (step four) lane -> pair step (lane four)", four=4)
    S = functional.pad(weight.scales, (0, 0, 0, rows))
    return IntegerFragments(_order_nibbles(q), E.contiguous(), S.contiguous(), weight.shape, weight.group_size)


def matmul(weight: IntegerFragments, inputs: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """inputs [T, K] in float16 or bfloat16 -> activation(inputs weight^T + bias) [T, N].

    Raises SparseGPTError for an unknown activation or inputs of another shape or type.
    """
    (rows, columns), tokens = weight.shape, inputs.shape[0]
    if activation not in ACTIVATIONS:
        raise SparseGPTError(f"activation: expected one of {', '.join(ACTIVATIONS)}; found {activation!r}")
    if inputs.ndim != 2 or inputs.shape[1] != columns or inputs.dtype not in (torch.float16, torch.bfloat16):
        raise SparseGPTError(
            f"int4 weight {weight.shape} expects inputs [T, {columns}] in float16 or bfloat16; "
            f"found {tuple(inputs.shape)} {inputs.dtype}"
        )
    out = inputs.new_empty(tokens, rows)
    if tokens == 0:
        return out
    steps = weight.E.shape[1]
    pairs = whole_inputs(inputs, steps * STEP_COLUMNS).view(torch.int32)
    blocks = 1 if tokens <= 8 else 2
    with torch.cuda.device_of(inputs):  # Triton launches on the current device, wherever the tensors are
        int4_kernel[(-(-rows // PAIR_ROWS), triton.cdiv(tokens, 8 * blocks))](
            pairs, weight.Q, weight.E, weight.S, out if bias is None else bias, out,
            tokens, rows, steps, pairs.stride(0), weight.S.stride(0),
            WARPS=WARPS, BLOCKS=blocks, TYPE=ptx_type(inputs.dtype),
            STEPS_OF_SCALE=weight.group_size // STEP_COLUMNS,
            BIAS=bias is not None, ACTIVATION=activation, num_warps=WARPS,
        )  # fmt: skip
    return out


def _order_nibbles(q_NV: Tensor) -> Tensor:
    """Kept values 0..15 [N, K/2] int32 -> Q [N/16, K/128, 128]."""
    tiles = rearrange(
        q_NV, "(tile row) (step four pair half) -> tile step four row pair half", row=TILE_ROWS, four=4, pair=8, half=2
    )
    rows, pairs = register_positions()
    registers = tiles[:, :, :, rows.to(q_NV.device), pairs.to(q_NV.device)]  # tile step four lane register half
    shifts = torch.tensor([[0, 16], [4, 20], [8, 24], [12, 28]], dtype=torch.int32, device=q_NV.device)
    words: Tensor = (registers << shifts).sum((-1, -2), dtype=torch.int32)  # disjoint bits
    return rearrange(words, "tile step four lane -> tile step (lane four)").contiguous()
