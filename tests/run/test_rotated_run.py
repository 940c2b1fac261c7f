"""`run --rotate`: an ordinary folder in the end, and the same one after any interruption."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsegpt.rotation import search
from sparsegpt.run.job import Listener, run
from sparsegpt.run.options import RunOptions
from sparsegpt.run.work_folder import WorkFolder
from sparsegpt.settings.prune_settings import resolve_settings
from tests.architectures import tiny_variant
from tests.support import refused, save_tokenizer, write_text

SETTINGS = resolve_settings("2:4", "default", rotate="all")
TOKENS = torch.arange(2, 42).view(2, 20)


class Stop(Listener):
    """Ends the run behind its first block."""

    def block(self, report):
        raise KeyboardInterrupt


@pytest.fixture
def options(tmp_path):
    tiny_variant("llama-tied").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    text = str(write_text(tmp_path / "text.txt"))
    return RunOptions(str(tmp_path / "model"), text, (), tmp_path / "out", samples=6, sequence_length=16)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@torch.no_grad()
def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids=TOKENS).logits


def test_with_next_to_nothing_pruned_the_saved_model_says_what_the_model_said(options, tmp_path):
    report = run(options, resolve_settings("0.01", "paper", method="magnitude", rotate="all", damping=0.01))
    before, after = logits(tmp_path / "model"), logits(options.out)
    assert (after - before).norm() < 0.1 * before.norm()
    model = AutoModelForCausalLM.from_pretrained(options.out)
    assert not model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert torch.equal(model.model.norm.weight, torch.ones_like(model.model.norm.weight))
    assert report["rotation"]["untied_parameters"] == model.lm_head.weight.numel()
    assert json.loads((options.out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("variant", ["llama-tied", "gpt2"])
def test_weights_in_halves_are_turned_as_they_are_stored(options, tmp_path, variant):
    """Biases and norms that turn are rounded when a run goes on from files, so they are when it does not."""
    model = tiny_variant(variant).bfloat16()
    shutil.rmtree(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    run(replace(options, out=tmp_path / "whole"), SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run(options, SETTINGS, Stop())
    run(replace(options, resume=True), SETTINGS)
    assert weights(options.out) == weights(tmp_path / "whole")


def test_an_interrupted_run_goes_on_in_the_same_bases(options, tmp_path, monkeypatch):
    whole = run(replace(options, out=tmp_path / "whole"), SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run(options, SETTINGS, Stop())
    monkeypatch.setattr(search, "learn_basis", None)  # none are looked for again
    resumed = run(replace(options, resume=True), SETTINGS)
    assert weights(options.out) == weights(tmp_path / "whole")
    assert resumed["rotation"]["stream"] == list(whole["rotation"]["stream"])


@pytest.mark.parametrize("harm", ["damaged", "gone"])
def test_without_its_bases_a_run_begins_anew(options, tmp_path, harm):
    run(replace(options, out=tmp_path / "whole"), SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run(options, SETTINGS, Stop())
    path = WorkFolder(options.out, resume=True, overwrite=False).folder / "bases.safetensors"
    content = path.read_bytes()
    path.unlink()
    if harm == "damaged":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    run(replace(options, resume=True), SETTINGS)
    assert weights(options.out) == weights(tmp_path / "whole")


def test_other_bases_are_another_run(options):
    with pytest.raises(KeyboardInterrupt):
        run(options, SETTINGS, Stop())
    with refused("rotate"):
        run(replace(options, resume=True), replace(SETTINGS, rotate="values"))
