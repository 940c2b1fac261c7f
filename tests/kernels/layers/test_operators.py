"""Packed products as operators: whole graphs for torch.compile and torch.export, the same values, nothing kept."""

import copy
import gc
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels import quantize
from sparsegpt.kernels.cpu import dense as on_cpu
from sparsegpt.kernels.cpu import library
from sparsegpt.kernels.format.pack import pack
from sparsegpt.kernels.hf.in_place import pack_linears
from sparsegpt.kernels.layers import operators, schemas
from sparsegpt.kernels.layers.dense_layers import DenseLinear, quicken_dense
from sparsegpt.kernels.layers.linear import PackedLinear
from sparsegpt.kernels.layers.quantized_linear import Quantized24Linear
from sparsegpt.kernels.layers.sparse_linear import Sparse24Linear
from tests.forked import Forked
from tests.kernels.helpers import relative_error, weight24
from tests.kernels.hf.test_hf import TOKENS, pruned_model

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def layer_of(
    bits: int, dtype: torch.dtype, bias: bool = True, seed: int = 0
) -> tuple[PackedLinear, Tensor, Tensor | None]:
    """A packed layer [24, 64], the dense weight that it holds, in float64, and its bias."""
    packed, given = pack(weight24(24, 64, dtype, seed)), torch.randn(24).to(dtype) if bias else None
    if not bits:
        return Sparse24Linear.from_packed(packed, given), weight24(24, 64, dtype, seed).double(), given
    layer = Quantized24Linear.from_packed(quantize(packed, bits, 32), given)
    scale_NK = layer.packed.scales.double().repeat_interleave(32, 1)
    return layer, (weight24(24, 64, dtype, seed).double() / scale_NK).round() * scale_NK, given


def arguments(layer: PackedLinear, inputs: Tensor) -> tuple[object, ...]:
    return inputs, list(layer.operands), layer.bias, layer.kernels, *form_of(layer)


def form_of(layer: PackedLinear) -> tuple[object, ...]:
    return layer.form_text, layer.out_features, layer.in_features


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_graph_with_the_same_values(dtype: torch.dtype, bits: int, backend: str) -> None:
    layer, weight, bias = layer_of(bits, dtype)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for lead in ((1,), (2, 3), (1, 1, 17)):
        inputs = torch.randn(*lead, 64).to(dtype)
        found = compiled(inputs)
        assert found.shape == (*lead, 24) and found.dtype == dtype
        assert relative_error(found, inputs.double() @ weight.T + bias) < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch's compiler itself uses
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_gradient_of_the_input(dtype: torch.dtype, bits: int, compiled: bool) -> None:
    layer, weight, _ = layer_of(bits, dtype)
    inputs, sent = torch.randn(2, 3, 64).to(dtype).requires_grad_(), torch.randn(2, 3, 24).to(dtype)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    (found,) = torch.autograd.grad(run(inputs), inputs, sent)
    assert found.dtype == dtype and relative_error(found, sent.double() @ weight) < TOLERANCE[dtype]
    assert torch.equal(layer(inputs.detach()), layer(inputs))  # the layer still serves its own tensors


def test_autocast_casts_the_inputs() -> None:
    layer, weight, bias = layer_of(0, torch.bfloat16)
    compiled, inputs = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(inputs)
    assert found.dtype == torch.bfloat16 and relative_error(found, inputs.double() @ weight.T + bias) < 1e-2


@pytest.mark.filterwarnings("ignore")  # torch tries to compile the way to the message too
@pytest.mark.parametrize("inputs", [torch.randn(2, 60), torch.randn(2, 64).double(), torch.randn(2, 64, device="meta")])
def test_inputs_that_do_not_fit_are_refused_with_our_message(inputs: Tensor) -> None:
    compiled = torch.compile(layer_of(0, torch.float32)[0], backend="eager")
    with pytest.raises(SparseGPTError, match="expected inputs"):
        compiled(inputs)


def test_one_graph_serves_layers_of_one_shape() -> None:
    counter = CompileCounterWithBackend("eager")
    inputs = torch.randn(2, 64)
    for seed in range(12):  # more than torch would compile anew
        layer, weight, bias = layer_of(0, torch.float32, seed=seed)
        layer.compile(backend=counter, fullgraph=True)
        assert relative_error(layer(inputs), inputs.double() @ weight.T + bias) < 2e-6
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_whole_model_is_one_graph(kind: str) -> None:
    dense = pruned_model(kind)
    model = copy.deepcopy(dense)
    assert pack_linears(model)
    model.config.use_cache = False
    with torch.no_grad():
        expected = dense(TOKENS).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        exported = torch.export.export(model, (TOKENS,)).module()
        for found in (compiled(TOKENS), exported(TOKENS)):
            torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch's compiler itself uses
