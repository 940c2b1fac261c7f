"""Where models come from: local folders and the Hub's cache, and what their files say."""

import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from sparsegpt.model.loading import load_model, stored_in_files
from sparsegpt.model.source import Source, cached, fetched, hub_id
from tests.support import CHILD_ENVIRONMENT, logits_of, random_windows, refused, save_model, tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_cache(model, cache, name="org/tiny"):
    """A model folder as the Hub's client leaves it: blobs, links to them, and the name of the newest state."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copyfile(path, home / "blobs" / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
    return snapshot


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hub_model_is_its_folder_in_the_cache(tmp_path, hub):
    model = save_model(tmp_path / "model")
    (model / "LICENSE").write_text("free")
    tiny_model("llama").bfloat16().save_pretrained(model)
    snapshot = in_cache(model, hub)
    assert fetched("org/tiny", None) == cached("org/tiny", None) == snapshot
    assert cached("org/other", None) is None
    loaded = load_model("org/tiny", device="cpu", stream_through=tmp_path)
    assert loaded.source.name == hub_id(snapshot) == "org/tiny"
    assert loaded.stored_dtype == stored_in_files("org/tiny") == torch.bfloat16
    assert {path.name for path in loaded.source.beside.files} == {
        path.name for path in model.iterdir() if path.name != "model.safetensors"
    }
    local = load_model(str(model), device="cpu")
    assert torch.equal(logits_of(loaded.model, random_windows()), logits_of(local.model, random_windows()))


def test_a_cache_without_the_card_is_told_of(tmp_path, hub):
    """Loaders leave it behind, and whatever else they do not read."""
    model = save_model(tmp_path / "model")
    in_cache(model, hub)
    [note] = load_model("org/tiny", device="cpu", stream_through=tmp_path).notes
    assert "README.md of org/tiny" in note
    (model / "README.md").write_text("# Tiny")
    in_cache(model, hub, "org/whole")
    assert load_model("org/whole", device="cpu", stream_through=tmp_path).notes == ()


def test_shards_and_pickles_are_found_in_the_cache(tmp_path, hub):
    model = save_model(tmp_path / "model")
    content = safetensors.torch.load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(content, model / "pytorch_model.bin")
    in_cache(model, hub)
    assert load_model("org/tiny", device="cpu").source.tensors.keys() == content.keys()
    (model / "pytorch_model.bin").unlink()
    tiny_model("llama").save_pretrained(model, max_shard_size="20KB")
    in_cache(model, hub, "org/sharded")
    assert load_model("org/sharded", device="cpu").source.tensors.keys() == content.keys()


def test_a_model_that_is_only_partly_in_the_cache_is_refused(tmp_path, hub):
    model = save_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    in_cache(model, hub)
    assert stored_in_files("org/tiny") is None
    with refused("'org/tiny'", "weights"):
        load_model("org/tiny", device="cpu")


def test_the_files_tell_the_dtype_of_the_blocks(tmp_path):
    """An embedding may be larger than all of them, and of another dtype."""
    model = save_model(tmp_path / "model", vocab_size=4096)
    path = model / "model.safetensors"
    content = safetensors.torch.load_file(path)
    content = {name: tensor.half() if ".layers." in name else tensor for name, tensor in content.items()}
    safetensors.torch.save_file(content, path, metadata={"format": "pt"})
    assert Source.of(model).dtype == stored_in_files(str(model)) == torch.float16
    assert load_model(str(model), device="cpu").stored_dtype == torch.float16


def test_weights_that_stay_behind_are_told(tmp_path):
    model = save_model(tmp_path / "model")
    (model / "consolidated.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (model / "pytorch_model.bin").write_bytes(b"")  # the same weights in another form: no word
    (model / "away").symlink_to(tmp_path)
    notes = load_model(str(model), device="cpu", stream_through=tmp_path).notes
    assert len(notes) == 2
    assert notes[0].endswith("consolidated.safetensors")
    assert notes[1].endswith("away")


def test_code_of_the_models_own_needs_trust(tmp_path):
    model = save_model(tmp_path / "model")
    (model / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}'
    )
    with refused(str(model), "code of its own", settings=["trust_remote_code"]):
        load_model(str(model), device="cpu")


def test_an_offline_process_takes_what_is_in_the_cache(tmp_path):
    """Through the command line and the environment, as a user does."""
    in_cache(save_model(tmp_path / "model"), tmp_path / "cache")
    code = "import sys; from sparsegpt.model.loading import load_model; print(load_model('org/tiny').source.folder)"
    environment = {**CHILD_ENVIRONMENT, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip().endswith(os.path.join("snapshots", COMMIT))  # noqa: PTH118
