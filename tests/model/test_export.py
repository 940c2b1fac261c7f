"""A model written block by block reloads as it was."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from sparsegpt.files import tensor_files
from sparsegpt.files.tensor_files import verify_checksums
from sparsegpt.model.export import write_model
from sparsegpt.model.loading import load_model
from tests.support import logits_of, random_windows, save_tokenizer, tiny_model


def stored(folder, dtype, model_type="llama", **overrides):
    tiny_model(model_type, **overrides).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def written(loaded, folder):
    folder.mkdir()
    write_model(loaded, folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "tied"), [("llama", False), ("llama", True), ("opt", True), ("qwen3", True), ("mistral", False)]
)
def test_a_streamed_model_reloads_as_it_was(tmp_path, dtype, model_type, tied):
    name = stored(tmp_path / "model", dtype, model_type, tie_word_embeddings=tied)
    loaded = load_model(name, device="cpu", stream_through=tmp_path)
    logits_of(loaded.model, random_windows(1))  # whether it has worked already must not matter
    out = written(loaded, tmp_path / "out")
    before, after = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (tmp_path / "model", out))
    assert before.keys() == after.keys()  # the tied head among neither
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert verify_checksums(out / "model.safetensors") == after.keys()
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert config["architectures"] == [type(loaded.model).__name__]
    again = load_model(str(out), device="cpu")
    assert torch.equal(logits_of(again.model, random_windows()), logits_of(loaded.model, random_windows()))
    assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()


def test_settled_weights_are_written(tmp_path):
    loaded = load_model(stored(tmp_path / "model", torch.float16), device="cpu", stream_through=tmp_path)
    weight = loaded.model.model.layers[1].mlp.up_proj.weight
    loaded.residence.settle(weight, torch.zeros_like(weight))
    out = written(loaded, tmp_path / "out")
    before, after = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (tmp_path / "model", out))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.1.mlp.up_proj.weight"]
    assert not after[changed[0]].any()


def test_buffers_are_written_as_they_are(tmp_path):
    """A table that a block keeps in float32 stays in float32 in a file of halves."""
    loaded = load_model(stored(tmp_path / "model", torch.float16), device="cpu", stream_through=tmp_path)
    table = torch.rand(3)
    loaded.model.model.layers[1].register_buffer("table", table)
    loaded.model.model.layers[0].register_buffer("hidden", table, persistent=False)
    tensors = safetensors.torch.load_file(written(loaded, tmp_path / "out") / "model.safetensors")
    assert torch.equal(tensors["model.layers.1.table"], table)
    assert "model.layers.0.hidden" not in tensors


def test_a_parameter_that_stays_in_float32_is_written_in_float32(tmp_path):
    loaded = load_model(stored(tmp_path / "model", torch.float16), device="cpu", stream_through=tmp_path)
    norm = loaded.model.model.layers[0].input_layernorm
    norm.weight = nn.Parameter(norm.weight.detach().float() + 1e-6)
    tensors = safetensors.torch.load_file(written(loaded, tmp_path / "out") / "model.safetensors")
    assert torch.equal(tensors["model.layers.0.input_layernorm.weight"], norm.weight)


def test_several_shards_reload_as_one_file_does(tmp_path, monkeypatch):
    loaded = load_model(stored(tmp_path / "model", torch.float32), device="cpu", stream_through=tmp_path)
    real = tensor_files.ShardedWriter.__init__
    monkeypatch.setattr(
        tensor_files.ShardedWriter,
        "__init__",
        lambda self, folder, room: real(self, folder, room, shard_bytes=20_000),
    )
    out = written(loaded, tmp_path / "out")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert not (out / "model.safetensors").exists()
    again = load_model(str(out), device="cpu", stream_through=tmp_path)
    assert torch.equal(logits_of(again.model, random_windows()), logits_of(loaded.model, random_windows()))