def test_inductor_takes_it() -> None:
    layer, weight, bias = layer_of(0, torch.float32)
    compiled, inputs = torch.compile(lambda x: layer(x.relu()) + 1, fullgraph=True), torch.randn(3, 64)
    assert relative_error(compiled(inputs), inputs.double().relu() @ weight.T + bias + 1) < 2e-6


def test_an_exported_program_runs_in_another_process(tmp_path: Path, forked_light: Forked) -> None:
    layer, inputs = layer_of(4, torch.float32)[0], torch.randn(2, 64)
    torch.export.save(torch.export.export(nn.Sequential(layer), (inputs,)), tmp_path / "program.pt2")
    torch.save((inputs, layer(inputs)), tmp_path / "expected.pt")
    code = (
        "import sys, torch, sparsegpt.kernels.layers.linear; inputs, expected = torch.load(sys.argv[2]);"
        "program = torch.export.load(sys.argv[1]).module();"
        "assert all(torch.equal(program(inputs), expected) for _ in range(2))"
    )
    forked_light.python("-c", code, tmp_path / "program.pt2", tmp_path / "expected.pt")


@pytest.mark.parametrize("bits", [0, 4])
def test_what_torch_checks_of_operators(bits: int) -> None:
    layer = layer_of(bits, torch.float32)[0]
    torch.library.opcheck(schemas.packed_linear, arguments(layer, torch.randn(3, 64)))
    torch.library.opcheck(schemas.packed_weight, (list(layer.operands), torch.float32, *form_of(layer)))
    dense = torch.randn(3, 40).bfloat16(), torch.randn(24, 40).bfloat16(), torch.randn(24).bfloat16()
    torch.library.opcheck(schemas.dense_linear, dense)


