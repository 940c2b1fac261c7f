"""Smaller models of every architecture: what transformers loads is what was cut, and what was cut is what was asked."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from sparsegpt.model.decoder import DecoderModel
from sparsegpt.shrinking.cutting import Kept, cut
from sparsegpt.shrinking.layouts import LAYOUTS
from sparsegpt.shrinking.shapes import Anatomy
from sparsegpt.shrinking.shrink import shrink_model
from tests.architectures import VARIANTS, tiny_variant
from tests.support import logits_of, prune_model, random_windows, refused, tiny_model, weights_of

WINDOWS = random_windows(8, 12)
PLAIN = {"method": "magnitude"}
# One of each way to keep heads and channels; the others are slower than they are telling.
TOLD = ("llama", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "gpt_oss", "qwen2_moe", "deepseek_v3")
KNOWN = [name for name, (model_type, _) in VARIANTS.items() if model_type in LAYOUTS and name != "phi-qk-norm"]
SAMPLED = [name if name in TOLD else pytest.param(name, marks=pytest.mark.slow) for name in KNOWN]


def matrices(model: nn.Module) -> int:
    """Weights of the matrices in the decoder blocks."""
    blocks = DecoderModel.of(model).blocks
    return sum(parameter.numel() for parameter in blocks.parameters() if parameter.ndim > 1)


@pytest.mark.parametrize("variant", SAMPLED)
def test_plain_transformers_loads_the_smaller_model(variant, tmp_path):
    model = tiny_variant(variant)
    before = weights_of(model)
    shrunk = shrink_model(model, WINDOWS, "70%")
    assert 0.5 < matrices(shrunk.model) / matrices(model) <= 0.7
    assert shrunk.report.kept == pytest.approx(matrices(shrunk.model) / matrices(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    shrunk.model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits_of(loaded.eval(), WINDOWS), logits_of(shrunk.model, WINDOWS))
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config[key] for key in shrunk.report.changes if key in config} == {
        key: value for key, value in shrunk.report.changes.items() if key in config
    }


def test_heads_and_channels_without_updates_are_those_of_the_dense_model():
    """By magnitude, from the definition: columns of zeros in the dense model compute what the smaller one does."""
    model = tiny_model("llama")
    shrunk = shrink_model(model, WINDOWS, heads="50%", channels="75%", **PLAIN)
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            queries = [part.weight.unflatten(0, (2, -1)).square().sum((1, 2)) for part in (attention.q_proj,)]
            keys = [
                part.weight.unflatten(0, (2, 8)).square().sum((1, 2)) for part in (attention.k_proj, attention.v_proj)
            ]
            outputs = attention.o_proj.weight.unflatten(1, (2, -1)).square().sum((0, 2))
            lost = int((sum(queries) + sum(keys) + outputs).argmin())
            attention.o_proj.weight[:, 16 * lost : 16 * (lost + 1)] = 0
            sums = mlp.gate_proj.weight.square().sum(1) + mlp.up_proj.weight.square().sum(1)
            sums += mlp.down_proj.weight.square().sum(0)
            mlp.down_proj.weight[:, sums.argsort()[:16]] = 0
    torch.testing.assert_close(logits_of(shrunk.model, WINDOWS), logits_of(model, WINDOWS))
    config = shrunk.model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert config.intermediate_size == 48


def test_updates_bring_the_smaller_model_nearer_to_the_dense_one():
    model = tiny_model("llama", spread=0.1)
    windows = random_windows(64, 16)
    dense = logits_of(model, windows)
    left = {
        method: float(
            (logits_of(shrink_model(model, windows, "60%", method=method).model, windows) - dense).square().sum()
        )
        for method in ("obs", "wanda", "magnitude", "random")
    }
    assert left["obs"] < min(left["wanda"], left["magnitude"], left["random"])


def test_what_is_drawn_depends_on_the_seed_alone():
    model = tiny_model("llama")
    found = [shrink_model(model, WINDOWS, "70%", method="random", seed=seed).model for seed in (0, 0, 1)]
    first, again, other = (logits_of(each, WINDOWS) for each in found)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_all_weights_of_the_smaller_model_train():
    model = tiny_model("llama", spread=0.1)
    windows = random_windows(128, 16)
    plain = shrink_model(model, windows, "60%").model
    trained = shrink_model(model, windows, "60%", reconstruct=1, distill=2, distill_rate=1e-3)
    losses = trained.report.epochs
    assert losses[-1] < losses[0]
    assert all(share <= 1 for share in trained.report.reconstruction)
    assert len(trained.report.reconstruction) == 2
    before = plain.state_dict()
    moved = [name for name, tensor in trained.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {name for name in before if ".layers." in name} <= set(moved)
    dense = logits_of(model, windows).log_softmax(-1)
    parted = [
        float((dense.exp() * (dense - logits_of(each, windows).log_softmax(-1))).sum())
        for each in (plain, trained.model)
    ]
    assert parted[1] < parted[0]


def test_a_smaller_model_is_pruned_as_any_other():
    shrunk = shrink_model(tiny_model("llama"), WINDOWS, heads="50%", channels="75%")
    report = prune_model(shrunk.model, WINDOWS, "2:4", preset="fast")
    assert report.density == 0.5


# Bad input


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({}, ("nothing says how small",)),
        ({"keep": "0"}, ("keep '0'", "above 0")),
        ({"keep": "0%"}, ("above 0",)),
        ({"keep": "120%"}, ("keep '120%'",)),
        ({"keep": "2"}, ("keep 2", "share")),
        ({"keep": "much"}, ("keep 'much'",)),
        ({"keep": "1%"}, ("1% of its blocks cannot be had", "1 key-value heads")),
        ({"keep": "50%", "parameters": "1K"}, ("keep and parameters are two budgets",)),
        ({"keep": "50%", "channels": "50%"}, ("channels are what the budget",)),
        ({"parameters": "few"}, ("parameters 'few'",)),
        ({"speedup": 0.5}, ("speedup 0.5", "above 1")),
        ({"heads": "3"}, ("heads 3", "2 heads share a key-value head", "a multiple of 2")),
        ({"heads": "8"}, ("heads 8 are out of range: the model has 4",)),
        ({"blocks": "3"}, ("blocks 3 are out of range: the model has 2",)),
        ({"channels": "65"}, ("channels 65 are out of range: the model has 64",)),
        ({"experts": "2"}, ("LlamaForCausalLM has no experts",)),
        ({"keep": "50%", "method": "best"}, ("method 'best'", "obs")),
        ({"keep": "50%", "method": "wanda", "error_correction": 0.5}, ("never updates weights",)),
        ({"keep": "50%", "depth": "last"}, ("depth 'last'", "divergence")),
        ({"heads": "50%", "choose": "divergence"}, ("without a budget",)),
        ({"keep": "50%", "distill": -1}, ("epochs",)),
    ],
)
def test_what_cannot_be_is_refused(options, fragments):
    with refused(*fragments):
        shrink_model(tiny_model("llama"), WINDOWS, **options)


@pytest.mark.parametrize(
    ("variant", "options", "fragments"),
    [
        ("opt", {"heads": "50%"}, ("'opt'", "no width of a head")),
        ("olmo2", {"heads": "50%"}, ("'olmo2'", "a norm stands across all heads")),
        ("deepseek_v3", {"heads": "50%"}, ("latent",)),
        ("phi-qk-norm", {"heads": "50%"}, ("q_layernorm", "cannot be shrunk so")),
        ("bloom", {"keep": "50%"}, ("'bloom' cannot be shrunk", "LAYOUTS")),
        ("falcon", {"keep": "50%"}, ("'falcon' cannot be shrunk",)),
        ("mixtral", {"experts": "1"}, ("a token is sent to 2 of 4",)),
    ],
)
def test_what_an_architecture_cannot_do_is_refused_by_name(variant, options, fragments):
    with refused(*fragments):
        shrink_model(tiny_variant(variant), WINDOWS, **options)


def test_a_block_that_its_index_would_change_is_refused():
    """The first block of this model is dense, because its configuration says so of the first."""
    anatomy = Anatomy.of(DecoderModel.of(tiny_variant("qwen3_moe-mixed")))
    with refused("model.layers.1 would become another kind of block", settings=["blocks"]):
        cut(anatomy, replace(anatomy.full, blocks=(1,)), Kept((1,), {}, {}))


def test_a_pruned_model_is_refused_with_the_right_order():
    model = tiny_model("llama")
    prune_model(model, WINDOWS, "2:4", preset="paper")
    with refused("was pruned already", "shrink the dense model first"):
        shrink_model(model, WINDOWS, "50%")


def test_a_packed_model_is_refused():
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "sparsegpt_24"}
    with refused("packed or quantised"):
        shrink_model(model, WINDOWS, "50%")


def test_every_row_says_why_heads_cannot_leave():
    assert all((layout.heads is None) == bool(layout.no_heads) for layout in LAYOUTS.values())
    assert all(layout.channels for layout in LAYOUTS.values())


def test_a_model_built_otherwise_than_its_row_is_refused():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down = layer.mlp.down_proj
        del layer.mlp.down_proj
    with refused("expected down_proj in its blocks, found none"):
        Anatomy.of(DecoderModel.of(model))
