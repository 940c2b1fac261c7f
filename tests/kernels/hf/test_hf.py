"""Packed folders through transformers: load, generate, save, load again; damage refused before a tensor is used."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.tensor_files import WEIGHTS, ShardedWriter, header_room
from sparsegpt.kernels.checkpoint.archive import pack_folder, unpack_folder
from sparsegpt.kernels.hf.quantizer import Sparse24Quantizer, load_packed, name_patterns, register
from sparsegpt.kernels.layers.linear import packed_layers
from sparsegpt.kernels.layers.sparse_linear import Sparse24Linear
from tests.forked import Forked
from tests.kernels.helpers import weight24

LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
OPT = OPTConfig(
    vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
TOKENS = torch.arange(10).view(1, 10) + 3


def pruned_model(kind: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA) if kind == "llama" else OPTForCausalLM(OPT)
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = 0.3 * weight24(module.out_features, module.in_features, seed=seed)
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()
    register()  # twice is fine


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("hf")
    pruned_model().save_pretrained(base / "dense")
    pack_folder(base / "dense", base / "packed")
    return base / "dense", base / "packed"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_loads_like_any_model(kind: str, tmp_path: Path) -> None:
    dense = pruned_model(kind)
    dense.save_pretrained(tmp_path / "dense")
    report = pack_folder(tmp_path / "dense", tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert set(packed_layers(model)) == set(report.packed) and len(report.packed) == (14 if kind == "llama" else 12)
    assert isinstance(model.hf_quantizer, Sparse24Quantizer)
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-4)


def test_generates_the_same_tokens(folders: tuple[Path, Path]) -> None:
    dense, packed = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(packed.generate(TOKENS, **settings), dense.generate(TOKENS, **settings))


def test_dtype_and_device_map(folders: tuple[Path, Path]) -> None:
    model = load_packed(folders[1], dtype=torch.bfloat16, kernels="dense")
    layer = next(iter(packed_layers(model).values()))
    assert layer.values.dtype == torch.bfloat16 and layer.meta.dtype == torch.int32 and layer.kernels == "dense"
    pytest.importorskip("accelerate", reason="transformers needs accelerate for device_map")
    mapped = AutoModelForCausalLM.from_pretrained(folders[1], device_map={"": "cpu"})
    assert torch.equal(logits(mapped), logits(AutoModelForCausalLM.from_pretrained(folders[1])))


def test_saves_and_loads_again(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    unpack_folder(tmp_path / "again", tmp_path / "unpacked")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
    original = AutoModelForCausalLM.from_pretrained(folders[0]).state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in plain.state_dict().items())


def test_dequantize_gives_linears_back(folders: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    expected = logits(model)
    model = model.dequantize()
    assert not packed_layers(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_base_model_of_a_head_folder(folders: tuple[Path, Path]) -> None:
    model = AutoModel.from_pretrained(folders[1])
    assert all(isinstance(layer, Sparse24Linear) for layer in packed_layers(model).values())
    assert len(packed_layers(model)) == 14


def test_input_gradients_flow_through_the_model(folders: tuple[Path, Path]) -> None:
    dense, packed = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    gradients = []
    for model in (dense, packed):
        embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_(True)
        gradients.append(torch.autograd.grad(model(inputs_embeds=embedded).logits.sum(), embedded)[0])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_damage_is_refused_before_loading(folders: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = copy_of(folders[1], tmp_path / "damaged")
    data = bytearray((damaged / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (damaged / WEIGHTS).write_bytes(data)
    with pytest.raises(SparseGPTError, match="checksum of"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_files_of_other_shapes_than_the_config_says_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Sound by their checksums: the layer that does not fit is named before anything is loaded."""
    odd, name = copy_of(folders[1], tmp_path / "odd"), "model.layers.1.mlp.down_proj"
    tensors = load_file(odd / WEIGHTS)
    tensors[f"{name}.meta"] = tensors[f"{name}.meta"].repeat(1, 2)
    with ShardedWriter(odd, header_room(tensors)) as writer:
        writer.add(*tensors.items())
    with pytest.raises(SparseGPTError, match=rf"{name}: packed weight of shape \(32, 52\) needs values .* found"):
        AutoModelForCausalLM.from_pretrained(odd)


def test_a_packed_model_without_files_is_refused(folders: tuple[Path, Path]) -> None:
    config = AutoConfig.from_pretrained(folders[1])
    with pytest.raises(SparseGPTError, match="loaded from its files"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=load_file(folders[1] / WEIGHTS))


def test_newer_version_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    newer = copy_of(folders[1], tmp_path / "newer")
    config = json.loads((newer / "config.json").read_text())
    config["quantization_config"]["format_version"] = 7
    (newer / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparseGPTError, match="update sparsegpt"):
        AutoModelForCausalLM.from_pretrained(newer)
    with pytest.raises(SparseGPTError, match="update sparsegpt"):
        load_packed(newer)


