"""What is no model folder is called what it is, with what to do; a model folder is left alone."""

import json
import os
import shutil

import pytest

from sparsegpt.incoming.kinds import describe
from sparsegpt.incoming.model_folder import check_folder
from tests.support import refused

# What lies in a folder, and what must be said of it.
KINDS = {
    "gguf": (["model-Q4_K_M.gguf"], ("GGUF", "model-Q4_K_M.gguf", "made from")),
    "gguf and a config": (["config.json", "a.gguf"], ("GGUF",)),
    "of Meta": (["consolidated.00.pth", "params.json", "tokenizer.model"], ("authors", "-hf")),
    "of Mistral": (["consolidated.safetensors", "params.json", "tekken.json"], ("authors",)),
    "onnx": (["config.json", "model.onnx", "tokenizer.json"], ("runtime", "model.onnx")),
    "a folder of onnx": (["config.json", "onnx/model.onnx"], ("runtime",)),
    "TensorFlow": (["config.json", "tf_model.h5"], ("TensorFlow", "from_tf")),
    "a saved model": (["saved_model.pb", "variables/x"], ("TensorFlow",)),
    "Flax": (["config.json", "flax_model.msgpack"], ("Flax", "from_flax")),
    "a pipeline": (["model_index.json", "unet/config.json", "unet/model.safetensors"], ("diffusers", "language model")),
    "vectors": (["config_sentence_transformers.json", "config.json", "model.safetensors"], ("sentence-transformers",)),
    "a tokenizer": (["tokenizer.json", "tokenizer_config.json"], ("tokenizer alone", "weights")),
    "words": (["vocab.json", "merges.txt"], ("tokenizer alone",)),
    "pickled": (["model.pth"], ("pickled", "save_pretrained")),
    "a checkpoint": (["config.yaml", "last.ckpt"], ("pickled", "last.ckpt")),
    "DeepSpeed": (["config.json", "global_step9/mp_rank_00_model_states.pt", "zero_to_fp32.py"], ("zero_to_fp32.py",)),
    "FSDP": (["config.json", "pytorch_model_fsdp_0/__0_0.distcp"], ("FSDP", "merge-weights")),
    "unfinished": (["config.json", "model.safetensors.incomplete"], ("unfinished download",)),
    "texts": (["a.txt", "b.jsonl"], ("texts alone", "calibration")),
    "a data set": (["dataset_info.json", "data-00000-of-00001.arrow"], ("data set",)),
    "nothing": ([], ("is empty", "config.json")),
}


def folder_of(path, names):
    """A folder with files of these names, which are empty but for JSON."""
    path.mkdir(parents=True)
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}" if name.endswith(".json") else "x")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_another_kind_is_called_what_it_is(tmp_path, kind):
    names, fragments = KINDS[kind]
    folder = folder_of(tmp_path / "mine", names)
    with refused(f"model folder {folder} ", *fragments):
        check_folder(folder)


@pytest.mark.parametrize(
    "names", [["notes.md"], ["config.json"], ["config.json", "training_args.bin"], ["model.safetensors"]]
)
def test_a_folder_that_lacks_something_is_no_other_kind(tmp_path, names):
    folder = folder_of(tmp_path / "mine", names)
    assert describe(folder) is None
    with refused("expected", "fetch or save it whole"):
        check_folder(folder)


