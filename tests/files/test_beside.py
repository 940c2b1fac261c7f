"""What comes along when a model folder is written with other weights."""

import os
from pathlib import PurePath

import pytest

from sparsegpt.files.beside import Beside, is_weights, some
from tests.support import refused

KEPT = (
    "README.md",
    "LICENSE",
    ".gitattributes",
    "config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "modeling_mine.py",
    "code/inner/helper.py",
    "assets/picture.png",
    "notes/report.json",
    "additional_chat_templates/tool.jinja",
    "speech/adapter_config.json",
    "speech/adapter_model.safetensors",
)
WEIGHTS = (
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "model.safetensors.index.fp16.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "optimizer.pt",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "model.Q4_K_M.gguf",
    "checkpoint-7/model.safetensors",
)
NEVER = (
    ".git/config",
    ".cache/huggingface/download/README.md.metadata",
    "code/__pycache__/helper.cpython-311.pyc",
    "report.json",
    ".sparsegpt.json",
    ".out.unfinished/state.json",
    ".out.123.writing/config.json",
)


def filled(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() + b"\0\xff\r\n")
    return folder


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def paths(names):
    return sorted(map(PurePath, names))


def test_everything_but_weights_and_caches_comes_along_to_the_byte(tmp_path):
    source = filled(tmp_path / "source", [*KEPT, *WEIGHTS, *NEVER])
    beside = Beside.of(source)
    assert sorted(beside.files) == paths(KEPT)
    assert sorted(beside.weights) == paths(WEIGHTS)
    assert beside.outside == ()
    beside.copy_to(tmp_path / "target", but=frozenset({"config.json"}))
    assert content(tmp_path / "target") == {name: content(source)[name] for name in KEPT if name != "config.json"}


@pytest.mark.parametrize("name", ["bin", "safetensors", "bin.txt", "binary", "model.index.json", "weights.json"])
def test_other_names_are_no_weights(name):
    assert not is_weights(name)


def test_links_that_leave_the_folder_are_not_followed(tmp_path):
    outside = filled(tmp_path / "outside", ["secret.txt", "more/secret.txt"])
    source = filled(tmp_path / "source", ["config.json", "code/a.py"])
    (source / "to_file").symlink_to(outside / "secret.txt")
    (source / "to_folder").symlink_to(outside / "more")
    (source / "code" / "up").symlink_to("../../outside/secret.txt")
    (source / "broken").symlink_to("nowhere")
    (source / "round").symlink_to("round")
    (source / "loop").symlink_to(".")
    (source / "within").symlink_to("code/a.py")
    os.mkfifo(source / "pipe")
    beside = Beside.of(source)
    assert sorted(beside.outside) == paths(["broken", "code/up", "loop", "pipe", "round", "to_file", "to_folder"])
    beside.copy_to(tmp_path / "target")
    copied = content(tmp_path / "target")
    assert copied.keys() == {"config.json", "code/a.py", "within"}
    assert copied["within"] == copied["code/a.py"]
    assert not any(path.is_symlink() for path in (tmp_path / "target").rglob("*"))


def test_in_the_hubs_cache_links_lead_to_the_blobs_and_nowhere_else(tmp_path):
    home = tmp_path / "models--org--name"
    filled(home, ["blobs/a", "refs/main", "other"])
    snapshot = home / "snapshots" / "0123"
    (snapshot / "inner").mkdir(parents=True)
    (snapshot / "README.md").symlink_to("../../blobs/a")
    (snapshot / "inner" / "a.py").symlink_to("../../../blobs/a")
    (snapshot / "stray").symlink_to("../../other")
    beside = Beside.of(snapshot)
    assert sorted(beside.files) == paths(["README.md", "inner/a.py"])
    assert beside.outside == (PurePath("stray"),)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path):
    with refused(str(tmp_path / "missing"), "cannot be read"):
        Beside.of(tmp_path / "missing")


def test_many_names_are_not_all_told():
    assert some(("a", "b", "c")) == "a, b, c"
    assert some(("a", "b", "c", "d", "e")) == "a, b, c and 2 more"
