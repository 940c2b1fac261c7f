"""The same model in any basis: every tiny model, in bases drawn at random, says what it said."""

import pytest
import torch

from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import FAMILIES
from sparsegpt.model.unfuse import unfused
from sparsegpt.rotation.bases import Bases, rotate_block, rotate_entry, rotate_exit
from sparsegpt.rotation.layouts import LAYOUTS
from sparsegpt.rotation.rotatable import Rotatable
from tests.architectures import VARIANTS, WRAPPERS, tiny_variant, tiny_wrapper
from tests.support import refused

# Norms of these models compute in float32 whatever the model's dtype; LayerNorm and the rest stay in float64.
ROUNDING = 1e-6
# Which bases an architecture does not have, by what its code does; all others have both.
WITHOUT_STREAM = {"bloom", "bloom-post-norm", "gemma2", "gemma3_text", "olmo2", "olmo3", "opt-post-norm", *WRAPPERS}
TOKENS = torch.arange(2, 26).view(2, 12)


def random_basis(size, generator, *, fixes_ones=False):
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    if not fixes_ones:
        return torch.linalg.qr(drawn)[0]
    drawn[:, 0] = 1
    frame = torch.linalg.qr(drawn)[0]
    turn = torch.eye(size, dtype=torch.float64)
    turn[1:, 1:] = random_basis(size - 1, generator)
    return frame @ turn @ frame.T


def random_values(model, generator):
    found = {}
    for index, block in enumerate(model.decoder.blocks):
        with unfused(block):
            heads = model.value_heads(block)
        found[index] = torch.stack([random_basis(heads.width, generator) for _ in range(heads.groups)])
    return found


def rotate(model, bases):
    for index in range(len(model.decoder.blocks)):
        rotate_block(model, index, bases)
    if bases.stream is not None:
        outside = model.outside()
        for module in outside.entries:
            rotate_entry(module, bases.stream)
        rotate_exit(outside.norm, outside.exit, model.layout.unit, bases.stream)


@torch.no_grad()
def lively(name):
    """A tiny model in float64 whose norms, biases and all else are no defaults."""
    model = (tiny_variant(name) if name in VARIANTS else tiny_wrapper(name)).double().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products know no float64
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.1)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


def test_every_family_has_a_layout():
    assert LAYOUTS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", [*VARIANTS, *WRAPPERS])
def test_a_model_says_the_same_in_other_bases(name):
    network, generator = lively(name), torch.Generator().manual_seed(0)
    model, before = Rotatable(DecoderModel.of(network)), logits(network)
    embedding = model.decoder.embedding.weight.detach().clone()
    values, stream = Bases(values=random_values(model, generator)), None
    if name in WITHOUT_STREAM:
        with refused("cannot be rotated", model.no_stream):
            model.check(stream=True, values=False)
    else:
        stream = random_basis(network.config.hidden_size, generator, fixes_ones=model.layout.centred)
    weights = [parameter.detach().clone() for parameter in model.decoder.blocks.parameters()]
    rotate(model, Bases(stream, values.values))
    after = logits(network)
    assert (after - before).norm() <= ROUNDING * before.norm()
    changed = [
        not torch.allclose(new, old) for new, old in zip(model.decoder.blocks.parameters(), weights, strict=True)
    ]
    assert any(changed)
    if stream is not None and "projected" not in name:
        assert not torch.allclose(model.decoder.embedding.weight, embedding)
        assert network.get_output_embeddings().weight is not model.decoder.embedding.weight


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "phi3"])
def test_a_basis_that_is_not_orthonormal_changes_what_a_model_says(name):
    network, generator = lively(name), torch.Generator().manual_seed(0)
    model, before = Rotatable(DecoderModel.of(network)), logits(network)
    rotate(model, Bases(torch.randn(network.config.hidden_size, network.config.hidden_size, generator=generator)))
    assert (logits(network) - before).norm() > 0.01 * before.norm()


def test_layer_norms_have_no_basis_that_moves_the_vector_of_ones():
    network, generator = lively("gpt2"), torch.Generator().manual_seed(0)
    model, before = Rotatable(DecoderModel.of(network)), logits(network)
    rotate(model, Bases(random_basis(network.config.hidden_size, generator)))
    assert (logits(network) - before).norm() > 0.01 * before.norm()


def test_values_that_are_clipped_have_no_basis():
    model = Rotatable(DecoderModel.of(tiny_variant("olmoe", clip_qkv=1.0)))
    with refused("clipped"):
        model.check(stream=False, values=True)
    model = Rotatable(DecoderModel.of(tiny_variant("mpt", attn_config={"clip_qkv": 6.0})))
    with refused("clipped"):
        model.check(stream=False, values=True)


def test_bases_come_back_from_their_tensors():
    bases = Bases(torch.eye(4), {0: torch.eye(2)[None], 11: torch.ones(3, 2, 2)})
    again = Bases.of_tensors(bases.tensors())
    assert torch.equal(again.stream, bases.stream)
    assert again.values.keys() == bases.values.keys()
    assert all(torch.equal(again.values[index], bases.values[index]) for index in bases.values)
    assert not Bases.of_tensors({})
