"""The Llama and OPT shapes on tiny random models, preset by preset: layout, patterns, what stays untouched.

tests/model/test_architectures.py goes through the whole table.
"""

import copy

import pytest
import torch

from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import prunable_linears
from sparsegpt.settings.prune_settings import PRESETS
from sparsegpt.settings.selection import name_filter
from tests.support import (
    assert_pattern,
    block_linears,
    in_short,
    logits_of,
    prune_model,
    random_windows,
    refused,
    tiny_model,
    weights_of,
)

SHAPES = ("llama", "mistral", "opt", "qwen2", "qwen3")
# These families, and variants of them that run other code.
VARIANTS = {model_type: (model_type, {}) for model_type in SHAPES} | {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-sliding": ("mistral", {"sliding_window": 4}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "opt-untied": ("opt", {"tie_word_embeddings": False}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt-projected": ("opt", {"word_embed_proj_dim": 16, "enable_bias": False}),
}


@pytest.fixture(params=in_short(VARIANTS, ("llama-tied", "qwen2-sliding", "opt-post-norm")))
def model(request):
    model_type, overrides = VARIANTS[request.param]
    return tiny_model(model_type, **overrides)


# The table


def test_the_table_finds_every_linear_of_the_blocks(model):
    decoder = DecoderModel.of(model)
    found = {prefix + name for prefix, block in decoder.by_prefix() for name in prunable_linears(block)}
    assert found == set(block_linears(model))
    assert len(found) == 2 * (6 if model.config.model_type == "opt" else 7)


def test_a_model_without_its_head_is_refused_with_advice():
    with refused("model.layers", "AutoModelForCausalLM"):
        prune_model(tiny_model("llama").model, random_windows(), "2:4")


def test_name_filter_takes_only_and_leaves_skip():
    choose = name_filter(r"layers\.[01]\.", "down_proj|o_proj")
    assert choose("model.layers.0.self_attn.q_proj")
    assert not choose("model.layers.2.self_attn.q_proj")
    assert not choose("model.layers.1.mlp.down_proj")
    assert name_filter()("anything")
    with refused("skip '('", "regular expression"):
        name_filter(None, "(")


# Pruning


@pytest.mark.parametrize("preset", PRESETS)
def test_every_block_linear_gets_the_pattern_and_nothing_else_changes_shape(model, preset):
    before = weights_of(model)
    options = {"reconstruct": 1, "distill": 1} if preset == "best" else {}
    report = prune_model(model, random_windows(), "2:4", preset=preset, **options)
    linears = block_linears(model)
    assert {layer.name for layer in report.layers} == set(linears)
    for linear in linears.values():
        assert_pattern(linear.weight, "2:4")
    touched = {f"{name}.weight" for name in linears}
    if options:  # training also moves the blocks' norms and biases
        touched |= {name for name in before if ".layers." in name}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        if name not in touched:
            assert torch.equal(tensor, before[name]), name
    assert torch.isfinite(logits_of(model, random_windows())).all()
    assert len(report.blocks) == 2
    assert report.density == pytest.approx(0.5)


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"best"}))  # its training may move what is not pruned
def test_sparsity_zero_leaves_the_logits_as_they_are_to_the_bit(model, preset):
    windows = random_windows()
    before = logits_of(model, windows)
    report = prune_model(model, windows, 0.0, preset=preset)
    assert torch.equal(logits_of(model, windows), before)
    assert all(layer.relative_error == 0 and layer.zeros == 0 for layer in report.layers)


def test_the_same_windows_give_the_same_bits_twice(model):
    twin = copy.deepcopy(model)
    for one in (model, twin):
        prune_model(one, random_windows(), "2:4", reconstruct=1)
    for (name, first), second in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_the_ladder_of_presets_separates_on_the_calibration_windows(model):
    """Distance of the logits from the dense model's: magnitude is worst, the correcting default best."""
    windows = random_windows(64)
    dense = logits_of(model, windows)

    def distance(**options):
        pruned = copy.deepcopy(model)
        prune_model(pruned, windows, "2:4", **options)
        return float((logits_of(pruned, windows) - dense).square().mean())

    assert distance() < distance(preset="paper") < distance(preset="paper", method="magnitude")


# The output layer


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", in_short([*SHAPES, "opt-post-norm"], ("llama", "opt-post-norm")))
def test_the_head_is_pruned_on_request_and_parts_from_a_tied_embedding(variant, tied, tmp_path):
    from transformers import AutoModelForCausalLM

    model_type, overrides = VARIANTS[variant]
    model = tiny_model(model_type, **{**overrides, "tie_word_embeddings": tied})
    embedding = model.get_input_embeddings().weight.clone()
    report = prune_model(model, random_windows(), "2:4", include_head=True)
    assert report.layers[-1].name == "lm_head"
    assert_pattern(model.lm_head.weight, "2:4")
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    expected = logits_of(model, random_windows())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_pattern(loaded.lm_head.weight, "2:4")
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    assert torch.equal(logits_of(loaded, random_windows()), expected)
