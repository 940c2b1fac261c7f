"""The C++ kernels for weights of any pattern against float64, on every path of this machine."""

import pytest
import torch

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.cpu import library
from sparsegpt.kernels.cpu.bitmask import Masked, prepare, refusal, run, run_swiglu, unpack_fast
from sparsegpt.kernels.cpu.library import LEVELS, machine_level
from sparsegpt.kernels.format.bitmask import pack_bitmask, unpack_bitmask
from sparsegpt.kernels.format.bitmask_integers import dequantize_bitmask, quantize_bitmask
from tests.kernels.helpers import relative_error, sparse_weight

# float32 sums of products of up to 1100 terms; one rounding to 8 bits for bfloat16, of dense integers two
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
HERE = LEVELS[: library.level_number(library.best_level()) + 1]
KINDS = [(bits, dtype) for bits in (None, 8, 4) for dtype in (torch.bfloat16, torch.float32)]
CASES = [(1, 1, 0.5), (5, 33, 0.0), (64, 288, 0.5), (67, 352, 0.99), (33, 700, 0.7), (11, 1100, 0.3), (4, 64, 1.0)]
pytestmark = pytest.mark.skipif(machine_level() is None, reason="no C++ compiler here")


def packed(rows: int, columns: int, zeros: float, bits: int | None, dtype: torch.dtype, seed: int = 0) -> Masked:
    weight = sparse_weight(rows, columns, zeros, dtype, seed)
    return (pack_bitmask(weight) if bits is None else quantize_bitmask(weight, bits, 64)).settled()


def stands_for(weight: Masked) -> torch.Tensor:
    dense = unpack_bitmask if hasattr(weight, "values") else dequantize_bitmask
    return dense(weight).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize(("bits", "dtype"), KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 7, 17, 65])
def test_products_against_float64(
    tokens: int, bits: int | None, dtype: torch.dtype, level: str, poisoned: None
) -> None:
    for seed, (rows, columns, zeros) in enumerate(CASES):
        weight = packed(rows, columns, zeros, bits, dtype, seed)
        inputs = torch.randn(tokens, columns).to(dtype)
        bias = torch.randn(rows).to(dtype) if seed % 2 else None
        expected = inputs.double() @ stands_for(weight).T + (0 if bias is None else bias.double())
        assert relative_error(run(weight, inputs, bias, level=level), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize(("bits", "dtype"), KINDS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_swiglu_against_float64(tokens: int, bits: int | None, dtype: torch.dtype, level: str, poisoned: None) -> None:
    for rows, columns in ((1, 32), (70, 100), (37, 600)):
        gate, up = packed(rows, columns, 0.5, bits, dtype, 1), packed(rows, columns, 0.7, bits, dtype, 2)
        inputs = torch.randn(2, tokens, columns).to(dtype)
        gated = inputs.double() @ stands_for(gate).T
        expected = gated / (1 + (-gated).exp()) * (inputs.double() @ stands_for(up).T)
        assert relative_error(run_swiglu(gate, up, inputs, level=level), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_unpack_fast_is_unpack(dtype: torch.dtype, level: str, poisoned: None) -> None:
    for rows, columns, zeros in CASES:
        weight = sparse_weight(rows, columns, zeros, dtype)
        whole = pack_bitmask(weight).settled()
        assert torch.equal(unpack_fast(whole, level=level), weight)
        out = torch.empty(rows - rows // 3, columns, dtype=dtype)
        assert torch.equal(unpack_fast(whole.rows(slice(rows // 3, rows)), out=out, level=level), weight[rows // 3 :])
    for bits in (8, 4):
        small = quantize_bitmask(sparse_weight(33, 300, 0.6, dtype), bits, 96).settled()
        found, expected = unpack_fast(small, level=level), dequantize_bitmask(small)
        assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("level", HERE)
def test_unpack_fast_keeps_every_bit(level: str) -> None:
    weight = torch.zeros(4, 40)
    weight[0, :2] = torch.tensor([float("nan"), float("-inf")])
    weight[1, 6:8] = torch.tensor([1e-42, -1e-45])
    weight[2, 39] = torch.tensor(0x7FA12345, dtype=torch.int32).view(torch.float32)  # a signalling NaN
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        whole = pack_bitmask(weight.to(dtype)).settled()
        assert torch.equal(unpack_fast(whole, level=level).view(bits), unpack_bitmask(whole).view(bits))


def test_threads_do_not_change_the_bits() -> None:
    weight, inputs = packed(1024, 256, 0.6, None, torch.bfloat16), torch.randn(3, 256).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(weight, inputs, None)
        torch.set_num_threads(3)
        assert torch.equal(run(weight, inputs, None), one)
    finally:
        torch.set_num_threads(threads)


def test_refusals() -> None:
    half = packed(4, 32, 0.5, None, torch.float16)
    assert "computes in bfloat16 and float32" in str(refusal(half))
    assert "computes in bfloat16 and float32" in str(refusal(packed(4, 32, 0.5, 8, torch.float16)))
    whole = packed(4, 64, 0.5, None, torch.float32)
    assert refusal(whole) is None and prepare(whole) is whole
    with pytest.raises(SparseGPTError, match="one shape"):
        run_swiglu(whole, packed(8, 64, 0.5, None, torch.float32), torch.randn(1, 64))
