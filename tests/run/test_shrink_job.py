"""The job of `shrink`: the folder that it writes is the source's own but for what changed, and says what was done."""

import json

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsegpt.files.checked_json import read_checked
from sparsegpt.kernels.checkpoint.archive import pack_folder
from sparsegpt.run.options import RunOptions
from sparsegpt.run.shrink_job import shrink
from sparsegpt.run.shrink_options import default_smaller_folder
from sparsegpt.shrinking.settings import ShrinkSettings
from tests.support import prune_model, random_windows, refused, save_model, tiny_model, write_text

QUICK = ShrinkSettings(heads="50%", channels="75%")


def options(folder, tmp_path, **changes):
    text = str(write_text(tmp_path / "text.txt"))
    given = {"samples": 4, "sequence_length": 16, "eval_windows": 4, "out": tmp_path / "smaller", **changes}
    return RunOptions(model=str(folder), calibration=text, evaluate=(text,), **given)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("source") / "llama", num_hidden_layers=3)
    (folder / "LICENSE").write_text("all of it\n")
    return folder


def test_the_folder_is_ordinary_and_says_what_was_done(source, tmp_path):
    asked = options(source, tmp_path)
    report = shrink(asked, ShrinkSettings(heads="50%", channels="75%", blocks="2"))
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (asked.out, source))
    sizes = {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    assert {**before, **sizes, "num_hidden_layers": 2}.items() <= {**config}.items()
    assert config.keys() - before.keys() <= {"head_dim"}
    for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json"):
        assert (asked.out / name).read_bytes() == (source / name).read_bytes()
    model, info = AutoModelForCausalLM.from_pretrained(asked.out, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert report["parameters"]["shrunk"] == sum(parameter.numel() for parameter in model.parameters())
    assert len(model.model.layers) == 2 == len(report["kept_blocks"])
    assert AutoTokenizer.from_pretrained(asked.out).get_vocab()
    written = read_checked(asked.out / "report.json")
    assert written["perplexity"] == report["perplexity"]
    assert min(speed[what] for speed in written["speed"].values() for what in ("prefill", "decode")) > 0
    card = (asked.out / "README.md").read_text()
    assert "taking heads, channels or blocks out" in card
    assert "intermediate_size 48" in card


def test_weights_keep_their_dtype_and_what_is_outside_of_the_blocks(source, tmp_path):
    folder = tmp_path / "halves"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    asked = options(folder, tmp_path)
    shrink(asked, QUICK, speed=False)
    found, before = (safetensors.torch.load_file(each / "model.safetensors") for each in (asked.out, folder))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in found if ".layers." not in name)


def test_a_folder_that_is_there_stays(source, tmp_path):
    asked = options(source, tmp_path)
    asked.out.mkdir()
    (asked.out / "mine.txt").write_text("mine")
    with refused("exists and is not empty"):
        shrink(asked, QUICK)
    assert (asked.out / "mine.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".smaller*"))


def test_a_pruned_folder_is_refused(source, tmp_path):
    model = tiny_model("llama")
    prune_model(model, random_windows(), "2:4", preset="paper")
    folder = tmp_path / "pruned"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    with refused("pruned already", "shrink the dense model first"):
        shrink(options(folder, tmp_path), QUICK)
    pack_folder(folder, tmp_path / "packed")
    with refused("unpack"):
        shrink(options(tmp_path / "packed", tmp_path), QUICK)
    assert not (tmp_path / "smaller").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mixtral", "gpt2", "qwen3_moe"])
def test_other_forms_of_files_go_back_under_their_names(model_type, tmp_path):
    """Experts that files keep one by one, transposed weights, and words of an older configuration."""
    from tests.architectures import CONFIGS

    folder = save_model(tmp_path / "source", model_type, **CONFIGS[model_type])
    asked = options(folder, tmp_path)
    settings = ShrinkSettings(keep="70%") if model_type == "gpt2" else ShrinkSettings(experts="3", channels="75%")
    shrink(asked, settings, speed=False)
    _, info = AutoModelForCausalLM.from_pretrained(asked.out, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]


def test_the_default_folder_says_how_small():
    folder = default_smaller_folder("org/llama/", ShrinkSettings(keep="75%", blocks="24"))
    assert str(folder) == "pruned/llama-smaller-keep-75pct-blocks-24"
