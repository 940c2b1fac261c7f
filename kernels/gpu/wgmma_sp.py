"""Many tokens on Hopper's sparse tensor cores, for prefill and perplexity: out = activation(x W^T + b).

A Gluon kernel that issues PTX `wgmma.mma_async.sp.m64nNk32`, for which Gluon has no operation of its own. The weight is
operand A, from registers, and lies in memory as fragments.py orders it: a warpgroup is four warps, and warp w of it
multiplies the w-th pair of 16-row tiles, the upper tile with selector 0, the lower with selector 1. The inputs are
operand B, 64 columns a step, in shared memory as a row of 128 bytes for each token n:

    chunk c of 16 bytes of row n lies at   128 n + 16 (c ^ (n % 8)): 128-byte swizzle, which repeats after 8 rows
    descriptor of operand B                start / 16 | 1 << 16 | 1024 / 16 << 32 | 1 << 62: leading offset (unused),
                                           bytes to the next 8 rows, swizzle mode
    the step's other 32 columns            start + 64, within the same rows: the swizzle follows the address

    A, register r of lane 4 g + q          row g + 8 (r % 2), kept pair q + 4 (r // 2)
    metadata, lane 4 g + 2 s + h           rows g and g + 8, columns 16 h to 16 h + 15, for selector s
    sums, register j of lane 4 g + q       row g + 8 (j // 2 % 2), token 8 (j // 4) + 2 q + j % 2

The products are asynchronous, and the compiler does not know: it may move registers that they still use. So one block
of assembly is their whole life: fence, four products (two tiles, 32 columns twice), commit, wait. Meanwhile the next
step's weights are on their way to registers, and the inputs of STAGES - 1 steps to shared memory. They are written by
cp.async and read through the asynchronous proxy, so a stage goes through

    copies, each waited for by its thread | proxy fence | barrier | products, waited for | next step's barrier | copies

Needs compute capability 9.0 exactly (Hopper; Blackwell has no wgmma). Not yet run on a GPU: chosen by itself only where
`tune` has measured it.
Sources: PTX ISA 9.1, 9.7.15 "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions" (async proxy,
register fragments, canonical layouts, matrix descriptor, sparse matrix storage, wgmma.fence); the same layouts in
CUTLASS's cute/atom: ALayout_64x32 and CLayout_64xN of mma_traits_sm90_gmma.hpp, ELayout_64x32 of
mma_traits_sm90_gmma_sparse.hpp."""

# mypy: disable-error-code="no-untyped-def,no-any-return,attr-defined,untyped-decorator"
# Gluon is not typed: bodies of jitted functions are programs in it, not Python.
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.gpu.fragments import Fragments, whole_inputs
from sparsegpt.kernels.gpu.mma_sp import check_operands, ptx_type, store

STEP_COLUMNS = 64  # 128 bytes of 16-bit inputs: a row of the swizzle
# Triton 3.6 has these two under the second name, 3.8 under the first; from 3.9 on it tells where shared memory lies.
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
TELLS_ADDRESS = hasattr(gl, "inline_asm")


@gluon.constexpr_function
def _layout(WARPS, BLOCKS):
    """[WARPS, 32 lanes, BLOCKS of 8 tokens, 4 registers]: which thread holds which element of the sums."""
    powers = [1 << i for i in range(8)]
    registers = [[0, 0, 0, 1], [0, 0, 0, 2]] + [[0, 0, p, 0] for p in powers if p < BLOCKS]
    lanes = [[0, p, 0, 0] for p in powers if p < 32]
    warps = [[p, 0, 0, 0] for p in powers if p < WARPS]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [WARPS, 32, BLOCKS, 4])


