"""The command's way, weights in files and one block in memory, gives the bits of a model pruned whole in memory."""

from contextlib import nullcontext

import pytest
import torch

from sparsegpt import prune_model
from sparsegpt.calib_data import draw_windows, load_text
from sparsegpt.files import mapped
from sparsegpt.model.loading import load_model
from sparsegpt.recovery import distill
from sparsegpt.run.job import run
from sparsegpt.run.options import RunOptions
from sparsegpt.settings.prune_settings import resolve_settings
from tests.architectures import COVERING, VARIANTS, WRAPPERS, tiny, tiny_variant
from tests.support import in_short, save_tokenizer, write_text

SAMPLES, LENGTH = 6, 16


@pytest.mark.parametrize("variant", in_short([*VARIANTS, *WRAPPERS], [*COVERING, *WRAPPERS]))
def test_a_streamed_run_saves_what_pruning_in_memory_gives(tmp_path, monkeypatch, variant):
    compare(tmp_path, monkeypatch, tiny(variant), "2:4", preset="paper", error_correction=0.5)


@pytest.mark.parametrize("variant", in_short([*VARIANTS, *WRAPPERS], ["llama", "bloom", "gpt_oss", "gemma3"]))
def test_so_it_does_with_the_default_settings(tmp_path, monkeypatch, variant):
    compare(tmp_path, monkeypatch, tiny(variant), "2:4")


@pytest.mark.parametrize(
    "choices", [{"allocation": "owl"}, {"reconstruct": 1, "look_ahead": 1}, {"distill": 2}], ids=str
)
def test_so_it_does_with_other_settings(tmp_path, monkeypatch, choices):
    compare(tmp_path, monkeypatch, tiny_variant("llama"), "0.5", **choices)


def test_so_it_does_with_a_head_of_its_own(tmp_path, monkeypatch):
    compare(tmp_path, monkeypatch, tiny_variant("llama"), "2:4", include_head=True, distill=1, distill_rate=1e-3)


@pytest.mark.parametrize("variant", ["llama-tied", "gpt2", "opt-projected", "qwen3_moe", "phi"])
def test_so_it_does_in_other_bases(tmp_path, monkeypatch, variant):
    compare(tmp_path, monkeypatch, tiny_variant(variant), "2:4", rotate="all", distill=1)


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "opt-projected"])
def test_gradients_go_back_through_weights_that_are_stored_in_half_precision(tmp_path, monkeypatch, variant):
    """Norm, projection and head are at home in bfloat16, and at work in float32 until the gradient has passed them."""
    monkeypatch.setattr(distill, "autocast", lambda device: nullcontext())  # which would multiply by copies
    tiny_variant(variant).bfloat16().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    text, model = str(write_text(tmp_path / "text.txt")), str(tmp_path / "model")
    options = RunOptions(model, text, (), tmp_path / "out", samples=40, sequence_length=LENGTH)
    settings = resolve_settings("2:4", "paper", method="magnitude", distill=3, distill_rate=1e-3)
    epochs = run(options, settings)["epochs"]
    assert epochs[-1]["loss"] < epochs[0]["loss"]


def compare(tmp_path, monkeypatch, model, sparsity, *, include_head=False, **choices):
    monkeypatch.setattr(mapped, "SMALL", 0)  # tiny weights live in files too
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    text = str(write_text(tmp_path / "text.txt"))
    run(
        RunOptions(
            model=str(tmp_path / "model"),
            calibration=text,
            evaluate=(),
            out=tmp_path / "out",
            samples=SAMPLES,
            sequence_length=LENGTH,
            include_head=include_head,
        ),
        resolve_settings(sparsity, **choices),
    )
    loaded = load_model(str(tmp_path / "model"))
    bos = loaded.bos_token("auto")
    windows = draw_windows(load_text(text, "calibration"), loaded.tokenizer, SAMPLES, LENGTH, 0, bos).windows
    prune_model(loaded.model, windows, sparsity, include_head=include_head, **choices)
    expected, found = loaded.model.state_dict(), load_model(str(tmp_path / "out")).model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
