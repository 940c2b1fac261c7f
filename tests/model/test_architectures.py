"""Every architecture of the table in blocks.py on a tiny random model: found, pruned, left alone, saved.

Weight matrices are found by their shapes in the state dict, and what flows through a model comes from whole-model
runs of transformers' own code, never through the table under test.
"""

import pytest
import torch

from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import FAMILIES, family_of, prunable_linears
from sparsegpt.model.unfuse import unfused
from tests.architectures import CONFIGS, COVERING, VARIANTS, WRAPPERS, block_matrices, stored_keys, tiny
from tests.support import assert_pattern, in_short, logits_of, prune_model, random_windows, refused, weights_of

MODELS = [*VARIANTS, *WRAPPERS]
POST_NORMS = {"gemma2", "gemma3_text", "gemma3", "olmo2", "olmo3"}


@pytest.fixture(params=MODELS)
def model(request):
    return tiny(request.param)


# For what is the same in all rows of one layout.
covered = pytest.mark.parametrize("model", in_short(MODELS, COVERING), indirect=True)


def in_blocks(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def test_every_row_of_the_table_has_a_tiny_model():
    assert CONFIGS.keys() | {"qwen2_vl_text"} == FAMILIES.keys()


def layout(variant):
    model_type, changes = VARIANTS[variant]
    family = FAMILIES[model_type]
    for (attribute, value), other in family.instead.items():
        if changes.get(attribute) == value:
            family = other
    return family.blocks, str(family.residuals), family.uncorrectable


def test_the_covering_models_have_every_layout():
    assert set(map(layout, set(COVERING) - set(WRAPPERS))) == set(map(layout, VARIANTS))


def test_every_weight_matrix_of_the_blocks_is_found(model):
    decoder = DecoderModel.of(model)
    found = {}
    for prefix, block in decoder.by_prefix():
        with unfused(block):
            for name, linear in prunable_linears(block).items():
                found[prefix + name] = linear.weight.detach().clone()
    matrices = block_matrices(model)
    assert found.keys() == matrices.keys()
    for name, matrix in matrices.items():
        assert torch.equal(found[name], matrix), name


def test_the_default_prunes_everything_and_the_saved_model_is_the_same(model, tmp_path):
    before, kept = weights_of(model), {id(parameter) for parameter in model.parameters()}
    report = prune_model(model, random_windows(), "2:4")
    matrices = block_matrices(model)
    assert sorted(layer.name for layer in report.layers) == sorted(matrices)
    for layer in report.layers:
        assert_pattern(matrices[layer.name], "2:4")
        assert layer.shape == tuple(matrices[layer.name].shape)
    assert {id(parameter) for parameter in model.parameters()} == kept
    assert weights_of(model).keys() == before.keys()
    touched = stored_keys(matrices)
    for name, tensor in model.state_dict().items():
        assert name in touched or torch.equal(tensor, before[name]), name
    logits = logits_of(model, random_windows())
    assert torch.isfinite(logits).all()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits_of(loaded, random_windows()), logits)


@covered
def test_sparsity_zero_leaves_every_weight_and_the_logits_as_they_are_to_the_bit(model):
    windows, before = random_windows(), weights_of(model)
    logits = logits_of(model, windows)
    report = prune_model(model, windows, 0.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(logits_of(model, windows), logits)
    assert all(layer.relative_error == 0 and layer.zeros == 0 for layer in report.layers)


@covered
def test_training_keeps_the_exact_count_and_the_routers(model):
    before = weights_of(model)
    report = prune_model(model, random_windows(), 0.5, preset="paper", reconstruct=1, look_ahead=1, distill=1)
    matrices = block_matrices(model)
    for matrix in matrices.values():
        assert_pattern(matrix, 0.5)
    assert all(block.reconstruction <= 1 for block in report.blocks)
    assert len(report.epochs) == 2
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        if (
            not in_blocks(name)
            or "vis" in name
            or (tensor.ndim == 2 and name.endswith(("gate.weight", "router.weight")))
        ):
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("variant", in_short(sorted(POST_NORMS), ["gemma3"]))
def test_behind_a_norm_residual_correction_is_off_or_refused(variant):
    report = prune_model(tiny(variant), random_windows(), "2:4")
    assert report.settings.residual_correction == 0
    assert report.settings.error_correction > 0
    assert any("residual correction" in warning and "norm" in warning for warning in report.warnings)
    with refused("residual correction", "norm", settings=["residual_correction"]):
        prune_model(tiny(variant), random_windows(), "2:4", residual_correction=0.5)
    assert prune_model(tiny(variant), random_windows(), "2:4", residual_correction=0.0).warnings == []


@pytest.mark.parametrize("variant", sorted(set(MODELS) - POST_NORMS))
def test_elsewhere_residual_correction_stays_on(variant):
    assert not family_of(tiny(variant)).uncorrectable


@covered
def test_the_head_is_pruned_on_request_and_parts_from_a_tied_embedding(model, tmp_path):
    embedding = model.get_input_embeddings().weight.clone()
    prune_model(model, random_windows(), "2:4", preset="paper", include_head=True)
    assert_pattern(model.get_output_embeddings().weight, "2:4")
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    logits = logits_of(model, random_windows())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    assert torch.equal(logits_of(loaded, random_windows()), logits)
