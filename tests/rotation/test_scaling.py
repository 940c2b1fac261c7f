"""Scaled inputs change nothing that a model computes, and the scales that are found lose least by definition."""

import pytest
import torch

from sparsegpt import prune_weight
from sparsegpt.grid import parse_grid
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.unfuse import unfused
from sparsegpt.quantization import encode, search_scales
from sparsegpt.rotation.rotatable import Rotatable
from sparsegpt.rotation.scaling import ALPHAS, find_scales, places
from tests.architectures import VARIANTS
from tests.rotation.test_bases import ROUNDING, lively, logits
from tests.support import prune_model, random_layer, random_windows, refused, tiny_model

# Where every linear that reads norm, values or a gated product has something before it that is known.
WHOLE = {"llama": {"self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"}, "opt": {"fc1"}}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_model_says_the_same_with_scaled_inputs(name):
    network, generator = lively(name), torch.Generator().manual_seed(0)
    model, before, scaled = Rotatable(DecoderModel.of(network)), logits(network), set()
    for block in model.decoder.blocks:
        with unfused(block):
            for place in places(model, block):
                width = block.get_submodule(place.watched).weight.shape[-1]
                drawn = torch.rand(width, generator=generator, dtype=torch.float64) * 2 + 0.2
                place.scale(place.tie(drawn))
                scaled |= place.readers.keys()
    assert (logits(network) - before).norm() <= ROUNDING * before.norm()
    assert WHOLE.get(name, set()) <= scaled


def test_the_scales_are_those_that_lose_least():
    weight, raw = random_layer(24, 64, seed=1)
    channels = torch.ones(64)
    channels[::8] = 20
    raw, magnitude, grid = raw * channels * channels[:, None], channels * 0.8, parse_grid("int3:16")

    def loss(scale):
        scales = search_scales(weight * scale, grid, importance=raw.diagonal() / scale.square())
        error = weight.double() - encode(weight * scale, scales).decode(torch.float64) / scale
        return float((error @ raw.double() * error).sum())

    powers = [magnitude**alpha for alpha in ALPHAS]
    losses = [loss(power / (power.max() * power.min()).sqrt()) for power in powers]
    found = find_scales([(weight, grid)], raw, magnitude)
    assert loss(found) == pytest.approx(min(losses), rel=1e-4)
    assert min(losses) < 0.8 * losses[0]


def test_a_model_is_rounded_with_scaled_inputs_and_tells_what_is_not():
    dense = tiny_model("opt")
    model = tiny_model("opt")
    report = prune_model(model, random_windows(), "2:4", preset="fast", quantize="int4:16", quantizer="awq")
    assert any(text.startswith("inputs of fc2 are not scaled") for text in report.warnings)
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        norms = [net.model.decoder.layers[0].get_submodule(name).weight for net in (model, dense)]
        assert not torch.equal(*norms)
    assert {layer.grid for layer in report.layers} == {"int4:16"}
    assert all(layer.zeros >= 0.5 for layer in report.layers)


def test_a_single_layer_has_nothing_before_it():
    weight, raw = random_layer(8, 32)
    with refused("quantizer 'awq' scales what comes before a layer too"):
        prune_weight(weight, raw, 0, grid="int4:32", quantizer="awq")
