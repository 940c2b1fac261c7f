"""Linears that stay dense: through the kernel where it serves, their own forward otherwise, the same values always."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsegpt.kernels import cpu
from sparsegpt.kernels.archive import pack_folder
from sparsegpt.kernels.dense_layers import DenseLinear, quicken_dense
from sparsegpt.kernels.hf import load_packed
from sparsegpt.kernels.in_place import pack_linears

from .helpers import relative_error
from .test_hf import TOKENS, pruned_model

pytestmark = pytest.mark.skipif(cpu.machine_level() is None, reason="no C++ compiler here")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that reach the kernel, on any machine that has a library."""
    seen: list[tuple[int, ...]] = []
    run = cpu.run_dense

    def spy(weight: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(inputs.shape))
        return run(weight, inputs, bias)

    monkeypatch.setattr(cpu, "run_dense", spy)
    monkeypatch.setattr(cpu, "DENSE_TOKENS", dict.fromkeys(cpu.LEVELS, 6))
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


def test_compiled_and_exported_it_is_the_layers_own(calls: list[tuple[int, ...]]) -> None:
    linear, inputs = quickened(), torch.randn(2, 40).bfloat16()
    with torch.no_grad():
        expected = nn.functional.linear(inputs, linear.weight, linear.bias)
        assert torch.equal(torch.compile(linear, backend="eager", fullgraph=True)(inputs), expected)
        assert torch.equal(torch.export.export(linear, (inputs,)).module()(inputs), expected)
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
    monkeypatch.setattr(cpu, "machine_level", lambda: level)
    linear = nn.Linear(8, 8, dtype=torch.bfloat16)
    assert quicken_dense(linear) == 0 and type(linear) is nn.Linear


@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"dtype": torch.bfloat16, "device": "meta"}])
def test_linears_that_the_kernel_never_serves_build_no_library(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "machine_level", lambda: pytest.fail("looked for the library"))
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