def test_dense_folder_is_not_packed(folders: tuple[Path, Path]) -> None:
    with pytest.raises(SparseGPTError, match="not packed here"):
        load_packed(folders[0])
    with pytest.raises(SparseGPTError, match=r"config\.json"):
        load_packed(folders[0] / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_a_damaged_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SparseGPTError, match=r"config\.json.* (cannot be read as JSON|expected a JSON object)"):
        load_packed(tmp_path)


ALONE = """
import sys, transformers
for name in ("AutoModelForCausalLM", "LlamaForCausalLM", "AutoModel"):
    try:
        getattr(transformers, name).from_pretrained(sys.argv[1])
        print(name, "loaded")
    except RuntimeError:
        print(name, "refused")
try:
    print(transformers.pipeline("text-generation", sys.argv[1]))
except Exception as error:  # the pipeline's own, after it has tried several classes
    print("pipeline refused", "mismatched" in str(error))
"""


def test_without_sparsegpt_loading_is_an_error(folders: tuple[Path, Path], tmp_path: Path, forked: Forked) -> None:
    """In a process that has not imported it: transformers knows no such quantizer, and goes on without one.

    Not in this repository's folder, where transformers takes `kernels` for the package of that name.
    """
    found = forked.run("-c", ALONE, folders[1], cwd=tmp_path)
    expected = [
        "AutoModelForCausalLM refused",
        "LlamaForCausalLM refused",
        "AutoModel refused",
        "pipeline refused True",
    ]
    assert found.stdout.splitlines() == expected, found.stderr


def test_a_folder_of_the_first_version_still_loads(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """It had no placeholders."""
    old = copy_of(folders[1], tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    (old / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor for name, tensor in load_file(old / WEIGHTS).items() if tensor.dtype != torch.uint8}
    assert len(tensors) == len(load_file(old / WEIGHTS)) - 14
    with ShardedWriter(old, header_room(tensors)) as writer:
        writer.add(*tensors.items())
    assert torch.equal(*(logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (old, folders[1])))
    unpack_folder(old, tmp_path / "unpacked")
    unpacked, original = load_file(tmp_path / "unpacked" / WEIGHTS), load_file(folders[0] / WEIGHTS)
    assert unpacked.keys() == original.keys()
    assert all(torch.equal(unpacked[name], tensor) for name, tensor in original.items())


def test_metadata_of_one_position_twice_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    odd, name = copy_of(folders[1], tmp_path / "odd"), "model.layers.0.mlp.up_proj"
    tensors = load_file(odd / WEIGHTS)
    tensors[f"{name}.meta"][3, 0] = 0x44544444
    with ShardedWriter(odd, header_room(tensors)) as writer:
        writer.add(*tensors.items())
    with pytest.raises(SparseGPTError, match=rf"{name}: metadata of row 3, group 5 keeps positions 1 and 1"):
        AutoModelForCausalLM.from_pretrained(odd)


@pytest.mark.parametrize("settings", [{"modules": 5}, {"modules": {"a": 5}}, {"modules": [["a", 1]]}, {"pattern": {}}])
def test_settings_of_another_form_are_refused(
    settings: dict[str, object], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    odd = copy_of(folders[1], tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    config["quantization_config"] |= settings
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparseGPTError, match="packed model"):
        AutoModelForCausalLM.from_pretrained(odd)


def test_names_alike_but_for_their_numbers_have_one_pattern() -> None:
    names = [f"model.layers.{layer}.mlp.{expert}.up.weight" for layer in range(12) for expert in range(64)]
    (pattern,) = name_patterns(names)
    assert all(re.search(f"({pattern})", name) for name in names)
    others = ("model.layers.12.mlp.0.up.weight", "model.layers.0.mlp.64.up.weight", "xmodel.layers.0.mlp.0.up.weight")
    assert not any(re.search(f"({pattern})", name) for name in (*others, names[0] + "s", names[0].replace(".", "x")))
    assert len(name_patterns([*names, "a.b"])) == 2


@pytest.mark.parametrize("first", ["transformers.quantizers", "sparsegpt.kernels.hf.quantizer"])
def test_registering_waits_for_transformers(first: str, folders: tuple[Path, Path], forked_light: Forked) -> None:
    """Before transformers is imported nothing of it is loaded; an import afterwards finds the quantizer registered."""
    code = f"""
import sys
from sparsegpt.kernels.hf.registration import register_with_transformers
register_with_transformers()
register_with_transformers()
assert "transformers" not in sys.modules
import {first}
from transformers.quantizers import auto
assert "sparsegpt" in auto.AUTO_QUANTIZER_MAPPING and auto.__spec__.loader is auto.__loader__
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(folders[1])!r}).model.layers[0].mlp.up_proj).__name__)
"""
    assert forked_light.python("-c", code).strip() == "Sparse24Linear"
