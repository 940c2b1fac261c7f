"""Every kernel on a real GPU against float64; skipped cleanly where there is none."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.eval.bench.trial import UNTRIED, random_packed, trials
from sparsegpt.kernels import Packed24, quantize
from sparsegpt.kernels.dispatch.packed24 import PACKED24
from sparsegpt.kernels.format.pack import pack
from sparsegpt.kernels.gpu import reference
from sparsegpt.kernels.layers.sparse_linear import Sparse24Linear
from tests.kernels.helpers import relative_error, weight24

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
# float32 sums (tensor cores keep at least that for 16-bit products); one rounding of the result
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 2e-6}
SIXTEEN = (torch.float16, torch.bfloat16)
SHAPES = [(64, 96), (100, 132), (1024, 4096)]
TOKENS = (1, 3, 8, 9, 17, 64, 65, 128, 300, 2048)
FEW = TOKENS[:7]
EACH_TILE = (8, 17, 300)  # both tiles of mma_sp, both of wgmma_sp


def operands(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> tuple[Packed24, Tensor, Tensor, Tensor]:
    """Packed weight, inputs, bias, and the expected outputs without bias in float64; squares fit into float16."""
    weight = dense_weight(shape).to(dtype)
    inputs, bias = (
        (torch.randn(tokens, shape[1], device="cuda") / 8).to(dtype),
        torch.randn(shape[0], device="cuda").to(dtype),
    )
    return pack(weight), inputs, bias, inputs.double() @ weight.double().T


@cache
def dense_weight(shape: tuple[int, int]) -> Tensor:
    return weight24(*shape).cuda()


def activations(tokens: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Every activation on each tile, one for other numbers of tokens: each is a kernel to compile."""
    every = list(reference.ACTIVATIONS.items())
    yield from every if tokens in EACH_TILE else [every[TOKENS.index(tokens) % len(every)]]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_portable(shape: tuple[int, int], dtype: torch.dtype, must_run: Callable[[str], None], poisoned: None) -> None:
    from sparsegpt.kernels.gpu import portable

    must_run("portable")

    for tokens in FEW:
        packed, inputs, bias, expected = operands(shape, tokens, dtype)
        assert relative_error(portable.matmul(packed, inputs, bias), expected + bias.double()) < TOLERANCE[dtype]
        assert relative_error(portable.matmul(packed, inputs, None, "silu"), nn.functional.silu(expected)) < (
            2 * TOLERANCE[dtype]
        )
        found, twin = portable.swiglu(packed, packed, inputs), reference.swiglu(packed, packed, inputs.float())
        assert relative_error(found, twin) < 3 * TOLERANCE[dtype]
        for bits, group_size in ((8, 128), (4, 32)):
            small = quantize(packed, bits, group_size)
            expected = reference.linear(small, inputs.float())
            assert relative_error(portable.matmul_integer(small, inputs), expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("shape", SHAPES)
def test_mma_sp(shape: tuple[int, int], dtype: torch.dtype, must_run: Callable[[str], None], poisoned: None) -> None:
    from sparsegpt.kernels.gpu import mma_sp
    from sparsegpt.kernels.gpu.fragments import to_fragments

    must_run("mma_sp")

    for tokens in FEW:
        packed, inputs, bias, expected = operands(shape, tokens, dtype)
        fragments = to_fragments(packed)
        assert relative_error(mma_sp.matmul(fragments, inputs, bias), expected + bias.double()) < TOLERANCE[dtype]
        for activation, apply in activations(tokens):
            found = mma_sp.matmul(fragments, inputs, bias, activation)
            assert relative_error(found, apply(expected + bias.double())) < 2 * TOLERANCE[dtype]
        found = mma_sp.swiglu(fragments, fragments, inputs)
        assert relative_error(found, reference.swiglu(packed, packed, inputs.float())) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("shape", SHAPES)
def test_mma_sp_int4(
    shape: tuple[int, int], dtype: torch.dtype, must_run: Callable[[str], None], poisoned: None
) -> None:
    from sparsegpt.kernels.gpu import mma_sp_int4

    must_run("mma_sp")

    for tokens in FEW:
        packed, inputs, bias, _ = operands(shape, tokens, dtype)
        small = quantize(packed, 4, 128)
        found = mma_sp_int4.matmul(mma_sp_int4.prepare(small), inputs, bias, "silu")
        expected = reference.linear(small, inputs.float(), bias.float(), "silu")
        assert relative_error(found, expected) < 2 * TOLERANCE[dtype]


@pytest.fixture(scope="module")
def must_run() -> Callable[[str], None]:
    """Skips or fails for a route; each was in a process of its own first: a fault would make all later tests fail."""
    device = torch.device("cuda", torch.cuda.current_device())
    tried = trials(device, torch.float16)

    def check(route: str) -> None:
        if route in UNTRIED and route not in tried:
            pytest.skip(str(PACKED24.routes[route].refusal(random_packed((32, 32), torch.float16, device))))
        if reason := tried.get(route):
            pytest.fail(reason)

    return check


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("shape", [*SHAPES, (200, 1312)])
def test_wgmma_sp(shape: tuple[int, int], dtype: torch.dtype, must_run: Callable[[str], None], poisoned: None) -> None:
    from sparsegpt.kernels.gpu import wgmma_sp
    from sparsegpt.kernels.gpu.fragments import to_fragments

    must_run("wgmma_sp")

    for tokens in TOKENS:
        packed, inputs, bias, expected = operands(shape, tokens, dtype)
        fragments = to_fragments(packed)
        assert relative_error(wgmma_sp.matmul(fragments, inputs), expected) < TOLERANCE[dtype]
        for activation, apply in activations(tokens):
            found = wgmma_sp.matmul(fragments, inputs, bias, activation)
            assert relative_error(found, apply(expected + bias.double())) < 2 * TOLERANCE[dtype]
        again = [wgmma_sp.matmul(fragments, inputs) for _ in range(20)]
        assert all(torch.equal(again[0], other) for other in again)  # a race would show now and then


@pytest.mark.parametrize("kernels", ["auto", "dense", "portable", "mma_sp", "wgmma_sp", "cutlass", "cusparselt"])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_layer(dtype: torch.dtype, kernels: str, must_run: Callable[[str], None]) -> None:
    must_run(kernels)
    dense = nn.Linear(256, 128, dtype=dtype).requires_grad_(False)
    dense.weight.copy_(weight24(128, 256, dtype))
    layer = Sparse24Linear.from_linear(dense).cuda()
    layer.kernels = kernels
    try:
        _ = layer.choice
    except SparseGPTError as refused:
        pytest.skip(str(refused))
    for lead in ((1,), (2, 5), (0,), (70,)):
        inputs = torch.randn(*lead, 256).to(dtype)
        expected = inputs.double() @ dense.weight.double().T + dense.bias.double()
        assert relative_error(layer(inputs.cuda()).cpu(), expected) < TOLERANCE[dtype]


def test_automatic_choice_is_dense_until_something_is_measured() -> None:
    packed = pack(weight24(128, 256, torch.bfloat16).cuda())
    assert PACKED24.choose(packed).route(1) == "dense"
