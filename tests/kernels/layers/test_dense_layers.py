"""What stays dense: through the kernel where it serves, its own forward otherwise, the same values always."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from sparsegpt.kernels.checkpoint.archive import pack_folder
from sparsegpt.kernels.cpu import dense as cpu_dense
from sparsegpt.kernels.cpu import library
from sparsegpt.kernels.cpu import norm as cpu_norm
from sparsegpt.kernels.hf.in_place import pack_linears
from sparsegpt.kernels.hf.quantizer import load_packed
from sparsegpt.kernels.layers.dense_layers import DenseLinear, is_quick_norm, quicken_dense
from tests.kernels.helpers import relative_error
from tests.kernels.hf.test_hf import TOKENS, pruned_model

pytestmark = pytest.mark.skipif(library.machine_level() is None, reason="no C++ compiler here")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that reach the kernel, on any machine that has a library."""
    seen: list[tuple[int, ...]] = []
    run = cpu_dense.run

    def spy(weight: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(inputs.shape))
        return run(weight, inputs, bias)

    monkeypatch.setattr(cpu_dense, "run", spy)
    monkeypatch.setattr(cpu_dense, "TOKENS", dict.fromkeys(library.LEVELS, 6))
    return seen


@pytest.fixture
def norm_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that reach the norm's kernel."""
    seen: list[tuple[int, ...]] = []
    run = cpu_norm.run

    def spy(inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        seen.append(tuple(inputs.shape))
        return run(inputs, weight, epsilon)

    monkeypatch.setattr(cpu_norm, "run", spy)
    return seen


def quickened(bias: bool = True) -> nn.Linear:
    linear = nn.Linear(40, 24, bias, dtype=torch.bfloat16)
    assert quicken_dense(nn.Sequential(linear)) == 1
    return linear


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (1, 1, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_values(bias: bool, lead: tuple[int, ...], calls: list[tuple[int, ...]]) -> None:
    linear, inputs = quickened(bias), torch.randn(*lead, 40).bfloat16()
    with torch.no_grad():
        found = linear(inputs)
        expected = inputs.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    assert found.shape == (*lead, 24) and found.dtype == torch.bfloat16
    assert relative_error(found, expected) < 6e-3
    assert calls == [(*lead, 40)]


def test_strided_inputs_are_taken(calls: list[tuple[int, ...]]) -> None:
    linear, inputs = quickened(), torch.randn(40, 3).bfloat16().T
    with torch.no_grad():
        assert relative_error(linear(inputs), inputs.double() @ linear.weight.double().T + linear.bias) < 6e-3
    assert calls == [(3, 40)]


def test_gradients_autocast_other_dtypes_and_many_tokens_are_the_layers_own(calls: list[tuple[int, ...]]) -> None:
    linear, inputs = quickened(), torch.randn(2, 40).bfloat16()
    linear(inputs).sum().backward()
    assert linear.weight.grad is not None
    with torch.no_grad():
        assert linear(torch.randn(7, 40).bfloat16()).shape == (7, 24)
        assert linear(torch.zeros(0, 40).bfloat16()).shape == (0, 24)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(inputs.float()).dtype == torch.bfloat16
        assert linear.to("meta")(inputs.to("meta")).is_meta
        assert linear.to_empty(device="cpu").float()(inputs.float()).dtype == torch.float32
        with pytest.raises(RuntimeError, match="dtype"):
            linear(inputs)
    assert not calls


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_stands_in_a_parameters_place_is_computed_by_torch(name: str, calls: list[tuple[int, ...]]) -> None:
    class Twice(nn.Module):
        def forward(self, parameter: Tensor) -> Tensor:
            return 2 * parameter

    linear, inputs = quickened(), torch.randn(2, 40).bfloat16()
    twice = {key: value.detach() * (2 if key == name else 1) for key, value in linear.named_parameters()}
    nn.utils.parametrize.register_parametrization(linear, name, Twice())
    with torch.no_grad():
        assert torch.equal(linear(inputs), nn.functional.linear(inputs, **twice))
    assert not calls


@pytest.mark.parametrize("inputs", [torch.zeros(2, 39).bfloat16(), torch.tensor(1.0).bfloat16()])
def test_inputs_that_do_not_fit_get_torchs_own_message(inputs: Tensor, calls: list[tuple[int, ...]]) -> None:
    linear = quickened()
    with torch.no_grad(), pytest.raises(RuntimeError):
        linear(inputs)
    assert not calls


@pytest.mark.parametrize("level", [None, "plain", "avx512_bf16"])
def test_nothing_changes_where_torch_is_as_fast(level: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "machine_level", lambda: level)
    linear = nn.Linear(8, 8, dtype=torch.bfloat16)
    assert quicken_dense(linear) == 0 and type(linear) is nn.Linear


@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"dtype": torch.bfloat16, "device": "meta"}])
def test_linears_that_the_kernel_never_serves_build_no_library(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "machine_level", lambda: pytest.fail("looked for the library"))
    linear = nn.Linear(8, 8, **options)
    assert quicken_dense(linear) == 0 and type(linear) is nn.Linear


