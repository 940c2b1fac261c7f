"""The Triton kernels for weights of any pattern in Triton's interpreter against float64.

Run by test_interpreted.py with TRITON_INTERPRET=1 set before anything is imported.
"""

import os

import pytest
import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.bitmask import pack_bitmask, unpack_bitmask
from sparsegpt.kernels.format.bitmask_integers import dequantize_bitmask, quantize_bitmask
from sparsegpt.kernels.gpu import bitmask, reference
from tests.kernels.helpers import relative_error, sparse_weight
from tests.support import crossed

assert os.environ.get("TRITON_INTERPRET") == "1"
# float32 sums; one rounding of the result, which the interpreter truncates to 8 bits for bfloat16
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CASES = [(1, 10, 33, 0.5), (1, 5, 600, 0.9), (3, 70, 100, 0.3), (17, 33, 160, 0.99)]  # tokens, rows, columns, zeros


def operands(
    case: tuple[int, int, int, float], dtype: torch.dtype, bits: int | None = None, group: int = 64, seed: int = 0
) -> tuple[bitmask.Masked, Tensor, Tensor, Tensor]:
    """The packed weight, the one that it stands for in float64, inputs and bias."""
    tokens, rows, columns, zeros = case
    weight = sparse_weight(rows, columns, zeros, dtype, seed)
    inputs, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
    if bits is None:
        packed = pack_bitmask(weight).settled()
        return packed, unpack_bitmask(packed).double(), inputs, bias
    small = quantize_bitmask(weight.float(), bits, group).settled()
    return small, dequantize_bitmask(small).double(), inputs, bias


@crossed("case, dtype", CASES, TOLERANCE, also=[(CASES[0], dtype) for dtype in TOLERANCE])
def test_matmul_and_matvec(case: tuple[int, int, int, float], dtype: torch.dtype, poisoned: None) -> None:
    packed, dense, inputs, bias = operands(case, dtype)
    expected = inputs.double() @ dense.T
    assert relative_error(bitmask.matmul(packed, inputs), expected) < TOLERANCE[dtype]
    assert relative_error(bitmask.matmul(packed, inputs, bias), expected + bias.double()) < TOLERANCE[dtype]


@crossed("rounding, dtype", [(8, 128), (4, 32), (4, 96)], TOLERANCE)
def test_integer_values(rounding: tuple[int, int], dtype: torch.dtype, poisoned: None) -> None:
    for case in ((1, 10, 300, 0.6), (5, 33, 228, 0.5)):
        packed, dense, inputs, bias = operands(case, dtype, *rounding)
        expected = inputs.double() @ dense.T + bias.double()
        assert relative_error(bitmask.matmul(packed, inputs, bias), expected) < TOLERANCE[dtype]
        assert relative_error(reference.linear(packed, inputs, bias), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(activation: str, poisoned: None) -> None:
    for case in ((1, 10, 68, 0.5), (3, 10, 68, 0.5)):
        packed, dense, inputs, bias = operands(case, torch.float32)
        expected = reference.ACTIVATIONS[activation](inputs.double() @ dense.T + bias.double())
        assert relative_error(bitmask.matmul(packed, inputs, bias, activation), expected) < 2e-6
        assert relative_error(reference.linear(packed, inputs, bias, activation), expected) < 2e-6


@crossed("bits, dtype", [None, 8, 4], TOLERANCE)
def test_swiglu(bits: int | None, dtype: torch.dtype, poisoned: None) -> None:
    for case in ((1, 10, 100, 0.5), (17, 33, 160, 0.8)):
        gate, gate_dense, inputs, _ = operands(case, dtype, bits)
        up, up_dense, _, _ = operands(case, dtype, bits, seed=9)
        expected = torch.nn.functional.silu(inputs.double() @ gate_dense.T) * (inputs.double() @ up_dense.T)
        assert relative_error(bitmask.swiglu(gate, up, inputs), expected) < 2 * TOLERANCE[dtype]
        assert relative_error(reference.swiglu(gate, up, inputs), expected) < 2 * TOLERANCE[dtype]


def test_strided_and_empty_inputs() -> None:
    packed, dense, _, _ = operands((3, 12, 64, 0.5), torch.float32)
    for inputs in (torch.randn(5, 128)[:, :64], torch.randn(64, 5).t(), torch.randn(0, 64)):
        assert relative_error(bitmask.matmul(packed, inputs), inputs.double() @ dense.T) < 1e-6


def test_refusals() -> None:
    packed, _, inputs, _ = operands((2, 12, 64, 0.5), torch.float32)
    other = operands((2, 14, 64, 0.5), torch.float32)[0]
    with pytest.raises(SparseGPTError, match="expects inputs"):
        bitmask.matmul(packed, inputs[:, :60])
    with pytest.raises(SparseGPTError, match="float16"):
        bitmask.matmul(packed, inputs.half())
    with pytest.raises(SparseGPTError, match="one shape"):
        bitmask.swiglu(packed, other, inputs)
