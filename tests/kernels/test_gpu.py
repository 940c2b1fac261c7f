"""Every kernel on a real GPU against float64; skipped cleanly where there is none."""

import pytest
import torch
from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels import Packed24, pack, quantize, reference, unpack
from sparsegpt.kernels.dispatch import choose
from sparsegpt.kernels.linear import Sparse24Linear

from .helpers import relative_error, weight24

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
# float32 sums (tensor cores keep at least that for 16-bit products); one rounding of the result
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 2e-6}
SIXTEEN = (torch.float16, torch.bfloat16)
SHAPES = [(64, 96), (100, 132), (1024, 4096)]
TOKENS = (1, 3, 8, 9, 17, 64, 65)


def operands(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> tuple[Packed24, Tensor, Tensor, Tensor]:
    """Packed weight, inputs, bias, and the expected outputs without bias in float64."""
    weight = weight24(*shape, dtype, seed=tokens).cuda()
    inputs, bias = (
        torch.randn(tokens, shape[1], device="cuda").to(dtype),
        torch.randn(shape[0], device="cuda").to(dtype),
    )
    return pack(weight), inputs, bias, inputs.double() @ weight.double().T


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_portable(shape: tuple[int, int], dtype: torch.dtype, poisoned: None) -> None:
    from sparsegpt.kernels import portable

    for tokens in TOKENS:
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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_compress_and_decompress(shape: tuple[int, int], dtype: torch.dtype, poisoned: None) -> None:
    from sparsegpt.kernels import portable

    weight = weight24(*shape, dtype).cuda()
    found, packed = portable.compress(weight), pack(weight)
    assert torch.equal(found.values, packed.values) and torch.equal(found.meta, packed.meta)
    assert torch.equal(portable.decompress(packed), weight) and torch.equal(unpack(packed), weight)


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("shape", SHAPES)
def test_mma_sp(shape: tuple[int, int], dtype: torch.dtype, poisoned: None) -> None:
    from sparsegpt.kernels import mma_sp

    for tokens in TOKENS:
        packed, inputs, bias, expected = operands(shape, tokens, dtype)
        if mma_sp.refusal(packed):
            pytest.skip(str(mma_sp.refusal(packed)))
        fragments = mma_sp.prepare(packed)
        assert relative_error(mma_sp.matmul(fragments, inputs, bias), expected + bias.double()) < TOLERANCE[dtype]
        for activation in reference.ACTIVATIONS:
            found = mma_sp.matmul(fragments, inputs, bias, activation)
            assert relative_error(found, reference.ACTIVATIONS[activation](expected + bias.double())) < (
                2 * TOLERANCE[dtype]
            )
        found = mma_sp.swiglu(fragments, fragments, inputs)
        assert relative_error(found, reference.swiglu(packed, packed, inputs.float())) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("shape", SHAPES)
def test_mma_sp_int4(shape: tuple[int, int], dtype: torch.dtype, poisoned: None) -> None:
    from sparsegpt.kernels import mma_sp, mma_sp_int4

    for tokens in TOKENS:
        packed, inputs, bias, _ = operands(shape, tokens, dtype)
        if mma_sp.refusal(packed):
            pytest.skip(str(mma_sp.refusal(packed)))
        small = quantize(packed, 4, 128)
        found = mma_sp_int4.matmul(mma_sp_int4.prepare(small), inputs, bias, "silu")
        expected = reference.linear(small, inputs.float(), bias.float(), "silu")
        assert relative_error(found, expected) < 2 * TOLERANCE[dtype]


@pytest.fixture(scope="module")
def wgmma_sp_tried() -> None:
    """A process of its own first: a fault would make every later test here fail."""
    from sparsegpt.kernels import wgmma_sp
    from sparsegpt.kernels.trial import trial

    device = torch.device("cuda", torch.cuda.current_device())
    if refused := wgmma_sp.refuse(device, torch.float16):
        pytest.skip(refused)
    if reason := trial("wgmma_sp", device):
        pytest.fail(reason)


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("shape", [*SHAPES, (200, 1312)])
def test_wgmma_sp(shape: tuple[int, int], dtype: torch.dtype, wgmma_sp_tried: None, poisoned: None) -> None:
    from sparsegpt.kernels import wgmma_sp
    from sparsegpt.kernels.fragments import to_fragments

    for tokens in (*TOKENS, 128, 300, 2048):
        packed, inputs, bias, expected = operands(shape, tokens, dtype)
        fragments = to_fragments(packed)
        assert relative_error(wgmma_sp.matmul(fragments, inputs), expected) < TOLERANCE[dtype]
        for activation, apply in reference.ACTIVATIONS.items():
            found = wgmma_sp.matmul(fragments, inputs, bias, activation)
            assert relative_error(found, apply(expected + bias.double())) < 2 * TOLERANCE[dtype]
        again = [wgmma_sp.matmul(fragments, inputs) for _ in range(20)]
        assert all(torch.equal(again[0], other) for other in again)  # a race would show now and then


@pytest.mark.parametrize("kernels", ["auto", "dense", "portable", "mma_sp", "wgmma_sp", "cutlass", "cusparselt"])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_layer(dtype: torch.dtype, kernels: str, request: pytest.FixtureRequest) -> None:
    dense = nn.Linear(256, 128, dtype=dtype).requires_grad_(False)
    dense.weight.copy_(weight24(128, 256, dtype))
    if kernels == "wgmma_sp":
        request.getfixturevalue("wgmma_sp_tried")
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
    assert choose(packed).route(1) == "dense"