def test_layers_of_other_kinds_and_replaced_forwards_are_left_alone(calls: list[tuple[int, ...]]) -> None:
    class Own(nn.Linear):
        pass

    replaced = nn.Linear(8, 8)
    replaced.forward = lambda input: input  # type: ignore[method-assign]
    kept = nn.Sequential(Own(8, 8), replaced, nn.Bilinear(2, 2, 2)).bfloat16()
    assert quicken_dense(kept) == 0 and [type(module) for module in kept] == [Own, nn.Linear, nn.Bilinear]


def test_what_stayed_dense_can_be_packed_later(calls: list[tuple[int, ...]]) -> None:
    model = pruned_model().bfloat16()
    once = pack_linears(model, skip=("lm_head", "down_proj"))
    assert type(model.model.layers[0].mlp.down_proj) is DenseLinear
    assert len(pack_linears(model)) == 2 and len(once) == 12


def test_copies_and_pickles_are_of_their_own(calls: list[tuple[int, ...]]) -> None:
    linear, inputs = quickened(), torch.randn(1, 40).bfloat16()
    with torch.no_grad():
        expected = linear(inputs)
        for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
            linear.weight.zero_()
            assert torch.equal(other(inputs), expected) and other.state_dict().keys() == linear.state_dict().keys()
    assert len(calls) == 3


def test_the_head_of_a_loaded_model(tmp_path: Path, calls: list[tuple[int, ...]]) -> None:
    dense = pruned_model().bfloat16()
    dense.save_pretrained(tmp_path / "dense")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    model = load_packed(tmp_path / "packed", dtype=torch.bfloat16)
    assert type(model.lm_head) is DenseLinear
    in_memory = copy.deepcopy(dense)
    pack_linears(in_memory)
    with torch.no_grad():
        expected = dense(TOKENS[:, :2]).logits
        for packed in (model, in_memory):
            torch.testing.assert_close(packed(TOKENS[:, :2]).logits, expected, atol=0.02, rtol=0.02)
    assert len(calls) == 2
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        again = load_packed(tmp_path / "again", dtype=torch.bfloat16)
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert type(again.dequantize().lm_head) is nn.Linear


def norm_of(kind: type[nn.Module] = LlamaRMSNorm, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, nn.Module]:
    """A norm of its own forward, and its quickened copy."""
    own = kind(40, eps=1e-3).to(dtype)  # type: ignore[call-arg]
    own.weight.data.normal_(1, 0.3)
    quick = copy.deepcopy(own)
    assert quicken_dense(nn.Sequential(quick)) == 1
    return own, quick


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, MistralRMSNorm, Qwen3RMSNorm])
def test_norms_of_the_known_form(kind: type[nn.Module], dtype: torch.dtype, norm_calls: list[tuple[int, ...]]) -> None:
    own, quick = norm_of(kind, dtype)
    rounding = 8e-3 if dtype == torch.bfloat16 else 1e-5
    with torch.no_grad():
        for inputs in (torch.randn(1, 1, 40), torch.randn(3, 40), torch.randn(40), torch.randn(40, 3).T):
            torch.testing.assert_close(quick(inputs.to(dtype)), own(inputs.to(dtype)), atol=1e-6, rtol=rounding)
    assert norm_calls == [(1, 1, 40), (3, 40), (40,), (3, 40)]


