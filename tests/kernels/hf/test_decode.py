"""One token through a block at once: what the model itself computes; and its own way wherever somebody could tell."""

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from sparsegpt.kernels.checkpoint.archive import pack_folder
from sparsegpt.kernels.cpu.library import machine_level
from sparsegpt.kernels.format.bitmask import BitmaskValues
from sparsegpt.kernels.format.bitmask_integers import BitmaskIntegers
from sparsegpt.kernels.format.form import Form
from sparsegpt.kernels.hf import decode, growing
from sparsegpt.kernels.hf.in_place import pack_linears
from sparsegpt.kernels.hf.quantizer import load_packed
from sparsegpt.kernels.layers.linear import set_kernels
from tests.kernels.helpers import relative_error, weight24

pytestmark = pytest.mark.skipif(machine_level() is None, reason="no C++ compiler here")

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
TOKENS = torch.arange(10).view(1, 10) + 3
ONE = torch.tensor([[7]])


def dense_model(model: type = LlamaForCausalLM, config: type = LlamaConfig, **more: Any) -> Any:
    torch.manual_seed(0)
    made = model(config(**{**SIZES, **more})).eval()
    for seed, (name, module) in enumerate(made.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = 0.3 * weight24(module.out_features, module.in_features, seed=seed)
    return made


def packed_model(dtype: torch.dtype = torch.float32, form: Form | None = None, **more: Any) -> Any:
    model = dense_model(**more).to(dtype)
    pack_linears(model, kernels="cpu", form=form)
    return model


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A number for each block that went through its program."""
    seen: list[int] = []
    run = decode.Chain.run

    def spy(self: Any, *arguments: Any) -> Tensor | None:
        output = run(self, *arguments)
        seen.extend([1] if output is not None else [])
        return output

    monkeypatch.setattr(decode.Chain, "run", spy)
    yield seen


@pytest.fixture
def stretches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many blocks each program worked out."""
    seen: list[int] = []
    run = decode.Stretch.run

    def spy(self: Any, *arguments: Any) -> Tensor:
        seen.append(len(self.blocks))
        return run(self, *arguments)

    monkeypatch.setattr(decode.Stretch, "run", spy)
    yield seen


def prompted(model: Any, **arguments: Any) -> Any:
    return model(TOKENS, use_cache=True, **arguments).past_key_values


def next_logits(models: tuple[Any, ...], caches: tuple[Any, ...], token: int) -> list[Tensor]:
    one = torch.tensor([[token]])
    return [model(one, past_key_values=cache).logits for model, cache in zip(models, caches, strict=True)]


def greedy(model: Any, count: int) -> Tensor:
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    return model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **settings)


@pytest.mark.parametrize("form", [None, BitmaskValues(), BitmaskIntegers(8, 32)], ids=str)
def test_the_tokens_that_the_model_itself_writes(form: Form | None, steps: list[int]) -> None:
    model = packed_model(form=form)
    expected = copy.deepcopy(model)
    decode.unstep_blocks(expected)
    assert torch.equal(greedy(model, 80), greedy(expected, 80))  # beyond the room that the first token makes
    assert len(steps) == 2 * 79


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("kernels", ["cpu", "dense"])
@torch.no_grad()
def test_logits_and_cache_against_float64(dtype: torch.dtype, tolerance: float, kernels: str, steps: list[int]) -> None:
    """The tolerance is twice what dense layers are off with these weights."""
    exact, model = dense_model().to(dtype).double(), packed_model(dtype)
    set_kernels(model, kernels)
    caches = prompted(exact), prompted(model)
    pairs = [next_logits((exact, model), caches, token) for token in range(3, 12)]
    expected, found = (torch.cat(logits) for logits in zip(*pairs, strict=True))
    assert relative_error(found, expected) < tolerance
    for ours, its in zip(caches[1].layers, caches[0].layers, strict=True):
        assert ours.keys.shape == its.keys.shape == (1, 2, 19, 16)
        assert relative_error(ours.keys, its.keys) < tolerance
        assert relative_error(ours.values, its.values) < tolerance
    assert len(steps) == (18 if kernels == "cpu" else 0)


