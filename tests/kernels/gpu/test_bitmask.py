"""The Triton kernels for weights of any pattern without a GPU: run in the interpreter, compiled ahead of time."""

import re
from itertools import cycle, product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from sparsegpt.kernels.dispatch.bitmask import BITMASK, BITMASK_INTEGERS
from sparsegpt.kernels.format.bitmask import pack_bitmask
from sparsegpt.kernels.format.bitmask_integers import quantize_bitmask
from sparsegpt.kernels.gpu import bitmask
from tests.kernels.aot import compile_for
from tests.kernels.helpers import sparse_weight

KERNELS = {
    "matmul": (bitmask.matmul_kernel, bitmask.MATMUL_TILE),
    "matvec": (bitmask.matvec_kernel, bitmask.MATVEC_TILE),
    "swiglu": (bitmask.swiglu_kernel, bitmask.SWIGLU_TILE),
}
SIZES = dict.fromkeys(("TOKENS", "ROWS", "COLUMNS", "PADDED", "stride", "scale_stride"), "i32")
BYTES = dict.fromkeys(("mask", "gate_mask", "up_mask"), "*u8")
OFFSETS = dict.fromkeys(("offsets", "gate_offsets", "up_offsets"), "*i64")


# Every kernel at every kind of values, and for both architectures.
COMPILED = [(*pair, target) for pair, target in zip(product(KERNELS, (None, 8, 4)), cycle((80, 90)), strict=False)]


@pytest.mark.parametrize(("name", "bits", "target"), COMPILED)
def test_compiled_without_spills(name: str, bits: int | None, target: int) -> None:
    kernel, tile = KERNELS[name]
    weight = sparse_weight(4, 128, 0.5, torch.bfloat16)
    packed = pack_bitmask(weight) if bits is None else quantize_bitmask(weight, bits)
    values = dict.fromkeys(("values", "gate_values", "up_values"), "*bf16" if bits is None else "*u8")
    scales = dict.fromkeys(("scales", "gate_scales", "up_scales"), "*bf16" if bits is None else "*fp16")
    types = {**SIZES, **BYTES, **OFFSETS, **values, **scales, **dict.fromkeys(("inputs", "bias", "out"), "*bf16")}
    constants = {**bitmask.integer_constants(packed), **tile, "BIAS": True, "ACTIVATION": "silu"}
    names = set(kernel.arg_names)
    built = compile_for(
        kernel,
        target,
        {key: kind for key, kind in types.items() if key in names},
        {key: value for key, value in constants.items() if key in names},
    )
    assert built.stack == 0 and built.local == 0
    assert built.sass is None or not re.search(r"\b(LDL|STL)\b", built.sass)
    if "T" in tile:
        assert "mma.sync" in built.ptx or "wgmma" in built.ptx


def test_the_tables_offer_it_to_gpus_alone() -> None:
    packed = pack_bitmask(sparse_weight(4, 64, 0.5)).settled()
    assert "need a GPU" in str(BITMASK.routes["portable"].refusal(packed))
    small = quantize_bitmask(sparse_weight(4, 64, 0.5), 8).settled()
    assert "need a GPU" in str(BITMASK_INTEGERS.routes["portable"].refusal(small))