def test_writes_and_new_tensors_are_noticed() -> None:
    layer, weight, bias = layer_of(0, torch.float32)
    inputs = torch.randn(3, 64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(inputs)
    layer.values.mul_(2)
    assert relative_error(compiled(inputs), inputs.double() @ (2 * weight).T + bias) < 2e-6
    layer.bias = torch.zeros(24)
    assert relative_error(compiled(inputs), inputs.double() @ (2 * weight).T) < 2e-6
    layer.load_state_dict(layer_of(0, torch.float32, seed=7)[0].state_dict())
    other = layer_of(0, torch.float32, seed=7)[1]
    assert relative_error(compiled(inputs), inputs.double() @ other.T + layer.bias) < 2e-6


def test_an_exported_program_keeps_what_it_was_exported_with() -> None:
    layer, inputs = layer_of(0, torch.float32)[0], torch.randn(3, 64)
    expected = layer(inputs)
    program = torch.export.export(nn.Sequential(layer), (inputs,)).module()
    layer.bias = torch.zeros(24)
    assert torch.equal(program(inputs), expected)
    layer.meta = layer_of(0, torch.float32, seed=3)[0].meta
    assert torch.equal(program(inputs), expected)
    layer.to(torch.bfloat16)(inputs.bfloat16())
    assert torch.equal(program(inputs), expected)


def test_an_exported_program_trains_what_lies_before_the_layer() -> None:
    layer, inputs = layer_of(0, torch.float32)[0], torch.randn(3, 40)
    model = nn.Sequential(nn.Linear(40, 64), layer)
    program = torch.export.export(model, (inputs,)).module()
    model(inputs).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    program(inputs).square().sum().backward()
    found = [parameter.grad for parameter in program.parameters()]
    assert len(found) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch's compiler itself uses
def test_checkpointed_activations(compiled: bool, reentrant: bool) -> None:
    layer, weight, _ = layer_of(0, torch.float32)
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    inputs, sent = torch.randn(3, 64).requires_grad_(), torch.randn(3, 24)
    torch.utils.checkpoint.checkpoint(run, inputs, use_reentrant=reentrant).backward(sent)
    assert inputs.grad is not None and relative_error(inputs.grad, sent.double() @ weight) < 2e-6


def norm_of() -> nn.Module:
    norm = LlamaRMSNorm(64).requires_grad_(False)
    norm.weight.data.normal_(1, 0.3)
    quicken_dense(nn.Sequential(norm))
    return norm


# A layer, and what it computes by torch's own means.
def watched(kind: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    if kind == "norm":
        norm = norm_of()
        return norm, lambda x: LlamaRMSNorm.forward(norm, x)
    layer, weight, bias = layer_of(0 if kind == "packed" else 8, torch.float32)
    return layer, lambda x: nn.functional.linear(x, weight.float(), bias)


@pytest.mark.parametrize("kind", ["norm", "packed", "integers"])
class TestWhoeverWatches:
    """Sees what torch's own layers would show him: nobody gets the contents of memory that no kernel has written."""

    def test_tracing(self, kind: str) -> None:
        layer, own = watched(kind)
        inputs, others = torch.randn(3, 64), torch.randn(3, 64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(layer, (inputs,), check_trace=False)
        made = make_fx(layer)(inputs)
        for run in (traced, made):
            torch.testing.assert_close(run(others), own(others), atol=1e-5, rtol=1e-4)

    def test_fake_tensors(self, kind: str) -> None:
        layer, own = watched(kind)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert layer(torch.randn(3, 64)).shape == own(torch.randn(3, 64)).shape

    def test_lazy_signs(self, kind: str) -> None:
        layer, own = watched(kind)
        inputs = torch.randn(3, 64)
        found = layer(torch._neg_view(inputs))
        torch.testing.assert_close(found, own(-inputs), atol=1e-5, rtol=1e-4)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch's forward derivatives themselves use
    def test_transforms_and_forward_derivatives_are_right_or_refused(self, kind: str) -> None:
        layer, own = watched(kind)
        inputs, tangents = torch.randn(3, 64), torch.randn(3, 64)
        if kind == "norm":
            for take in (
                lambda f: torch.func.grad(lambda x: f(x).square().sum())(inputs),
                lambda f: torch.func.vmap(f)(inputs),
                lambda f: torch.func.jvp(f, (inputs,), (tangents,))[1],
            ):
                torch.testing.assert_close(take(layer), take(own))
        else:
            with pytest.raises(RuntimeError):
                torch.func.grad(lambda x: layer(x).sum())(inputs)
            with pytest.raises(SparseGPTError, match="no forward derivatives"):
                torch.func.jvp(layer, (inputs,), (tangents,))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs, tangents)
            if kind == "norm":
                found, expected = (forward_ad.unpack_dual(f(dual)).tangent for f in (layer, own))
                torch.testing.assert_close(found, expected)
            else:
                with pytest.raises(SparseGPTError, match="no forward derivatives"):
                    layer(dual)


def test_a_layer_serves_its_own_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = layer_of(0, torch.float32)[0], torch.randn(3, 64)
    expected = layer(inputs)
    monkeypatch.setattr(operators, "_layer", lambda *_: pytest.fail("made a second layer"))
    assert torch.equal(schemas.packed_linear(*arguments(layer, inputs)), expected)
    layer(inputs.requires_grad_()).sum().backward()
    assert torch.equal(schemas.packed_linear(*arguments(layer, inputs)), expected)


def test_nothing_is_kept_alive() -> None:
    def kept() -> int:
        return len(schemas.OWNERS) + len(operators._made)

    gc.collect()
    before = kept()
    inputs = torch.randn(3, 64)
    layer, loose = layer_of(0, torch.float32)[0], [part.clone() for part in layer_of(0, torch.float32)[0].operands]
    layer(inputs)
    for _ in range(2):
        schemas.packed_linear(inputs, loose, None, "auto", '{"pattern": "2:4"}', 24, 64)
    assert kept() > before
    gc.disable()
    try:
        del layer, loose
        assert kept() == before
    finally:
        gc.enable()


def test_a_head_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, inputs, seen = nn.Linear(40, 24, dtype=torch.bfloat16), torch.randn(3, 40).bfloat16(), []
    run = on_cpu.run
    monkeypatch.setattr(on_cpu, "run", lambda *operands: (seen.append(1), run(*operands))[1])
    monkeypatch.setattr(on_cpu, "TOKENS", dict.fromkeys(library.LEVELS, 6))
    linear.__class__ = DenseLinear
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = inputs.double() @ linear.weight.double().T + linear.bias
        exported = torch.export.export(linear, (inputs,)).module()
        for found in (compiled(inputs), exported(inputs)):
            assert relative_error(found, expected) < 6e-3
        many = torch.randn(7, 40).bfloat16()
        assert torch.equal(compiled(many), nn.functional.linear(many, linear.weight, linear.bias))
    assert len(seen) == (0 if library.machine_level() is None else 1)  # an exported head runs anywhere: torch's own
    compiled(inputs).sum().backward()
    assert linear.weight.grad is not None
