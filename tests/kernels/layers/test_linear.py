"""The packed layer against torch.nn.Linear: values, shapes, gradients, refusals."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels import Packed24, unpack
from sparsegpt.kernels.cpu.packed24 import refusal
from sparsegpt.kernels.dispatch.packed24 import PACKED24
from sparsegpt.kernels.dispatch.route import KERNELS
from sparsegpt.kernels.format.pack import pack
from sparsegpt.kernels.gpu import semi_structured
from sparsegpt.kernels.hf.in_place import pack_linears
from sparsegpt.kernels.layers.linear import explain, packed_layers, set_kernels
from sparsegpt.kernels.layers.sparse_linear import Sparse24Linear
from tests.kernels.helpers import relative_error, weight24

# relative to the norm of the output: summation order in float32, one rounding to 8 or 11 bits in the 16-bit types
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def pair(shape: tuple[int, int], dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, Sparse24Linear]:
    dense = nn.Linear(shape[1], shape[0], bias, dtype=dtype).requires_grad_(False)
    dense.weight.copy_(weight24(*shape, dtype))
    return dense, Sparse24Linear.from_linear(dense)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 5), (2, 1, 17), (0,), (2, 0)])
def test_same_as_linear(lead: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    dense, packed = pair((40, 100), dtype, bias)
    inputs = torch.randn(*lead, 100).to(dtype)
    found = packed(inputs)
    assert found.shape == (*lead, 40) and found.dtype == dtype
    expected = torch.nn.functional.linear(
        inputs.double(), dense.weight.double(), None if dense.bias is None else dense.bias.double()
    )
    assert relative_error(found, expected) < TOLERANCE[dtype]


def test_non_contiguous_inputs() -> None:
    dense, packed = pair((24, 64), torch.float32)
    for inputs in (torch.randn(64, 6).t(), torch.randn(4, 128)[:, ::2], torch.randn(3, 64).expand(5, 3, 64)):
        assert relative_error(packed(inputs), dense(inputs)) < 2e-6


def test_gradient_for_the_input() -> None:
    dense, packed = pair((24, 64), torch.float64)
    inputs = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packed, (inputs,))
    (found,) = torch.autograd.grad(packed(inputs).square().sum(), inputs)
    (expected,) = torch.autograd.grad(dense(inputs).square().sum(), inputs)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert not packed(inputs).requires_grad


def test_weight_gradients_are_refused() -> None:
    _, packed = pair((24, 64), torch.float32)
    packed.values.requires_grad_(True)
    with pytest.raises(SparseGPTError, match="does not train"):
        packed(torch.randn(2, 64))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(2, 60), "expected inputs"),
        (torch.tensor(1.0), "expected inputs"),
        (torch.randn(2, 64, dtype=torch.float64), "float64"),
        (torch.randn(2, 64, device="meta"), "meta"),
    ],
)
def test_wrong_inputs(inputs: torch.Tensor, message: str) -> None:
    _, packed = pair((24, 64), torch.float32)
    with pytest.raises(SparseGPTError, match=message):
        packed(inputs)


def test_autocast_casts_the_input() -> None:
    dense, packed = pair((24, 64), torch.bfloat16)
    inputs = torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(packed(inputs), dense(inputs)) < 6e-3


@pytest.mark.parametrize("tokens", [1, 64, 65, 300])
@pytest.mark.parametrize("kernels", ["auto", "dense", "resident"])
def test_autocast_changes_no_product(kernels: str, tokens: int) -> None:
    """A float32 layer stays one under bfloat16 autocast, forward and backward, for any number of tokens."""
    dense, packed = pair((24, 64), torch.float32)
    packed.kernels = kernels
    inputs, grads = torch.randn(tokens, 64, requires_grad=True), torch.randn(tokens, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = packed(inputs)
        found.backward(grads)
    assert found.dtype == torch.float32 and inputs.grad is not None
    assert relative_error(found.detach(), dense(inputs).detach()) < 2e-6
    assert relative_error(inputs.grad, grads.double() @ dense.weight.double()) < 2e-6


def test_state_dict_casting_and_moving() -> None:
    dense, packed = pair((24, 64), torch.float32)
    fresh = Sparse24Linear(64, 24)
    assert torch.equal(fresh.weight, torch.zeros(24, 64))  # before loading: zeros, whatever the metadata
    fresh.load_state_dict(packed.state_dict())
    inputs = torch.randn(3, 64)
    assert torch.equal(fresh(inputs), packed(inputs))
    half = packed.to(torch.bfloat16)
    assert half.meta.dtype == torch.int32
    assert relative_error(half(inputs.bfloat16()), dense(inputs)) < 1e-2


@pytest.mark.parametrize("kernels", ["auto", "dense", "resident", "cpu"])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("tokens", [3, 300])
def test_writing_to_the_buffers_is_noticed(tokens: int, kernels: str, inference: bool) -> None:
    """Loading copies in place; every route that serves a CPU computes with what the buffers then hold."""
    inputs = torch.randn(tokens, 64)
    with torch.inference_mode(inference):
        dense, packed = pair((24, 64), torch.float32)
        packed.kernels = kernels
        if kernels == "cpu" and refusal(packed.packed) is not None:
            pytest.skip("no C++ compiler here")
        assert relative_error(packed(inputs), dense(inputs)) < 2e-6
        dense.weight.copy_(weight24(24, 64, seed=1))
        dense.bias.copy_(torch.randn(24))
        packed.load_state_dict(Sparse24Linear.from_linear(dense).state_dict())
        assert relative_error(packed(inputs), dense(inputs)) < 2e-6
    if not inference:  # inference tensors do not count their writes
        expected = torch.nn.functional.linear(inputs, 2 * dense.weight, -dense.bias)
        packed.values.mul_(2)
        packed.bias.neg_()
        assert relative_error(packed(inputs), expected) < 2e-6
        packed.meta.fill_(0x44444444)
        expected = torch.nn.functional.linear(inputs, unpack(packed.packed), packed.bias)
        assert relative_error(packed(inputs), expected) < 2e-6


@pytest.mark.parametrize("bias", [torch.zeros(24).bfloat16(), torch.zeros(4), torch.zeros(1), torch.zeros(24, 1)])
def test_a_bias_that_does_not_fit_is_refused(bias: torch.Tensor) -> None:
    layer = Sparse24Linear.from_packed(pack(weight24(24, 64)), bias)
    with pytest.raises(SparseGPTError, match=r"expected a bias \[24\] in torch\.float32 on cpu; found \["):
        layer(torch.zeros(1, 64))
    _, replaced = pair((24, 64), torch.float32)
    replaced(torch.zeros(1, 64))
    replaced.load_state_dict({**replaced.state_dict(), "bias": torch.zeros(24).half()}, assign=True)
    with pytest.raises(SparseGPTError, match=r"found \[24\] in torch\.float16 on cpu"):
        replaced(torch.zeros(1, 64))


@pytest.mark.parametrize("kernels", ["auto", "dense", "resident"])
def test_strided_parts(kernels: str) -> None:
    whole, bias = pack(weight24(48, 64)), torch.randn(48)[::2]
    rows = Packed24(whole.values[::2], whole.meta[::2], (24, 64))
    columns = Packed24(rows.values.T.contiguous().T, rows.meta.T.contiguous().T, (24, 64))
    inputs = torch.randn(3, 64)
    expected = torch.nn.functional.linear(inputs.double(), weight24(48, 64)[::2].double(), bias.double())
    for packed in (rows, columns):
        layer = Sparse24Linear.from_packed(packed, bias, kernels=kernels)
        assert relative_error(layer(inputs), expected) < 2e-6
        assert layer.packed.values is packed.values


def test_copies_are_independent() -> None:
    _, packed = pair((24, 64), torch.float32)
    inputs = torch.randn(3, 64)
    expected = packed(inputs)
    copied, pickled = copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))
    packed.values.zero_()
    for other in (copied, pickled):
        assert other.values.data_ptr() != packed.values.data_ptr() and torch.equal(other(inputs), expected)


def test_dense_weight_and_packed_parts() -> None:
    dense, packed = pair((24, 64), torch.float32)
    assert torch.equal(packed.weight, dense.weight)
    assert packed.packed.values is packed.values
    assert "in_features=64" in repr(packed)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 32)
        self.tied = nn.Linear(64, 32, bias=False)
        self.tied_again = nn.Linear(64, 32, bias=False)
        self.ragged = nn.Linear(30, 32)
        self.dense = nn.Linear(64, 32)
        self.lm_head = nn.Linear(64, 32)
        with torch.no_grad():
            for layer in (self.up, self.tied, self.lm_head):
                layer.weight.copy_(weight24(32, 64))
        self.tied_again.weight = self.tied.weight


def test_packing_the_linears_of_a_model() -> None:
    model = Tiny()
    assert pack_linears(model) == ["up"]
    assert list(packed_layers(model)) == ["up"]
    assert set_kernels(model, "dense") == 1 and model.up.kernels == "dense"
    assert "1 packed 2:4 layers: dense (asked for)" in explain(model)
    with pytest.raises(SparseGPTError, match="expected one of auto"):
        set_kernels(model, "fastest")


@pytest.mark.parametrize("kernels", ["portable", "mma_sp", "wgmma_sp", "cutlass", "cusparselt"])
def test_forced_gpu_kernels_say_why_they_cannot_serve(kernels: str) -> None:
    with pytest.raises(SparseGPTError, match=rf"kernels={kernels}: .*the weight is on cpu; use auto or dense"):
        PACKED24.choose(pack(weight24(32, 64)), kernels)
    assert kernels in KERNELS


@pytest.mark.parametrize("deprecated", [False, True])
def test_cusparselt_pads_tokens_and_searches_once_a_size(deprecated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls as torch documents them, with the library's part played by a dense product."""
    searches: list[int] = []

    def search(weight, columns, bias, alpha, out_dtype, transpose_result):  # type: ignore[no-untyped-def]
        assert transpose_result and bias is alpha is out_dtype is None
        searches.append(columns.shape[1])
        return 3, 2, 1, 0

    def search_before(weight, columns, *, transpose_result):  # type: ignore[no-untyped-def]
        warnings.warn("deprecated", UserWarning, stacklevel=1)
        return search(weight, columns, None, None, None, transpose_result)[0]

    def multiply(weight, columns, *, bias, transpose_result, **found):  # type: ignore[no-untyped-def]
        assert transpose_result and columns.shape[1] % 8 == 0
        assert found == ({"alg_id": 3} if deprecated else {"alg_id": 3, "split_k": 2, "split_k_mode": 1})
        return columns.t() @ weight.t() + bias

    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    if deprecated:
        monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search_before)
        monkeypatch.delattr(torch._C, "_cusparselt", raising=False)
    else:
        monkeypatch.setattr(torch._C, "_cusparselt", SimpleNamespace(mm_search=search), raising=False)
    dense, packed = pair((32, 64), torch.float32)
    state = semi_structured.prepare_cusparselt(packed.packed)
    for tokens in (1, 3, 4, 17, 30):
        inputs = torch.randn(tokens, 64)
        assert relative_error(semi_structured.run_cusparselt(state, inputs, dense.bias), dense(inputs)) < 2e-6
    assert searches == [8, 8, 24]  # one token; three and four; seventeen and thirty