@gluon.constexpr_function
def products(TYPE, SUMS):
    """Assembly of one step, from fence to wait, with SUMS registers for each 64-row tile.

    Each operand has SUMS registers, of which A uses 4, metadata and address 1: the sums of the upper and of the lower
    tile as results, the same as inputs, A of (upper, lower) for columns 0 to 31 and 32 to 63, metadata of both, the
    address of B.
    """
    operands = [[f"${SUMS * i + j}" for j in range(SUMS)] for i in range(11)]
    shape = f"m64n{2 * SUMS}k32.f32.{TYPE}.{TYPE}"
    address = operands[10][0]
    lines = ["{ .reg .b32 start; .reg .b64 inputs; .reg .pred add;", "setp.eq.b32 add, 0, 0;"]
    lines.append(f"shr.u32 start, {address}, 4;")
    lines.append("cvt.u64.u32 inputs, start;")
    lines.append(f"or.b64 inputs, inputs, {1 << 62 | 1024 // 16 << 32 | 1 << 16:#x};")
    lines.append("wgmma.fence.sync.aligned;")
    for half in range(2):
        for tile in range(2):
            sums, a, e = operands[tile], operands[4 + 2 * half + tile], operands[8 + half]
            lines.append(
                f"wgmma.mma_async.sp.sync.aligned.{shape} {{{','.join(sums)}}}, {{{','.join(a[:4])}}}, "
                f"inputs, {e[0]}, {tile}, add, 1, 1, 0;"
            )
        if half == 0:
            lines.append(f"add.u64 inputs, inputs, {64 // 16};")
    lines.append("wgmma.commit_group.sync.aligned;")
    lines.append("wgmma.wait_group.sync.aligned 0; }")
    return "\n".join(lines)


@gluon.constexpr_function
def constraints(SUMS):
    """Sums of two tiles as results, tied to the inputs that follow; six operands and the address in registers."""
    return ",".join(["=f"] * (2 * SUMS) + [str(i) for i in range(2 * SUMS)] + ["r"] * (7 * SUMS))


@gluon.jit
def _weights(A, E, pair, step, lane, register, PAIRS, WORDS):
    """The registers of one step: A of (upper, lower) for its first and second word of columns, metadata of both."""
    word = 2 * step
    first, second = (pair < PAIRS) & (word < WORDS), (pair < PAIRS) & (word + 1 < WORDS)
    upper = A + (pair * 2 * WORDS + word) * 128 + lane * 4 + register
    lower = upper + WORDS * 128
    meta = E + (pair * WORDS + word) * 32 + lane
    return (
        gl.load(upper, mask=first, other=0),
        gl.load(lower, mask=first, other=0),
        gl.load(upper + 128, mask=second, other=0),
        gl.load(lower + 128, mask=second, other=0),
        gl.load(meta, mask=first, other=0x44444444),
        gl.load(meta + 32, mask=second, other=0x44444444),
    )


@gluon.jit
def wgmma_kernel(
    inputs, A, E, bias, out, TOKENS, ROWS, PAIRS, WORDS, STEPS, stride,
    WARPS: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, TYPE: gl.constexpr,
    BIAS: gl.constexpr, ACTIVATION: gl.constexpr, TOLD: gl.constexpr,
):  # fmt: skip
    """32 * WARPS rows and 8 * BLOCKS tokens; STEPS of 64 columns, of which the weight has WORDS of 32."""
    L: gl.constexpr = _layout(WARPS, BLOCKS)
    TILE: gl.constexpr = 8 * BLOCKS
    SUMS: gl.constexpr = 4 * BLOCKS
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))))[:, None, None, None]
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))[None, :, None, None]
    register = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))[None, None, None, :]
    pair = gl.program_id(0) * WARPS + warp

    # a copy of 16 bytes for each thread: eight lanes make a row of 64 columns
    C: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    token = gl.program_id(1) * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, C))[:, None]
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, C))[None, :]
    x = inputs + token.to(gl.int64) * stride + column
    stages = gl.allocate_shared_memory(
        inputs.dtype.element_ty, [STAGES, TILE, 64], gl.NVMMASharedLayout(128, element_bitwidth=16, rank=2)
    )
    # a swizzle pattern begins at a multiple of 1024 bytes: Triton places this layout so, for its own products as well
    if TOLD:
        base = gl.inline_asm("mov.b32 $0, $1;", "=r,r", (stages,), gl.int32)
    else:  # nothing else is in shared memory, as `matmul` makes sure
        base = gl.inline_asm_elementwise("mov.b32 $0, global_smem;", "=r,r", [WORDS], gl.int32, is_pure=True, pack=1)
    for step in gl.static_range(STAGES - 1):
        copy(stages.index(step), x + step * 64, mask=(token < TOKENS) & (step < STEPS))
        async_copy.commit_group()
    upper = gl.zeros([WARPS, 32, BLOCKS, 4], gl.float32, L)
    lower = upper
    a0, a1, a2, a3, e0, e1 = _weights(A, E, pair, 0, lane, register, PAIRS, WORDS)
    for step in range(0, STEPS):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        barrier()
        # the next step's weights are asked for after the fence, which would wait for them
        b0, b1, b2, b3, f0, f1 = _weights(A, E, pair, step + 1, lane, register, PAIRS, WORDS)
        ahead = step + STAGES - 1
        copy(stages.index(ahead % STAGES), x + ahead * 64, mask=(token < TOKENS) & (ahead < STEPS))
        async_copy.commit_group()
        upper, lower = gl.inline_asm_elementwise(
            products(TYPE, SUMS), constraints(SUMS),
            [upper, lower, a0, a1, a2, a3, e0, e1, base + step % STAGES * (TILE * 128)],
            dtype=(gl.float32, gl.float32), is_pure=False, pack=SUMS,
        )  # fmt: skip
        a0, a1, a2, a3, e0, e1 = b0, b1, b2, b3, f0, f1
    # the compiler may use the stages' memory from here on, where the masked copies after the last step write zeros
    async_copy.wait_group(0)
    barrier()

    # the two tiles of 16 rows of a warp are one below the other, so the sums are a matrix [tokens, rows]
    sums = gl.join(upper, lower).reshape([WARPS, 8, 4, BLOCKS, 2, 2, 2])  # warp, g, q, block, row + 8, token + 1, tile
    sums = sums.permute([3, 2, 5, 0, 6, 4, 1]).reshape([TILE, 32 * WARPS])
    D: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    row = gl.program_id(0) * (32 * WARPS) + gl.arange(0, 32 * WARPS, layout=gl.SliceLayout(0, D))[None, :]
    token = gl.program_id(1) * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, D))[:, None]
    y = gl.convert_layout(sums, D)
    store(y, bias, out, row, token.to(gl.int64), TOKENS, ROWS, BIAS, ACTIVATION)


