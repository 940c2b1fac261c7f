"""Loading: a model that is not whole, or not what was asked for, is refused in one line that says why."""

import shutil

import pytest
import torch

from sparsegpt.model.export import write_model
from sparsegpt.model.loading import load_model
from sparsegpt.settings.machine import pick_device
from sparsegpt.settings.naming import SHORT_NAMES
from tests.support import BROKEN_FOLDERS, broken_folder, logits_of, random_windows, refused, save_model, tiny_model


@pytest.mark.parametrize("how", BROKEN_FOLDERS)
def test_a_folder_that_is_not_whole_is_refused(llama_folder, tmp_path, how):
    folder, fragments = broken_folder(llama_folder, tmp_path / "broken", how)
    with refused(*fragments):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "~/missing", "a/b/c", "../x/y"])
def test_a_folder_that_does_not_exist_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused(name, "does not exist"):
        load_model(name)


def test_a_file_in_place_of_a_folder_is_refused(text_file):
    with refused(str(text_file), "is a file"):
        load_model(str(text_file))


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "opt-1.3b"])
def test_a_hub_name_without_network_is_refused_with_the_way_out(name):
    with refused(f"{name!r}", "nobody answers", "or demo", settings=["model"]):
        load_model(name)


def test_a_missing_shard_is_refused(tmp_path):
    folder = save_model(tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    load_model(str(folder))
    shards[1].unlink()
    with refused(str(folder)):
        load_model(str(folder))


def test_damaged_pickled_weights_are_refused(llama_folder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(llama_folder, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    with refused(str(folder)):
        load_model(str(folder))


@pytest.mark.parametrize("dtype", ["float8", "", "int8", "fp8", "torch.int8"])
def test_an_unknown_dtype_is_refused_with_the_known_ones(llama_folder, dtype):
    with refused(f"{dtype!r}", "float32", "bfloat16"):
        load_model(str(llama_folder), dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "cpu:cpu", "cuda:-1"])
def test_an_unknown_device_is_refused_with_the_known_ones(device):
    with refused(f"{device!r}"):
        pick_device(device)


@pytest.mark.parametrize("device", ["meta", "xla", "mps"])
def test_a_device_that_cannot_compute_here_is_refused(llama_folder, device):
    with refused(f"{device!r}"):
        load_model(str(llama_folder), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused_with_the_way_out():
    with refused("'cuda:0'", "use cpu", settings=["device"]):
        pick_device("cuda:0")
    assert pick_device("auto") == torch.device("cpu")


def test_a_whole_folder_loads_in_float32_on_a_cpu(llama_folder):
    loaded = load_model(str(llama_folder), device="cpu")
    assert loaded.model.dtype == torch.float32
    assert loaded.stored_dtype == torch.float32
    assert not loaded.model.training
    assert loaded.sequence_length(None) == 64
    assert torch.equal(logits_of(loaded.model, random_windows()), logits_of(tiny_model("llama"), random_windows()))


def test_a_limit_beyond_2048_is_not_the_default_sequence_length(tmp_path):
    folder = save_model(tmp_path / "long", max_position_embeddings=131072)
    assert load_model(str(folder)).sequence_length(None) == 2048


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_saved_model_keeps_the_dtype_of_its_file_and_the_score_of_the_rounded_one(tmp_path, stored):
    folder = save_model(tmp_path / "half")
    tiny_model("llama").to(stored).save_pretrained(folder)
    loaded = load_model(str(folder), device="cpu")
    assert loaded.model.dtype == torch.float32
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(1.001)
    (tmp_path / "out").mkdir()
    write_model(loaded, tmp_path / "out")
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.copy_(parameter.to(stored))
    again = load_model(str(tmp_path / "out"), device="cpu")
    assert again.stored_dtype == stored
    assert torch.equal(logits_of(again.model, random_windows()), logits_of(loaded.model, random_windows()))


def test_an_explicit_dtype_decides_both_arithmetic_and_file(llama_folder):
    loaded = load_model(str(llama_folder), dtype="bfloat16", device="cpu")
    assert loaded.model.dtype == loaded.stored_dtype == torch.bfloat16


def test_the_demo_loads_by_its_name():
    loaded = load_model("demo", device="cpu")
    assert loaded.model.config.model_type == "opt"
    assert loaded.stored_dtype == torch.float16


def test_short_names_are_hub_ids():
    assert SHORT_NAMES["opt-1.3b"] == "facebook/opt-1.3b"
    assert SHORT_NAMES["llama-2-7b"] == "meta-llama/Llama-2-7b-hf"
    assert all(identifier.count("/") == 1 for identifier in SHORT_NAMES.values())