def test_a_model_folder_is_left_alone(llama_folder, tmp_path):
    """Whatever may lie beside its weights."""
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    for name in ("training_args.bin", "optimizer.pt", "a.gguf", "tf_model.h5", "onnx/x", "checkpoint-5/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert describe(folder) is None
    check_folder(folder)


def test_an_embedding_model_that_is_a_causal_one_is_left_alone(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    (folder / "config_sentence_transformers.json").write_text("{}")
    check_folder(folder)


# Adapters


def adapter(path, **settings):
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(settings))
    (path / "adapter_model.safetensors").write_text("x")
    return path


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        (
            {"peft_type": "LORA", "base_model_name_or_path": "org/base"},
            ("LoRA adapter of org/base", "merge_and_unload"),
        ),
        ({"peft_type": "LORA"}, ("LoRA adapter", "merge_and_unload")),
        ({"peft_type": "IA3", "base_model_name_or_path": 3}, ("adapter (IA3)", "merge_and_unload")),
        ({"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "b"}, ("adapter of b", "nothing to merge")),
    ],
)
def test_an_adapter_is_to_be_merged_into_its_base(tmp_path, settings, fragments):
    with refused(*fragments):
        check_folder(adapter(tmp_path / "mine", **settings))


def test_a_damaged_adapter_is_still_one(tmp_path):
    folder = adapter(tmp_path / "mine")
    (folder / "adapter_config.json").write_text("[1")
    with refused("adapter", "merge"):
        check_folder(folder)


def test_an_adapter_beside_a_model_is_refused(llama_folder, tmp_path):
    """Whether it counts depends on what is installed."""
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    adapter(folder, peft_type="LORA")
    with refused("beside its own weights", "adapter_config.json"):
        check_folder(folder)


# Folders around models


def test_of_a_trainers_folder_the_newest_checkpoint_is_named(tmp_path):
    """By number, not by name."""
    for number in (9, 100, 20):
        folder_of(tmp_path / f"run/checkpoint-{number}", ["config.json", "model.safetensors"])
    folder_of(tmp_path / "run/runs", ["events"])
    (tmp_path / "run/tokenizer.json").write_text("{}")
    with refused("trainer", f"newest is {tmp_path}/run/checkpoint-100"):
        check_folder(tmp_path / "run")


def test_models_inside_a_folder_are_named(tmp_path):
    folder_of(tmp_path / "all/one", ["config.json", "pytorch_model.bin"])
    adapter(tmp_path / "all/two")
    folder_of(tmp_path / "all/three", ["notes"])
    with refused("holds some", f"{tmp_path}/all/one, {tmp_path}/all/two"):
        check_folder(tmp_path / "all")


def test_of_the_hubs_cache_the_snapshot_is_named(tmp_path):
    repository = tmp_path / "hub" / "models--org--some--name"
    for commit in ("aaa", "bbb"):
        folder_of(repository / "snapshots" / commit, ["config.json"])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("aaa")
    os.utime(repository / "snapshots" / "aaa", (1, 1))  # the older one is main
    for folder in (repository, repository / "snapshots"):
        with refused("Hub's cache", "org/some--name", str(repository / "snapshots" / "aaa")):
            check_folder(folder)
    with refused("Hub's cache", "org/some--name"):
        check_folder(tmp_path / "hub")
    shutil.rmtree(repository / "snapshots")
    (repository / "blobs").mkdir()
    with refused("no snapshot", "org/some--name"):
        check_folder(repository)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_in_place_of_a_file_is_named(llama_folder, tmp_path, name):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with refused("Git LFS", name, "git lfs pull"):
        check_folder(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_folder_that_may_not_be_listed_is_named(tmp_path):
    folder = folder_of(tmp_path / "mine", ["config.json"])
    folder.chmod(0)
    with refused(str(folder), "cannot be read"):
        check_folder(folder)


# Files


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("a.gguf", b"GGUF", "GGUF"),
        ("weights", b"GGUF\3\0\0\0", "GGUF"),
        ("model.zip", b"PK", "unpack it"),
        ("model.tar.gz", b"x", "unpack it"),
        ("model.safetensors", b"x", "give its folder, "),
        ("config.json", b"{}", "give its folder, "),
        ("a.txt", b"x", "calibration"),
        ("a.ckpt", b"x", "save_pretrained"),
        ("weights.h5", b"x", "TensorFlow"),
        ("readme", b"", "expected a model folder"),
    ],
)
def test_a_file_is_called_what_it_is(tmp_path, name, content, fragment):
    path = tmp_path / name
    path.write_bytes(content)
    assert fragment in (describe(path) or "")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "expected a model folder" in (describe(tmp_path / "pipe") or "")
