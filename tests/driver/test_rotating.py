"""Pruning in other bases: the rotated model is the model, and what is written is an ordinary one."""

import pytest
import torch
from torch import nn

from sparsegpt import prune_model, rotate_model
from sparsegpt.driver.rotating import wanted_bases
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.rotation.rotatable import Rotatable
from tests.architectures import tiny_variant
from tests.support import assert_pattern, block_linears, random_windows, refused, tiny_model

TOKENS = torch.arange(2, 42).view(2, 20)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


def off(model, before):
    return float((logits(model) - before).norm() / before.norm())


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "gpt2", "qwen3_moe", "deepseek_v3", "falcon-new"])
def test_a_rotated_model_says_the_same_and_drops_less(variant):
    model = tiny_variant(variant)
    before, weights = logits(model), [weight.detach().clone() for weight in model.parameters()]
    report = rotate_model(model, random_windows(16, length=16), "2:4")
    assert off(model, before) < 1e-4
    for first, last in (report.stream, report.values):
        assert 0 < last < first
    assert report.blocks == len(DecoderModel.of(model).blocks)
    assert any(not torch.equal(new, old) for new, old in zip(model.parameters(), weights, strict=False))


def test_seeds_and_repetitions():
    models = [tiny_model("llama") for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        rotate_model(model, random_windows(16), 0.5, seed=seed)
    first, again, other = (list(model.parameters()) for model in models)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


@pytest.mark.parametrize("rotate", ["values", "stream", "all"])
@pytest.mark.parametrize("sparsity", ["2:4", "50%"])
def test_pruning_in_other_bases_keeps_the_pattern(rotate, sparsity):
    model = tiny_variant("llama-tied")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    report = prune_model(model, random_windows(16), sparsity, rotate=rotate)
    for name, linear in block_linears(model).items():
        if name.startswith("model.layers."):
            assert_pattern(linear.weight, sparsity)
    assert (report.rotation.stream is not None) == (rotate != "values")
    assert (report.rotation.values is not None) == (rotate != "stream")
    assert (head.weight is embedding.weight) == (rotate == "values")
    assert report.rotation.untied_parameters == (0 if rotate == "values" else head.weight.numel())
    assert model.config.tie_word_embeddings == (rotate == "values")


def test_what_auto_takes():
    """Values wherever there are any; the stream where that unties no head of some size."""
    expected = {"llama": (True, True), "llama-tied": (False, True), "gemma2": (False, True)}
    expected |= {"opt-projected": (True, True), "opt": (False, True)}
    for variant, (stream, values) in expected.items():
        wanted = wanted_bases(Rotatable(DecoderModel.of(tiny_variant(variant))), "auto")
        assert (wanted.stream, wanted.values) == (stream, values), variant


def test_what_a_model_does_not_have_is_refused_by_name():
    for rotate in ("stream", "all"):
        with refused("Gemma2ForCausalLM", "a norm stands between", settings=["rotate"]):
            prune_model(tiny_variant("gemma2"), random_windows(8), "2:4", rotate=rotate)


def test_without_rotation_nothing_changes_but_the_pruned():
    model = tiny_variant("llama")
    embedding = model.get_input_embeddings().weight.detach().clone()
    report = prune_model(model, random_windows(8), "2:4", rotate="off")
    assert report.rotation is None
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_a_model_that_computes_something_else_is_refused(monkeypatch):
    """As one would that reads the stream where its layout does not say so."""
    model = tiny_variant("llama")
    model.model.layers[0].register_module("extra", nn.Linear(32, 32, bias=False))
    block = model.model.layers[0]
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda hidden, **given: forward(hidden, **given) + block.extra(hidden))
    with refused("computes something else in another basis", settings=["rotate"]):
        rotate_model(model, random_windows(8), "2:4")


def test_norms_beside_the_pruned_blocks_are_turned_too():
    """With some blocks pruned the others stand in the new basis as well."""
    model = tiny_variant("llama")
    before = logits(model)
    prune_model(model, random_windows(16), 0.01, rotate="all", only_blocks="0")
    assert off(model, before) < 0.2
    assert len(block_linears(model)) == 14
