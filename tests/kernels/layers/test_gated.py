"""Gated blocks: fused only where nothing can tell, except by the clock."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from sparsegpt.kernels.checkpoint.archive import pack_folder
from sparsegpt.kernels.cpu import packed24 as on_cpu
from sparsegpt.kernels.cpu.library import machine_level
from sparsegpt.kernels.dispatch.packed24 import PACKED24
from sparsegpt.kernels.dispatch.route import Route
from sparsegpt.kernels.hf.in_place import pack_linears
from sparsegpt.kernels.hf.quantizer import load_packed, register
from sparsegpt.kernels.layers.gated import fuse_gated, is_gated
from sparsegpt.kernels.layers.linear import set_kernels
from sparsegpt.kernels.layers.sparse_linear import Sparse24Linear
from tests.kernels.helpers import relative_error, weight24
from tests.kernels.hf.test_hf import TOKENS, pruned_model

needs_cpu_kernel = pytest.mark.skipif(machine_level() is None, reason="no C++ compiler here")


class Gated(nn.Module):
    """The block of Llama and its kin."""

    def __init__(self, bias: bool = False, activation: str = "silu") -> None:
        super().__init__()
        self.gate_proj = nn.Linear(64, 96, bias)
        self.up_proj = nn.Linear(64, 96, bias)
        self.down_proj = nn.Linear(96, 64, bias)
        self.act_fn = ACT2FN[activation]
        for seed, layer in enumerate((self.gate_proj, self.up_proj, self.down_proj)):
            layer.weight.data = weight24(*layer.weight.shape, seed=seed)

    def forward(self, x):  # type: ignore[no-untyped-def]
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj  # noqa: RET504


class Scaled(Gated):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.down_proj(self.act_fn(self.gate_proj(x) * 0.5) * self.up_proj(x))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that reach the fused CPU kernel."""
    seen: list[tuple[int, ...]] = []

    def spy(gate, up, inputs):  # type: ignore[no-untyped-def]
        seen.append(tuple(inputs.shape))
        return on_cpu.run_swiglu(gate, up, inputs)

    spied = Route(on_cpu.refusal, on_cpu.prepare, on_cpu.run, spy, any_shape=True)
    monkeypatch.setitem(PACKED24.routes, "cpu", spied)
    return seen


def packed_block(**options: object) -> tuple[Gated, Gated]:
    dense = Gated(**options).requires_grad_(False)  # type: ignore[arg-type]
    packed = copy.deepcopy(dense)
    assert len(pack_linears(packed, kernels="cpu")) == 3
    return dense, packed


@needs_cpu_kernel
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 17)])
def test_the_same_values(lead: tuple[int, ...], calls: list[tuple[int, ...]]) -> None:
    dense, packed = packed_block()
    inputs = torch.randn(*lead, 64)
    found = packed(inputs)
    gate, up = (inputs.double() @ layer.weight.double().T for layer in (dense.gate_proj, dense.up_proj))
    expected = (gate / (1 + (-gate).exp()) * up) @ dense.down_proj.weight.double().T
    assert found.shape == inputs.shape and relative_error(found, expected) < 2e-6
    assert calls == [(*lead, 64)]


@needs_cpu_kernel
@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "act_fn"])
@pytest.mark.parametrize("kind", ["forward hook", "pre-hook", "replaced forward", "global hook"])
def test_watched_parts_run_one_by_one(kind: str, part: str, calls: list[tuple[int, ...]]) -> None:
    _, packed = packed_block()
    inputs, seen = torch.randn(2, 64), []
    module = packed.get_submodule(part)
    expected = packed(inputs)
    handle = None
    if kind == "forward hook":
        handle = module.register_forward_hook(lambda *_: seen.append(1))
    elif kind == "pre-hook":
        handle = module.register_forward_pre_hook(lambda *_: seen.append(1))
    elif kind == "global hook":
        handle = nn.modules.module.register_module_forward_hook(
            lambda which, *_: seen.append(1) if which is module else None
        )
    else:
        own = module.forward
        module.forward = lambda x: (seen.append(1), own(x))[1]
    try:
        assert relative_error(packed(inputs), expected) < 2e-6
    finally:
        if handle is not None:
            handle.remove()
    assert len(seen) == 1 and len(calls) == 1
    packed(inputs)
    assert len(calls) == (1 if handle is None else 2)  # fused again when nobody watches


