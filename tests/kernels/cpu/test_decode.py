"""What lies between the products of a block, against float64; and calls as one program, as they are one by one."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.cpu import decode, library, packed24
from sparsegpt.kernels.cpu.library import LEVELS, NOTHING, Call
from sparsegpt.kernels.cpu.program import Program
from sparsegpt.kernels.format.pack import pack
from tests.kernels.helpers import relative_error, weight24

pytestmark = pytest.mark.skipif(library.machine_level() is None, reason="no C++ compiler here")

HERE = [name for name in LEVELS[: library.level_number(library.best_level()) + 1] if name != "amx"]
# float32 sums; in bfloat16 each step of the rotary positions rounds, and so does the result
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [0, 1, 5, 70])
def test_attention_of_one_token_against_float64(length: int, dtype: torch.dtype, level: str) -> None:
    for (heads, shared), size in itertools.product([(1, 1), (6, 2)], [2, 24, 64]):
        q, k, v = (torch.randn(count, size).to(dtype) for count in (heads, shared, shared))
        angles = torch.rand(size // 2).repeat(2)
        turn = (angles.cos().to(dtype), angles.sin().to(dtype))
        keys, values = (torch.randn(shared, length + 3, size).to(dtype) for _ in range(2))
        before, outputs = (keys.clone(), values.clone()), torch.full((heads, size), math.nan, dtype=dtype)
        library.call(*decode.attend((q, k, v), turn, (keys, values), outputs, length, 0.3), level)

        cos, sin = (part.double() for part in turn)
        all_keys = torch.cat((before[0][:, :length].double(), turned(k.double(), cos, sin)[:, None]), 1)
        all_values = torch.cat((before[1][:, :length], v[:, None]), 1).double()
        each = heads // shared
        scores = 0.3 * turned(q.double(), cos, sin)[:, None] @ all_keys.repeat_interleave(each, 0).mT
        expected = (scores.softmax(-1) @ all_values.repeat_interleave(each, 0))[:, 0]
        assert relative_error(outputs, expected) < TOLERANCE[dtype]
        assert relative_error(keys[:, length], all_keys[:, length]) < TOLERANCE[dtype]
        assert torch.equal(values[:, length], v)
        for kept, old in zip((keys, values), before, strict=True):
            kept[:, length] = old[:, length]
            assert torch.equal(kept, old)


@pytest.mark.parametrize("level", HERE)
def test_scores_of_any_size(level: str) -> None:
    """Softmax of a score far above the others, and of equal ones."""
    for size_of_scores, share in ((1e4, 1.0), (0.0, 1 / 6)):
        q, k = torch.ones(1, 2), torch.ones(1, 2) * size_of_scores
        keys, values = torch.zeros(1, 6, 2), torch.zeros(1, 6, 2)
        outputs, turn = torch.empty(1, 2), (torch.ones(2), torch.zeros(2))
        library.call(*decode.attend((q, k, torch.ones(1, 2)), turn, (keys, values), outputs, 5, 1.0), level)
        torch.testing.assert_close(outputs, torch.full((1, 2), share))


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gate_against_float64(dtype: torch.dtype, level: str) -> None:
    gated = torch.cat((torch.linspace(-100, 100, 131), torch.tensor([0.0]))).to(dtype)
    up = torch.randn(132).to(dtype)
    outputs = torch.full((132,), math.nan, dtype=dtype)
    library.call(*decode.gate(gated, up, outputs), level)
    expected = gated.double() / (1 + (-gated.double()).exp()) * up.double()
    torch.testing.assert_close(outputs.double(), expected, rtol=TOLERANCE[dtype], atol=1e-30)


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sums_and_their_norms_against_float64(dtype: torch.dtype, level: str) -> None:
    inputs, delta, weight = torch.randn(3, 37).to(dtype), torch.randn(3, 37).to(dtype), torch.randn(37).to(dtype)
    total, alone, outputs = (torch.full((3, 37), math.nan, dtype=dtype) for _ in range(3))
    library.call(*decode.residual(inputs, delta, total, weight, 1e-2, outputs), level)
    library.call(*decode.add(inputs, delta, alone), level)
    assert torch.equal(total, inputs + delta) and torch.equal(alone, total)
    exact = total.double()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight.double()
    assert relative_error(outputs, expected) < TOLERANCE[dtype]


def chain(inputs: Tensor, middle: Tensor, outputs: tuple[Tensor, Tensor]) -> list[tuple[bool, Call]]:
    """A product, and two that need it."""
    weights = [pack(weight24(96, 96, inputs.dtype, seed)) for seed in range(3)]
    big = pack(weight24(1200, 96, inputs.dtype, 3))
    return [
        (False, packed24.product(weights[0], inputs, None, middle)),
        (True, packed24.product(weights[1], middle, None, outputs[0])),
        (False, packed24.product(big, middle, None, outputs[1])),
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_program_is_its_calls_one_by_one(threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs, middle = torch.randn(1, 96).to(dtype), torch.empty(1, 96, dtype=dtype)
        outputs = torch.empty(1, 96, dtype=dtype), torch.empty(1, 1200, dtype=dtype)
        program = Program(chain(inputs, middle, outputs))
        others = torch.randn(1, 96).to(dtype), torch.empty(1, 1200, dtype=dtype)
        for tensor, other in zip((inputs, outputs[1]), others, strict=True):
            for place in program.places(tensor, range(3)):
                program.words[place] = other.data_ptr()
        for _ in range(20):
            found = outputs[0].fill_(math.nan), others[1].fill_(math.nan)
            program.run()
            expected = torch.empty_like(found[0]), torch.empty_like(found[1])
            for _, call in chain(others[0], torch.empty_like(middle), expected):
                library.call(*call, None)
            assert all(map(torch.equal, found, expected))
        assert program.threads == threads
    finally:
        torch.set_num_threads(before)


def test_a_program_refuses_what_it_cannot_call() -> None:
    with pytest.raises(SparseGPTError, match="sparse24_read"):
        Program([(False, ("sparse24_read", (NOTHING, NOTHING), (0,), 0))])