# ---------------------------------------------------------------- host side


@dataclass(frozen=True)
class Tile:
    """Warps of 32 rows (four a warpgroup), blocks of eight tokens, stages of 64 columns of inputs in shared memory."""

    warps: int
    blocks: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """What the stages take."""
        return self.stages * self.blocks * 8 * 2 * STEP_COLUMNS


# The large tile's sums fill the registers, 128 for each thread. The tests compile both for sm_90a without spilling.
SMALL, LARGE = Tile(4, 8, 4), Tile(8, 16, 8)


def choose_tile(tokens: int) -> Tile:
    """The small tile while one of its blocks holds the tokens."""
    return SMALL if tokens <= 8 * SMALL.blocks else LARGE


def refuse(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why wgmma.sp cannot multiply in `dtype` on a device, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"wgmma.sp needs an NVIDIA GPU; the weight is on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return f"wgmma.sp needs compute capability 9.0 (Hopper); this GPU has {capability[0]}.{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"wgmma.sp takes float16 or bfloat16; the weight is {dtype}"
    return None


def matmul(weight: Fragments, inputs: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """inputs [T, K] of the weight's dtype, on its device -> activation(inputs weight^T + bias) [T, N].

    Raises SparseGPTError for an unknown activation or operands that do not belong together.
    """
    check_operands(weight, inputs, activation)
    rows, tokens = weight.shape[0], inputs.shape[0]
    out = inputs.new_empty(tokens, rows)
    if tokens == 0:
        return out
    inputs = whole_inputs(inputs, triton.cdiv(inputs.shape[1], STEP_COLUMNS) * STEP_COLUMNS)
    pairs, words, steps = weight.E.shape[0], weight.E.shape[1], inputs.shape[1] // STEP_COLUMNS
    tile = choose_tile(tokens)
    grid = (triton.cdiv(pairs, tile.warps), triton.cdiv(tokens, 8 * tile.blocks))
    with torch.cuda.device_of(inputs):  # Triton launches on the current device, wherever the tensors are
        launched = wgmma_kernel[grid](
            inputs, weight.A, weight.E, out if bias is None else bias, out,
            tokens, rows, pairs, words, steps, inputs.stride(0),
            WARPS=tile.warps, BLOCKS=tile.blocks, STAGES=tile.stages, TYPE=ptx_type(weight.dtype),
            BIAS=bias is not None, ACTIVATION=activation, TOLD=TELLS_ADDRESS, num_warps=tile.warps,
        )  # fmt: skip
    if not TELLS_ADDRESS and launched.metadata.shared != tile.shared_bytes:
        raise SparseGPTError(
            f"wgmma.sp: this Triton ({triton.__version__}) put more than the stages into shared memory, so where they "
            "begin is unknown; install Triton 3.9 or use other kernels"
        )
    return out
