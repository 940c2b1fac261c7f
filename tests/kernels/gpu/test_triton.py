"""Triton and Gluon kernels without a GPU: run in the interpreter, compiled ahead of time, fragment order emulated."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")


from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels import quantize
from sparsegpt.kernels.format.pack import pack
from sparsegpt.kernels.gpu import mma_sp, mma_sp_int4, portable, reference
from sparsegpt.kernels.gpu.fragments import register_positions, to_fragments
from tests.kernels.aot import Built, compile_for, loads_in_flight
from tests.kernels.gpu.gluon_emulator import emulate
from tests.kernels.helpers import relative_error, weight24

# Both dtypes take the same registers: for every kernel each dtype and each architecture, but not their product.
COMPILED = pytest.mark.parametrize(("dtype", "target"), [("fp16", 80), ("bf16", 90)])


# ---------------------------------------------------------------- compiled ahead of time


def check_no_spills(built: Built) -> None:
    assert built.stack == 0 and built.local == 0
    assert built.sass is None or not re.search(r"\b(LDL|STL)\b", built.sass)


SIZES = dict.fromkeys(("TOKENS", "ROWS", "COLUMNS", "PADDED", "stride", "scale_stride"), "i32")
PORTABLE = {
    "matmul": (portable.matmul_kernel, ("inputs", "values", "bias", "out"), portable.MATMUL_TILE),
    "matvec": (portable.matvec_kernel, ("inputs", "values", "bias", "out"), portable.MATVEC_TILE),
    "swiglu": (portable.swiglu_kernel, ("inputs", "gate_values", "up_values", "out"), portable.SWIGLU_TILE),
    "int8": (portable.integer_kernel, ("inputs", "bias", "out"), portable.INTEGER_TILE | portable.integer_step(8, 128)),
    "int4": (portable.integer_kernel, ("inputs", "bias", "out"), portable.INTEGER_TILE | portable.integer_step(4, 128)),
}


@COMPILED
@pytest.mark.parametrize("name", PORTABLE)
def test_portable_kernels_compile_without_spills(name: str, dtype: str, target: int) -> None:
    kernel, floating, tile = PORTABLE[name]
    words = ("meta", "gate_meta", "up_meta", "quantized")
    types = {**SIZES, **dict.fromkeys(words, "*i32"), **dict.fromkeys(floating, f"*{dtype}"), "scales": "*fp16"}
    constants = {**tile, "BIAS": True, "ACTIVATION": "silu"}
    names = set(kernel.arg_names)
    built = compile_for(
        kernel,
        target,
        {key: kind for key, kind in types.items() if key in names},
        {key: value for key, value in constants.items() if key in names},
    )
    check_no_spills(built)
    if "T" in tile:
        assert "mma.sync" in built.ptx or "wgmma" in built.ptx


@COMPILED
@pytest.mark.parametrize(("blocks", "gated"), mma_sp.TILES)
def test_sparse_tensor_cores_are_used_without_spills(blocks: int, gated: bool, dtype: str, target: int) -> None:
    tile = mma_sp.TILES[blocks, gated]
    types = {
        **dict.fromkeys(("inputs", "A", "E", "A_up", "E_up"), "*i32"),
        **dict.fromkeys(("bias", "out"), f"*{dtype}"),
        **dict.fromkeys(("TOKENS", "ROWS", "WORDS", "stride"), "i32"),
    }
    kind = mma_sp.ptx_type(torch.bfloat16 if dtype == "bf16" else torch.float16)
    constants = {"WARPS": tile.warps, "STEPS": tile.steps, "BLOCKS": tile.blocks, "TYPE": kind}
    constants |= {"BIAS": not gated, "ACTIVATION": "none" if gated else "silu", "GATED": gated}
    built = compile_for(mma_sp.decode_kernel, target, types, constants, tile.warps)
    check_no_spills(built)
    products = 2 * tile.steps * tile.blocks * (2 if gated else 1)  # two tiles of 16 rows for each step and block
    assert len(re.findall(r"mma\.sp::ordered_metadata", built.ptx)) == products
    if built.sass is not None:
        assert len(re.findall(r"HMMA\.SP\.16832\.F32", built.sass)) == products
        # a lane's four registers of A come with one load, and those of all steps are on their way together: one block
        # of 8 warps has to keep a multiprocessor's share of the memory busy, 23 KiB on an H200
        assert loads_in_flight(built.sass) >= 2 * tile.steps * (2 if gated else 1)


@COMPILED
@pytest.mark.parametrize("blocks", [1, 2])
def test_int4_on_sparse_tensor_cores_without_spills(blocks: int, dtype: str, target: int) -> None:
    types = {
        **dict.fromkeys(("inputs", "Q", "E"), "*i32"),
        **dict.fromkeys(("bias", "out"), f"*{dtype}"),
        **dict.fromkeys(("TOKENS", "ROWS", "STEPS", "stride", "scale_stride"), "i32"),
        "S": "*fp16",
    }
    kind = mma_sp.ptx_type(torch.bfloat16 if dtype == "bf16" else torch.float16)
    constants = {"WARPS": mma_sp_int4.WARPS, "BLOCKS": blocks, "TYPE": kind, "STEPS_OF_SCALE": 1}
    constants |= {"BIAS": True, "ACTIVATION": "silu"}
    built = compile_for(mma_sp_int4.int4_kernel, target, types, constants, mma_sp_int4.WARPS)
    check_no_spills(built)
    assert len(re.findall(r"mma\.sp::ordered_metadata", built.ptx)) == 16 * blocks  # of two steps
    if built.sass is not None:
        assert len(re.findall(r"HMMA\.SP\.16832\.F32", built.sass)) == 16 * blocks
        assert loads_in_flight(built.sass) >= 6  # values of two tiles and metadata, of two steps


# ---------------------------------------------------------------- emulated lane by lane


# float32 sums and one rounding of the result
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 32, 32), (3, 40, 100), (9, 7, 64), (17, 64, 1200)])
def test_mma_sp_emulated(
    tokens: int, rows: int, columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    gate, up = weight24(rows, columns, dtype, 1), weight24(rows, columns, dtype, 2)
    inputs, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
    fragments, second = to_fragments(pack(gate)), to_fragments(pack(up))
    emulate(monkeypatch, mma_sp)
    plain = inputs.double() @ gate.double().T
    assert relative_error(mma_sp.matmul(fragments, inputs), plain) < TOLERANCE[dtype]
    for activation in ("silu", "gelu", "relu2"):
        expected = reference.ACTIVATIONS[activation](plain + bias.double())
        found = mma_sp.matmul(fragments, inputs, bias, activation)
        assert relative_error(found, expected) < 2 * TOLERANCE[dtype]
    expected = torch.nn.functional.silu(plain) * (inputs.double() @ up.double().T)
    assert relative_error(mma_sp.swiglu(fragments, second, inputs), expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "group_size"), [(1, 32, 128, 128), (3, 40, 300, 128), (17, 7, 1200, 256)]
)
def test_mma_sp_int4_emulated(
    tokens: int,
    rows: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    poisoned: None,
) -> None:
    small = quantize(pack(weight24(rows, columns, dtype)), 4, group_size)
    inputs, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
    expected = reference.linear(small, inputs.float(), bias.float(), "relu")
    weight = mma_sp_int4.prepare(small)
    emulate(monkeypatch, mma_sp, mma_sp_int4)
    monkeypatch.setattr(mma_sp_int4, "multiply_add", mma_sp.multiply_add)
    monkeypatch.setattr(mma_sp_int4, "store", mma_sp.store)
    assert relative_error(mma_sp_int4.matmul(weight, inputs, bias, "relu"), expected) < TOLERANCE[dtype]


# ---------------------------------------------------------------- fragment order


def test_metadata_registers_are_cutlass_words() -> None:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    weight = weight24(128, 256, torch.float16)
    weight = torch.where(weight == 0, weight, 1)  # all groups full: torch fills the others in its own way
    groups = weight.view(128, 64, 4)
    groups[(groups != 0).sum(-1) < 2] = torch.tensor([0.0, 1, 0, 1], dtype=torch.float16)
    values, meta = sparse_semi_structured_from_dense_cutlass(weight)
    fragments = to_fragments(pack(weight))
    assert torch.equal(fragments.E.permute(1, 0, 2).flatten(), meta.contiguous().flatten().view(torch.int32))
    rows, pairs = register_positions()
    first_tile = values.view(torch.int32)[:16, :8]
    assert torch.equal(fragments.A[0, 0].view(32, 4), first_tile[rows, pairs])


def test_int4_refusals() -> None:
    packed = pack(weight24(32, 128, torch.float16))
    for bits, group_size in ((8, 128), (4, 64)):
        with pytest.raises(SparseGPTError, match="needs 4 bits"):
            mma_sp_int4.prepare(quantize(packed, bits, group_size))
    weight = mma_sp_int4.prepare(quantize(packed, 4))
    with pytest.raises(SparseGPTError, match="expects inputs"):
        mma_sp_int4.matmul(weight, torch.randn(2, 128))
    with pytest.raises(SparseGPTError, match="expected one of none"):
        mma_sp_int4.matmul(weight, torch.randn(2, 128).half(), None, "swish")
    assert mma_sp_int4.matmul(weight, torch.randn(0, 128).half()).shape == (0, 32)


def test_mma_sp_refusals() -> None:
    packed = pack(weight24(32, 64, torch.float16))
    assert "NVIDIA GPU" in str(mma_sp.refuse(packed.device, packed.dtype))
    with pytest.raises(SparseGPTError, match="float16 or bfloat16"):
        to_fragments(pack(weight24(32, 64)))
    fragments = to_fragments(packed)
    with pytest.raises(SparseGPTError, match="expects inputs"):
        mma_sp.matmul(fragments, torch.randn(2, 64))
    with pytest.raises(SparseGPTError, match="expected one of none"):
        mma_sp.matmul(fragments, torch.randn(2, 64).half(), None, "swish")
    with pytest.raises(SparseGPTError, match="one shape"):
        mma_sp.swiglu(fragments, to_fragments(pack(weight24(64, 64, torch.float16))), torch.randn(2, 64).half())
    assert mma_sp.matmul(fragments, torch.randn(0, 64).half()).shape == (0, 32)
