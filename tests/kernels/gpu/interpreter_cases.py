"""The plain Triton kernels in Triton's interpreter against float64.

Run by test_interpreted.py with TRITON_INTERPRET=1 set before anything is imported; time goes per block, so shapes are
small and ragged rather than large.
"""

import os

import pytest
import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels import Packed24, quantize
from sparsegpt.kernels.format.pack import pack
from sparsegpt.kernels.gpu import portable, reference
from tests.kernels.helpers import relative_error, weight24
from tests.support import crossed

assert os.environ.get("TRITON_INTERPRET") == "1"
# float32 sums; one rounding of the result, which the interpreter truncates to 8 bits for bfloat16
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CASES = [(1, 40, 36), (3, 70, 100), (17, 64, 288), (64, 33, 160), (65, 70, 68)]  # tokens, rows, columns


def operands(case: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Packed24, Tensor, Tensor]:
    tokens, rows, columns = case
    weight = weight24(rows, columns, dtype, seed=tokens)
    return weight, pack(weight), torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)


@crossed("case, dtype", CASES, TOLERANCE, also=[(CASES[0], dtype) for dtype in TOLERANCE])
def test_matmul_and_matvec(case: tuple[int, int, int], dtype: torch.dtype, poisoned: None) -> None:
    weight, packed, inputs, bias = operands(case, dtype)
    expected = inputs.double() @ weight.double().T
    assert relative_error(portable.matmul(packed, inputs), expected) < TOLERANCE[dtype]
    assert relative_error(portable.matmul(packed, inputs, bias), expected + bias.double()) < TOLERANCE[dtype]


@crossed("tokens, activation", [1, 3], reference.ACTIVATIONS)
def test_activations(tokens: int, activation: str, poisoned: None) -> None:
    weight, packed, inputs, bias = operands((tokens, 40, 68), torch.float32)
    expected = reference.ACTIVATIONS[activation](inputs.double() @ weight.double().T + bias.double())
    found = portable.matmul(packed, inputs, bias, activation)
    assert relative_error(found, expected) < 2e-6
    assert relative_error(reference.linear(packed, inputs, bias, activation), expected) < 2e-6


@crossed("case, dtype", CASES[:3], TOLERANCE)
def test_swiglu(case: tuple[int, int, int], dtype: torch.dtype, poisoned: None) -> None:
    gate, packed, inputs, _ = operands(case, dtype)
    up = weight24(*case[1:], dtype, seed=99)
    expected = torch.nn.functional.silu(inputs.double() @ gate.double().T) * (inputs.double() @ up.double().T)
    assert relative_error(portable.swiglu(packed, pack(up), inputs), expected) < 2 * TOLERANCE[dtype]
    assert relative_error(reference.swiglu(packed, pack(up), inputs), expected) < 2 * TOLERANCE[dtype]


@crossed("rounding, dtype", [(8, 128), (4, 32), (4, 96)], TOLERANCE)
def test_integer_values(rounding: tuple[int, int], dtype: torch.dtype, poisoned: None) -> None:
    for case in ((1, 40, 36), (17, 33, 228)):
        _, packed, inputs, bias = operands(case, dtype)
        small = quantize(packed, *rounding)
        expected = reference.linear(small, inputs.float(), bias.float())
        assert relative_error(portable.matmul_integer(small, inputs, bias), expected) < TOLERANCE[dtype]


def test_strided_and_empty_inputs() -> None:
    weight, packed, _, _ = operands((3, 40, 64), torch.float32)
    for inputs in (torch.randn(5, 128)[:, :64], torch.randn(64, 5).t(), torch.randn(0, 64)):
        expected = inputs.double() @ weight.double().T
        assert relative_error(portable.matmul(packed, inputs), expected) < 1e-6


@pytest.mark.parametrize(
    ("inputs", "bias", "activation", "message"),
    [
        (torch.randn(2, 60), None, "none", "expects inputs"),
        (torch.randn(2, 64), torch.randn(3), "none", "bias"),
        (torch.randn(2, 64), None, "swish", "expected one of none"),
        (torch.randn(2, 64).half(), None, "none", "float16"),
        (torch.randn(2, 64, device="meta"), None, "none", "meta"),
    ],
)
def test_refusals(inputs: Tensor, bias: Tensor | None, activation: str, message: str) -> None:
    with pytest.raises(SparseGPTError, match=message):
        portable.matmul(pack(weight24(40, 64)), inputs, bias, activation)