# Model, settings, and whether its blocks are taken.
OTHERS: dict[str, tuple[type, type, dict[str, Any], bool]] = {
    "qwen2, whose projections have a bias": (Qwen2ForCausalLM, Qwen2Config, {}, True),
    "qwen3, which norms queries and keys": (Qwen3ForCausalLM, Qwen3Config, {}, True),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}, True),
    "mistral with a window": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}, False),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {}, False),
    "glm, whose positions turn neighbours": (GlmForCausalLM, GlmConfig, {}, False),
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_architectures_compute_what_they_did(name: str, steps: list[int]) -> None:
    model, config, more, taken = OTHERS[name]
    dense = dense_model(model, config, **more)
    for parameter in dense.parameters():
        if parameter.ndim == 1:  # biases and gains that are not all the same
            parameter.add_(0.3 * torch.randn_like(parameter))
    packed = copy.deepcopy(dense)
    pack_linears(packed, kernels="cpu")
    caches = prompted(dense), prompted(packed)
    for token in range(3, 8):
        expected, found = next_logits((dense, packed), caches, token)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert len(steps) == (10 if taken else 0)


def with_mask(model: Any) -> Any:
    mask = torch.ones(1, 11, dtype=torch.long)
    mask[0, 2] = 0
    return model(ONE, attention_mask=mask, past_key_values=prompted(model))


def with_hook(model: Any) -> Any:
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    other = model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: None)
    try:
        return model(ONE, past_key_values=prompted(model))
    finally:
        handle.remove(), other.remove()


def with_other_attention(model: Any) -> Any:
    model.set_attn_implementation("eager")
    try:
        return model(ONE, past_key_values=prompted(model))
    finally:
        model.set_attn_implementation("sdpa")


def with_scaled_parts(model: Any) -> Any:
    """Other modules where there were ours."""
    model = copy.deepcopy(model)
    model(ONE, past_key_values=prompted(model))
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Tanh()
    return model(ONE, past_key_values=prompted(model))


def with_replaced_forwards(model: Any) -> Any:
    model = copy.deepcopy(model)
    model(ONE, past_key_values=prompted(model))
    for layer in model.model.layers:
        layer.mlp.forward = lambda x: 2 * x
    return model(ONE, past_key_values=prompted(model))


def with_gradients(model: Any) -> Any:
    with torch.enable_grad():
        return model(ONE, past_key_values=prompted(model))


