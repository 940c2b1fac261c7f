"""Every architecture packs: loaded packed it computes what the pruned model does, and unpacked it is the same bits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparsegpt.kernels.archive import pack_folder, unpack_folder
from sparsegpt.kernels.hf import register
from sparsegpt.kernels.linear import packed_layers
from sparsegpt.masks import layer_mask
from sparsegpt.models import auto_class
from sparsegpt.sparsity import parse_sparsity

from .architectures import VARIANTS, WRAPPERS, block_matrices, tiny_variant, tiny_wrapper
from .support import logits_of, random_windows

ALL = [*VARIANTS, *WRAPPERS]
TOKENS = random_windows(2, 16)


@torch.no_grad()
def pruned_folder(path, variant, dtype=torch.float32):
    """A model pruned by magnitude, saved with the report that `run` would leave; and the model."""
    model = (tiny_variant(variant) if variant in VARIANTS else tiny_wrapper(variant)).to(dtype)
    matrices = block_matrices(model)
    for matrix in matrices.values():
        matrix.masked_fill_(~layer_mask(matrix.float().abs(), parse_sparsity("2:4")), 0)
    model.save_pretrained(path)
    (path / "report.json").write_text(json.dumps({"layers": [{"name": n, "sparsity": "2:4"} for n in matrices]}))
    return model, matrices


def loaded(path, **options):
    from transformers import AutoConfig

    return auto_class(AutoConfig.from_pretrained(path)).from_pretrained(path, **options)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register()


@pytest.mark.parametrize("variant", ALL)
def test_packed_it_computes_the_same_and_unpacked_it_is_the_same(variant, tmp_path):
    model, matrices = pruned_folder(tmp_path / "pruned", variant)
    report = pack_folder(tmp_path / "pruned", tmp_path / "packed")
    packed, info = loaded(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits_of(packed, TOKENS), logits_of(model, TOKENS), rtol=1e-3, atol=1e-3)
    weights = sum(layer.in_features * layer.out_features for layer in packed_layers(packed).values())
    assert weights == sum(matrix.numel() for matrix in matrices.values())
    assert len(report.packed) == len(packed_layers(packed))
    unpack_folder(tmp_path / "packed", tmp_path / "unpacked")
    assert_same_files(tmp_path / "unpacked", tmp_path / "pruned")
    packed.save_pretrained(tmp_path / "again")
    unpack_folder(tmp_path / "again", tmp_path / "unpacked-again")
    assert_same_files(tmp_path / "unpacked-again", tmp_path / "pruned")


def assert_same_files(found, expected):
    found, expected = (load_file(path / "model.safetensors") for path in (found, expected))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
