"""A model written block by block reloads as it was."""

import json
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sparsegpt.files import tensor_files
from sparsegpt.files.tensor_files import verify_checksums
from sparsegpt.model.export import check_names, write_model
from sparsegpt.model.head import lm_head_of
from sparsegpt.model.loading import load_model
from tests.architectures import VARIANTS, WRAPPERS, tiny_variant, tiny_wrapper
from tests.support import logits_of, random_windows, refused, save_tokenizer, tiny_model


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


def rewritten(folder, change):
    """The folder's one weight file with other content; returns that."""
    path = folder / "model.safetensors"
    content = change(safetensors.torch.load_file(path))
    safetensors.torch.save_file(content, path, metadata={"format": "pt"})
    return content


def mixed(content):
    """Every tensor in one of three dtypes, by its name."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return {
        name: tensor.to(dtypes[zlib.crc32(name.encode()) % 3]) if tensor.is_floating_point() else tensor
        for name, tensor in content.items()
    }


def assert_same(written, expected):
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize("variant", [*VARIANTS, *WRAPPERS])
def test_every_tensor_comes_back_under_its_name_and_in_its_dtype(tmp_path, variant):
    """Of files that mix dtypes, inside of experts too; what computes has the digits of each."""
    folder = tmp_path / "model"
    (tiny_wrapper(variant) if variant in WRAPPERS else tiny_variant(variant)).save_pretrained(folder)
    save_tokenizer(folder)
    expected = rewritten(folder, mixed)
    loaded = load_model(str(folder), device="cpu", stream_through=tmp_path)
    whole = load_model(str(folder), device="cpu")
    assert torch.equal(logits_of(loaded.model, random_windows(2)), logits_of(whole.model, random_windows(2)))
    check_names(loaded)
    assert_same(safetensors.torch.load_file(written(loaded, tmp_path / "out") / "model.safetensors"), expected)
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("said", ["float32", "float16", "bfloat16", None])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_files_tell_the_dtype_whatever_the_config_says(tmp_path, key, said):
    folder = Path(stored(tmp_path / "model", torch.bfloat16))
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    config |= {key: said, "rope_theta": 500000.0, "name": "ümläut"} if said else {}
    (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False))
    loaded = load_model(str(folder), device="cpu", stream_through=tmp_path)
    assert loaded.stored_dtype == torch.bfloat16
    out = written(loaded, tmp_path / "out")
    assert {tensor.dtype for tensor in safetensors.torch.load_file(out / "model.safetensors").values()} == {
        torch.bfloat16
    }
    expected = json.dumps({**config, key: "bfloat16"} if said else config, indent=1, ensure_ascii=False)
    assert (out / "config.json").read_text() == expected


def test_a_dtype_that_some_tensors_have_may_stand_in_the_config(tmp_path):
    """Who loads float32 norms beside halves in float32 loses nothing; the config keeps to it."""
    folder = Path(stored(tmp_path / "model", torch.float32))
    rewritten(folder, lambda content: {k: t if t.ndim == 1 else t.bfloat16() for k, t in content.items()})
    loaded = load_model(str(folder), device="cpu", stream_through=tmp_path)
    out = written(loaded, tmp_path / "out")
    assert loaded.stored_dtype == torch.bfloat16
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_another_dtype_is_written_where_it_is_asked_for(tmp_path):
    folder = Path(stored(tmp_path / "model", torch.float32))
    content = rewritten(folder, lambda content: {**mixed(content), "model.position": torch.arange(3)})
    loaded = load_model(str(folder), dtype="float16", device="cpu", stream_through=tmp_path)
    out = written(loaded, tmp_path / "out")
    kinds = {name: tensor.dtype for name, tensor in safetensors.torch.load_file(out / "model.safetensors").items()}
    assert kinds.pop("model.position") == torch.int64
    assert kinds.keys() == content.keys() - {"model.position"}
    assert set(kinds.values()) == {torch.float16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("prefixed", ["llama", "gpt2", "opt", "mixtral"])
def test_names_without_the_prefix_of_the_body_come_back_without_it(tmp_path, prefixed):
    """As in GPT-2's own files."""
    folder = tmp_path / "model"
    model = tiny_variant(prefixed)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    prefix = f"{model.base_model_prefix}."
    expected = rewritten(folder, lambda content: {name.removeprefix(prefix): t for name, t in content.items()})
    loaded = load_model(str(folder), device="cpu", stream_through=tmp_path)
    check_names(loaded)
    assert_same(safetensors.torch.load_file(written(loaded, tmp_path / "out") / "model.safetensors"), expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_files_come_back_as_safetensors_with_all_their_names(tmp_path, zipped):
    """A pickle holds the tied head too."""
    folder = Path(stored(tmp_path / "model", torch.float16, tie_word_embeddings=True))
    content = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    expected = {**content, "lm_head.weight": content["model.embed_tokens.weight"], "more": torch.arange(4)}
    torch.save(expected, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    loaded = load_model(str(folder), device="cpu", stream_through=tmp_path)
    assert loaded.stored_dtype == torch.float16
    out = written(loaded, tmp_path / "out")
    assert not (out / "pytorch_model.bin").exists()
    assert_same(safetensors.torch.load_file(out / "model.safetensors"), expected)


def test_sharded_files_come_back_whole(tmp_path):
    folder = tmp_path / "model"
    tiny_variant("qwen3_moe").to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    save_tokenizer(folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    expected = {name: tensor for path in shards for name, tensor in safetensors.torch.load_file(path).items()}
    loaded = load_model(str(folder), device="cpu", stream_through=tmp_path)
    out = written(loaded, tmp_path / "out")
    assert len(shards) > 2
    assert_same(safetensors.torch.load_file(out / "model.safetensors"), expected)
    assert not list(out.glob("*.index.json"))


SURPLUS = {
    "model.layers.0.self_attn.q_proj.bias": torch.randn(32),
    "model.mtp.0.proj.weight": torch.randn(8, 4).bfloat16(),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
    "counter": torch.tensor(7),
    "nothing": torch.empty(0, 3),
    "codes": torch.tensor([1, 65535], dtype=torch.uint16),
    "phases": torch.randn(3, dtype=torch.complex64),
}


def test_tensors_without_a_place_are_carried_over_and_named(tmp_path):
    folder = Path(stored(tmp_path / "model", torch.float16))
    expected = rewritten(folder, lambda content: {**content, **SURPLUS})
    loaded = load_model(str(folder), device="cpu", stream_through=tmp_path)
    assert_same(safetensors.torch.load_file(written(loaded, tmp_path / "out") / "model.safetensors"), expected)
    assert len(loaded.notes) == 1
    told = loaded.notes[0]
    assert "6 tensors without a place in LlamaForCausalLM" in told
    assert "codes" in told
    assert "inv_freq" not in told  # every loader computes that itself


def test_a_tensor_of_a_type_that_nobody_can_write_is_refused(tmp_path):
    folder = Path(stored(tmp_path / "model", torch.float16))
    header, body = {}, b""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header["odd"] = {"dtype": "F4", "shape": [2], "data_offsets": [len(body), len(body) + 1]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body + b"\0")
    with refused(str(path), "odd", "F4"):
        load_model(str(folder), device="cpu", stream_through=tmp_path)


def test_buffers_come_from_the_files(tmp_path):
    """GLM's expert biases are no parameters; they are float32 beside halves."""
    folder = tmp_path / "model"
    tiny_variant("deepseek_v3").to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    expected = rewritten(folder, lambda content: {**content, name: torch.rand(4)})
    loaded = load_model(str(folder), device="cpu", stream_through=tmp_path)
    assert torch.equal(loaded.model.get_buffer(name), expected[name])
    assert_same(safetensors.torch.load_file(written(loaded, tmp_path / "out") / "model.safetensors"), expected)


@pytest.mark.parametrize("told", [True, False])
def test_a_head_that_has_parted_from_the_embedding_is_written_and_the_config_says_so(tmp_path, told):
    folder = Path(stored(tmp_path / "model", torch.bfloat16, "gpt2", n_inner=64, num_key_value_heads=None))
    config = json.loads((folder / "config.json").read_text())
    config = {**config, "tie_word_embeddings": True} if told else config
    if not told:
        del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(folder), device="cpu", stream_through=tmp_path)
    head = lm_head_of(loaded.decoder)
    with torch.no_grad():
        head.weight.mul_(2)
    out = written(loaded, tmp_path / "out")
    before, after = (safetensors.torch.load_file(path / "model.safetensors") for path in (folder, out))
    assert_same({name: after[name] for name in before}, before)
    assert after.keys() - before.keys() == {"lm_head.weight"}
    assert after["lm_head.weight"].dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text()) == {**config, "tie_word_embeddings": False}
    again = load_model(str(out), device="cpu")
    assert torch.equal(logits_of(again.model, random_windows()), logits_of(loaded.model, random_windows()))


def test_a_name_for_the_weights_in_the_config_is_gone_with_that_file(tmp_path):
    folder = Path(stored(tmp_path / "model", torch.float32))
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "mine.safetensors"}))
    loaded = load_model(str(folder), device="cpu", stream_through=tmp_path)
    out = written(loaded, tmp_path / "out")
    assert json.loads((out / "config.json").read_text()) == config
    before = safetensors.torch.load_file(folder / "mine.safetensors")
    assert_same(safetensors.torch.load_file(out / "model.safetensors"), before)


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