def test_norms_of_other_forms_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Squarer(LlamaRMSNorm):
        def forward(self, hidden_states):  # type: ignore[no-untyped-def]
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.pow(4).mean(-1, keepdim=True)
            hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
            return self.weight * hidden_states.to(input_dtype)

    replaced = LlamaRMSNorm(8)
    replaced.forward = lambda hidden_states: hidden_states  # type: ignore[method-assign]
    half, elsewhere = LlamaRMSNorm(8).half(), LlamaRMSNorm(8).to("meta")
    monkeypatch.setattr(library, "machine_level", lambda: pytest.fail("looked for the library"))
    others = nn.ModuleList([Squarer(8), GemmaRMSNorm(8), nn.RMSNorm(8), nn.LayerNorm(8), replaced, half, elsewhere])
    assert quicken_dense(others) == 0
    assert not any(map(is_quick_norm, others))


def test_norms_stay_as_they_are_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    _, quick = norm_of()
    inputs = torch.randn(2, 40).bfloat16()
    monkeypatch.setattr(library, "machine_level", lambda: None)
    monkeypatch.setattr(cpu_norm, "run", lambda *_: pytest.fail("reached the kernel"))
    assert quicken_dense(LlamaRMSNorm(8)) == 0
    with torch.no_grad():
        assert quick(inputs).shape == (2, 40)  # quickened on another machine


def test_gradients_autocast_other_dtypes_and_no_tokens_are_the_norms_own(norm_calls: list[tuple[int, ...]]) -> None:
    own, quick = norm_of()
    inputs = torch.randn(2, 40).bfloat16()
    for norm in (own, quick):
        norm(inputs).sum().backward()
    assert torch.equal(quick.weight.grad, own.weight.grad)
    with torch.no_grad():
        for given in (inputs.float(), torch.zeros(0, 40).bfloat16(), torch.randn(2, 1).bfloat16()):
            found, expected = quick(given), own(given)
            assert found.dtype == expected.dtype and torch.equal(found, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(quick(inputs), own(inputs))
        assert quick.to("meta")(inputs.to("meta")).is_meta
    assert not norm_calls


def test_compiled_and_exported_a_norm_is_its_own(norm_calls: list[tuple[int, ...]]) -> None:
    own, quick = norm_of()
    inputs = torch.randn(2, 40).bfloat16()
    with torch.no_grad():
        assert torch.equal(torch.compile(quick, backend="eager", fullgraph=True)(inputs), own(inputs))
        assert torch.equal(torch.export.export(quick, (inputs,)).module()(inputs), own(inputs))
    assert not norm_calls


def test_hooks_of_a_norm_are_called(norm_calls: list[tuple[int, ...]]) -> None:
    _, quick = norm_of()
    seen: list[Tensor] = []
    quick.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        assert quick(torch.randn(2, 40).bfloat16()) is seen[0]
    assert len(norm_calls) == 1


def test_copies_and_pickles_of_a_norm_are_of_their_own(norm_calls: list[tuple[int, ...]]) -> None:
    _, quick = norm_of()
    inputs = torch.randn(2, 40).bfloat16()
    with torch.no_grad():
        expected = quick(inputs)
        for other in (copy.deepcopy(quick), pickle.loads(pickle.dumps(quick))):
            quick.weight.zero_()
            assert torch.equal(other(inputs), expected) and other.state_dict().keys() == quick.state_dict().keys()
    assert len(norm_calls) == 3


def test_the_norms_of_a_loaded_model(tmp_path: Path, norm_calls: list[tuple[int, ...]]) -> None:
    dense = pruned_model()
    dense.save_pretrained(tmp_path / "dense")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    model = load_packed(tmp_path / "packed", kernels="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, atol=1e-5, rtol=1e-4)
        assert norm_calls == 5 * [(1, 10, 32)]
        plain = model.dequantize()
        torch.testing.assert_close(plain(TOKENS).logits, dense(TOKENS).logits, atol=1e-5, rtol=1e-4)
    assert len(norm_calls) == 5 and not any(map(is_quick_norm, plain.modules()))