def with_autocast(model: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(ONE, past_key_values=DynamicCache())


LEFT_ALONE: dict[str, Callable[[Any], Any]] = {
    "two tokens": lambda model: model(TOKENS[:, :2], past_key_values=prompted(model)),
    "two texts": lambda model: model(ONE.repeat(2, 1), past_key_values=model(TOKENS.repeat(2, 1)).past_key_values),
    "no cache": lambda model: model(ONE, use_cache=False),
    "a cache without tokens": lambda model: model(ONE, past_key_values=DynamicCache()),
    "a static cache": lambda model: model(
        ONE, past_key_values=prompted(model, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    ),
    "a mask": with_mask,
    "a hook": with_hook,
    "eager attention": with_other_attention,
    "another activation": with_scaled_parts,
    "another forward": with_replaced_forwards,
    "gradients": with_gradients,
    "autocast": with_autocast,
    "training": lambda model: with_mode(model, True),
}


def with_mode(model: Any, training: bool) -> Any:
    model.train(training)
    try:
        return model(ONE, past_key_values=prompted(model))
    finally:
        model.eval()


@pytest.mark.parametrize("name", LEFT_ALONE)
@torch.no_grad()
def test_what_is_the_models_own(name: str, steps: list[int]) -> None:
    model = packed_model()
    own = copy.deepcopy(model)
    decode.unstep_blocks(own)
    torch.testing.assert_close(LEFT_ALONE[name](model).logits, LEFT_ALONE[name](own).logits)
    before = len(steps)
    assert before in (0, 2)  # two of a first, ordinary token
    model(ONE, past_key_values=prompted(model))
    assert len(steps) == before + 2


@torch.no_grad()
def test_attentions_are_given_when_asked_for(steps: list[int]) -> None:
    model = packed_model()
    model.set_attn_implementation("eager")
    found = model(ONE, past_key_values=prompted(model), output_attentions=True, output_hidden_states=True)
    assert len(found.attentions) == 2 and len(found.hidden_states) == 3 and not steps


@torch.no_grad()
def test_hidden_states_are_those_of_the_blocks(steps: list[int]) -> None:
    model = packed_model()
    own = copy.deepcopy(model)
    decode.unstep_blocks(own)
    states = [one(ONE, past_key_values=prompted(one), output_hidden_states=True).hidden_states for one in (model, own)]
    torch.testing.assert_close(*states)


@torch.no_grad()
def test_weights_and_numbers_of_threads_may_change(steps: list[int]) -> None:
    model, threads = packed_model(), torch.get_num_threads()
    first = model(ONE, past_key_values=prompted(model)).logits
    for layer in model.model.layers:
        layer.input_layernorm.weight = nn.Parameter(2 * layer.input_layernorm.weight)
        layer.mlp.down_proj.values = 2 * layer.mlp.down_proj.values
        layer.self_attn.o_proj.values.mul_(2)
    own = copy.deepcopy(model)
    decode.unstep_blocks(own)
    found = model(ONE, past_key_values=prompted(model)).logits
    torch.testing.assert_close(found, own(ONE, past_key_values=prompted(own)).logits)
    assert not torch.allclose(found, first, rtol=1e-2)
    try:
        torch.set_num_threads(threads + 1)
        torch.testing.assert_close(model(ONE, past_key_values=prompted(model)).logits, found)
    finally:
        torch.set_num_threads(threads)
    assert len(steps) == 6


@torch.no_grad()
def test_copies_and_pickles_are_of_their_own(steps: list[int]) -> None:
    model = packed_model()
    expected = model(ONE, past_key_values=prompted(model)).logits
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for layer in model.model.layers:
        layer.mlp.down_proj.values.zero_()
    for other in others:
        assert torch.equal(other(ONE, past_key_values=prompted(other)).logits, expected)
    assert len(steps) == 6


@torch.no_grad()
def test_loaded_saved_and_dense_again(tmp_path: Path, steps: list[int]) -> None:
    dense = dense_model()
    dense.save_pretrained(tmp_path / "dense")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    model = load_packed(tmp_path / "packed", kernels="cpu")
    assert torch.equal(greedy(model, 4), greedy(dense, 4)) and len(steps) == 6
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(greedy(model.dequantize(), 4), greedy(dense, 4)) and len(steps) == 6


@torch.no_grad()
def test_what_others_hold_of_a_cache_stays(steps: list[int]) -> None:
    model = packed_model()
    cache = prompted(model)
    for _ in range(3):
        model(ONE, past_key_values=cache)
    held, kept = cache.layers[0].keys, cache.layers[0].keys.clone()
    shared, own = copy.copy(cache.layers[0]), copy.deepcopy(cache)
    cache.crop(-2)
    model(ONE + 1, past_key_values=cache)
    model(ONE + 2, past_key_values=own)
    assert (
        torch.equal(held, kept) and torch.equal(shared.keys, kept) and torch.equal(own.layers[0].keys[:, :, :13], kept)
    )
    assert cache.get_seq_length() == 12 and own.get_seq_length() == 14
    again = prompted(model)
    for token in (ONE, ONE + 1):
        expected = model(token, past_key_values=again)
    torch.testing.assert_close(cache.layers[1].keys[:, :, :11], again.layers[1].keys[:, :, :11])
    assert expected.logits.shape == (1, 1, 64)


def test_room_is_made_rarely() -> None:
    layer = DynamicCache().layer_class_to_replicate()
    layer.update(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))
    rooms, expected = set(), layer.keys
    for token in range(200):
        room = growing.room_of(layer)
        room.whole[0][:, :, room.length], room.whole[1][:, :, room.length] = token, -token
        expected = torch.cat((expected, torch.full((1, 2, 1, 4), float(token))), 2)
        room.grow(layer)
        rooms.add(id(room.whole[0]))
        assert torch.equal(layer.keys, expected) and layer.get_seq_length() == token + 6
    assert len(rooms) <= 4 and torch.equal(layer.values[:, :, 5:], -expected[:, :, 5:])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_blocks_are_worked_out_together(mode: Any, stretches: list[int]) -> None:
    model = packed_model(num_hidden_layers=4)
    own = copy.deepcopy(model)
    decode.unstep_blocks(own)
    with mode():
        cache, its = prompted(model), prompted(own)
        for token in range(3, 7):
            found, expected = next_logits((model, own), (cache, its), token)
            torch.testing.assert_close(found, expected)
    assert stretches == [1, 1, 1, 1, 4, 4, 4]
    for layer, other in zip(cache.layers, its.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys)


def changed_in_place(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.mul_(2)


def changed_cache(module: Any, inputs: Any, arguments: Any, output: Tensor) -> None:
    layer = arguments["past_key_values"].layers[3]
    layer.keys, layer.values = 2 * layer.keys, layer.values.flip(2)


BETWEEN: dict[str, Callable[[Any], Any]] = {
    "an output changed in place": lambda block: block.register_forward_hook(changed_in_place),
    "another output": lambda block: block.register_forward_hook(lambda *found: found[-1] + 1),
    "the keys of a later block": lambda block: block.register_forward_hook(changed_cache, with_kwargs=True),
    "a hook on a part": lambda block: block.mlp.up_proj.register_forward_hook(lambda *found: 2 * found[-1]),
}


@pytest.mark.parametrize("name", BETWEEN)
@torch.no_grad()
def test_what_was_worked_out_ahead_gives_way(name: str, stretches: list[int]) -> None:
    """The second block of four does something else from the third token on, and ends with that after the fifth."""
    model = packed_model(num_hidden_layers=4)
    own = copy.deepcopy(model)
    decode.unstep_blocks(own)
    cache, its = prompted(model), prompted(own)
    handles: list[Any] = []
    for token in range(3, 11):
        if token == 5:
            handles = [BETWEEN[name](one.model.layers[1]) for one in (model, own)]
        if token == 8:
            for handle in handles:
                handle.remove()
        torch.testing.assert_close(*next_logits((model, own), (cache, its), token))
    for layer, other in zip(cache.layers, its.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys)
        torch.testing.assert_close(layer.values, other.values)
    assert stretches[-1] == 4
    assert sum(stretches) <= 4 * 8 + 4  # what nobody takes is not worked out again


@torch.no_grad()
def test_blocks_that_nobody_asks_for(stretches: list[int]) -> None:
    """A model that stops after two of its four blocks."""
    model = packed_model(num_hidden_layers=4)
    cache = prompted(model)
    for token in range(3, 5):
        model(torch.tensor([[token]]), past_key_values=cache)
    model.config.num_hidden_layers = 2
    for token in range(5, 8):
        model(torch.tensor([[token]]), past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [15, 15, 12, 12]
    assert stretches == [1, 1, 1, 1, 4, 4, 2, 2]


def test_two_threads(stretches: list[int]) -> None:
    """Each writes its own text with the same model."""
    model = packed_model(num_hidden_layers=4)
    expected = [greedy(model, count) for count in (30, 40)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda count: greedy(model, count), (30, 40)))
    assert all(map(torch.equal, found, expected))


@torch.no_grad()
def test_another_default_device(stretches: list[int]) -> None:
    """What the programs compute on is on the CPU, wherever new tensors are by default."""
    model = packed_model(num_hidden_layers=3)
    expected = [model(ONE, past_key_values=prompted(model)).logits for _ in range(2)]
    model, cache = copy.deepcopy(model), prompted(model)
    embedded = model.model.embed_tokens(ONE)
    turn = model.model.rotary_emb(embedded, torch.tensor([[10]]))
    with torch.device("meta"):
        model = copy.deepcopy(model)
        hidden = embedded
        for layer in model.model.layers:
            hidden = layer(hidden, past_key_values=cache, position_embeddings=turn)
    found = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(found, expected[0])
    assert stretches == [1, 1, 1, 3, 1, 1, 1]
