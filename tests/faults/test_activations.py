"""Activations that are NaN, infinite, all zero or of rank one: one line naming the layer, or finite exact patterns."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from torch import Tensor

from tests.support import assert_pattern, save_model

BLOCK = "model.layers.1"
ATTENTION_NORM, MLP_NORM = f"{BLOCK}.input_layernorm.weight", f"{BLOCK}.post_attention_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


def one_channel(tensors: dict[str, Tensor]) -> None:
    tensors[MLP_NORM][1:] = 0


def one_token(tensors: dict[str, Tensor]) -> None:
    tensors[EMBEDDING][:] = tensors[EMBEDDING][0].clone()


def set_to(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[name].fill_(value)


# What is done to the weights, and whether it must be refused; None: either is right.
EDITS: dict[str, tuple[Callable[[dict[str, Tensor]], None], bool | None]] = {
    "infinite": (lambda tensors: tensors[MLP_NORM][3:4].fill_(3e38), True),
    "nan": (lambda tensors: [tensors[f"{BLOCK}.self_attn.{name}_proj.weight"].mul_(1e30) for name in "qkv"], None),
    "squares overflow": (set_to(ATTENTION_NORM, 1e25), True),
    "zero into attention": (set_to(ATTENTION_NORM, 0.0), False),
    "zero into the mlp": (set_to(MLP_NORM, 0.0), False),
    "zero everywhere": (set_to(EMBEDDING, 0.0), None),
    "tiny": (set_to(ATTENTION_NORM, 1e-25), None),
    "rank one, every token the same": (one_token, None),
    "rank one, a single channel": (one_channel, None),
}
METHODS = ["magnitude", "magnitude+refit", "wanda", "wanda+refit", "sparsegpt", "sparsegpt+refit", "admm"]
PATTERNS = ["2:4", "50%", "50%/row"]
SHORT = [*zip(EDITS, itertools.cycle(["sparsegpt", "admm"]), itertools.cycle(PATTERNS), strict=False)][: len(EDITS)]


def check(job, folder: Path, edit: str, method: str, pattern: str, **flags: object) -> bool:
    """Run it on edited weights; whether it was refused."""
    change, must_refuse = EDITS[edit]
    model, out = folder / "model", folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(job.flags["model"], model, dirs_exist_ok=True)
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    # In other bases a gain of 0 makes weights 0 that were none, and the counts below those of the source.
    flags = {"rotate": "off", **flags}
    outcome = job.run(out, "--overwrite", model=model, method=method, sparsity=pattern, **flags)
    what = (edit, method, pattern, flags, outcome.err)
    if outcome.code:
        outcome.refused("model.layers.")
        assert must_refuse is not False, what
        return True
    assert outcome.err == "", what
    # Scores that need no activations have nothing to refuse.
    assert must_refuse is not True or method == "magnitude", what
    weights = safetensors.torch.load_file(out / "model.safetensors")
    for layer in json.loads((out / "report.json").read_text())["layers"]:
        weight = weights[f"{layer['name']}.weight"]
        assert weight.isfinite().all(), what
        if (tensors[f"{layer['name']}.weight"] != 0).all():
            assert_pattern(weight, pattern)
    return False


@pytest.mark.parametrize(("edit", "method", "pattern"), SHORT)
def test_strange_activations_name_the_layer_or_give_an_exact_pattern(tiny_job, tmp_path, edit, method, pattern):
    check(tiny_job, tmp_path, edit, method, pattern)


@pytest.mark.faults
@pytest.mark.parametrize("preset", ["paper", "default", "best"])
def test_strange_activations_under_every_method_and_pattern(tiny_job, tmp_path, preset):
    refused, pairs = 0, list(itertools.product(EDITS, METHODS))
    cases = [(*pair, pattern) for pair, pattern in zip(pairs, itertools.cycle(PATTERNS), strict=False)]
    extra = {"reconstruct": 1, "distill": 1} if preset == "best" else {}
    for edit, method, pattern in cases:
        refused += check(tiny_job, tmp_path, edit, method, pattern, preset=preset, **extra)
    print(f"\n{len(cases)} strange activations ({preset}): {refused} refused by the layer's name, all others exact")


def test_a_result_with_infinite_scores_can_be_resumed(tiny_job, tmp_path):
    """An infinite perplexity is no number of JSON, and must survive the state and the report."""
    model = save_model(tmp_path / "model", num_hidden_layers=2)
    path = model / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["lm_head.weight"] *= 1e30
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    out, flags = tmp_path / "out", {"model": model, "eval": tiny_job.flags["calib"], "eval-windows": 2}
    flags = {name.replace("-", "_"): value for name, value in flags.items()}
    first = tiny_job.run(out, **flags)
    assert first.code == 0, first.err
    again = tiny_job.run(out, "--resume", **flags)
    assert again.code == 0, again.err
    assert "finished already" in again.out