@needs_cpu_kernel
def test_dense_kernels_and_gradients_are_not_fused(calls: list[tuple[int, ...]]) -> None:
    dense, packed = packed_block()
    inputs = torch.randn(3, 64, requires_grad=True)
    (found,) = torch.autograd.grad(packed(inputs).square().sum(), inputs)
    (expected,) = torch.autograd.grad(dense(inputs).square().sum(), inputs)
    assert relative_error(found, expected) < 1e-5
    set_kernels(packed, "dense")
    assert relative_error(packed(inputs.detach()), dense(inputs.detach())) < 2e-6
    assert packed(torch.zeros(0, 64)).shape == (0, 64)
    assert not calls


@needs_cpu_kernel
def test_more_tokens_than_the_kernel_is_good_for(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]]) -> None:
    monkeypatch.setitem(PACKED24.routes, "cpu", replace(PACKED24.routes["cpu"], swiglu_tokens=2))
    dense, packed = packed_block()
    for tokens in (1, 2, 3):
        inputs = torch.randn(1, tokens, 64)
        assert relative_error(packed(inputs), dense(inputs)) < 2e-6
    assert calls == [(1, 1, 64), (1, 2, 64)]


def test_only_the_known_form_is_taken() -> None:
    for block in (Gated(bias=True), Gated()):
        assert not is_gated(block)  # not packed
    assert not is_gated(Sparse24Linear(64, 32))
    for odd in (Gated(activation="gelu"), Scaled()):
        assert len(pack_linears(odd)) == 3
        assert "forward" not in odd.__dict__
    narrow = Gated()
    narrow.up_proj = nn.Linear(64, 1, bias=False)
    narrow.up_proj.weight.data = weight24(1, 64)
    assert len(pack_linears(narrow)) == 3
    assert "forward" not in narrow.__dict__
    wrapped = Gated()
    own = wrapped.forward = lambda x: x
    pack_linears(wrapped)
    assert wrapped.forward is own


@needs_cpu_kernel
def test_biases_are_not_fused(calls: list[tuple[int, ...]]) -> None:
    dense, packed = packed_block(bias=True)
    inputs = torch.randn(3, 64)
    assert relative_error(packed(inputs), dense(inputs)) < 2e-6
    assert not calls


@needs_cpu_kernel
def test_copies_and_pickles_are_of_their_own(calls: list[tuple[int, ...]]) -> None:
    _, packed = packed_block()
    inputs = torch.randn(3, 64)
    expected = packed(inputs)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        packed.gate_proj.values.zero_()
        assert torch.equal(other(inputs), expected) and other.state_dict().keys() == packed.state_dict().keys()
    assert len(calls) == 3


@needs_cpu_kernel
def test_a_loaded_model_is_fused(tmp_path: Path, calls: list[tuple[int, ...]]) -> None:
    register()
    dense = pruned_model()
    dense.save_pretrained(tmp_path / "dense")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    model = load_packed(tmp_path / "packed", kernels="cpu")
    assert fuse_gated(model) == 0  # all of them are already
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, atol=1e-5, rtol=1e-4)
        assert len(calls) == 2
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(load_packed(tmp_path / "again", kernels="cpu")(TOKENS).logits, model(TOKENS).logits)
        plain = model.dequantize()
        torch.testing.assert_close(plain(TOKENS).logits, dense(TOKENS).logits, atol=1e-5, rtol=1e-4)
