"""Recipes and ranges of blocks on the command line: what is printed, stored and refused, and how a run goes on."""

import errno
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sparsegpt.cli import commands as cli
from sparsegpt.files import tensor_files
from sparsegpt.run.inspection import inspect_folder
from tests.support import assert_pattern

RECIPE = """
[[rule]]
modules = 'mlp'
sparsity = 0.4
method = "sparsegpt"

[[rule]]
modules = 'layers\\.0\\.mlp\\.down'
skip = true

[[rule]]
modules = 'experts'
sparsity = "2:4"
"""


@pytest.fixture
def prune(monkeypatch, capsys, llama_folder, text_file, tmp_path):
    """`sparsegpt run` on the tiny Llama with a recipe; returns exit code, stdout and stderr."""

    def run(*extra: object, recipe: str | None = RECIPE, sparsity: str = "4:8") -> tuple[object, str, str]:
        arguments = ["--model", llama_folder, "--calib", text_file, "--eval", "none", "--preset", "fast"]
        arguments += ["--samples", 16, "--seqlen", 32, "--sparsity", sparsity, "--out", tmp_path / "out"]
        if recipe is not None:
            (tmp_path / "mix.toml").write_text(recipe)
            arguments += ["--recipe", tmp_path / "mix.toml"]
        monkeypatch.setattr(sys, "argv", ["sparsegpt", "run", *map(str, [*arguments, *extra])])
        capsys.readouterr()
        try:
            code: object = cli.main() or 0
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


def refused(outcome: tuple[object, str, str], *fragments: str) -> None:
    code, _, err = outcome
    assert code == 1
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for fragment in fragments:
        assert fragment in err


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_the_report_holds_the_rules_and_what_they_came_to(prune, tmp_path):
    code, out, err = prune("--error-correction", 0.5)
    assert (code, err) == (0, "")
    assert "WARNING" in out
    assert "rule 3: 'experts' matches none of the 14 linears" in out
    report = report_of(tmp_path / "out")
    [warning] = report["warnings"]
    assert "rule 3" in warning
    assert report["recipe"]["rules"] == [
        {"modules": "mlp", "sparsity": "0.4", "method": "sparsegpt"},
        {"modules": r"layers\.0\.mlp\.down", "skip": True},
        {"modules": "experts", "sparsity": "2:4"},
    ]
    attention = [f"model.layers.{place}.self_attn.{part}_proj" for place in (0, 1) for part in "qkvo"]
    skipped = "model.layers.0.mlp.down_proj"
    mlp = {f"model.layers.{place}.mlp.{part}_proj" for place in (0, 1) for part in ("gate", "up", "down")} - {skipped}
    shared = {"damping": None, "block_size": 128, "error_correction": 0.5, "residual_correction": 0.0}
    shared |= {"quantize": None, "quantizer": "gptq"}
    by_settings = {entry.get("method"): entry for entry in report["recipe"]["resolved"]}
    assert by_settings[None] == {"skip": True, "linears": [skipped]}
    assert set(by_settings["admm"].pop("linears")) == set(attention)
    assert set(by_settings["sparsegpt"].pop("linears")) == mlp
    assert by_settings["admm"] == {"sparsity": "4:8", "method": "admm", **shared}
    assert by_settings["sparsegpt"] == {"sparsity": "0.4", "method": "sparsegpt", **shared}
    methods = {layer["name"]: layer["method"] for layer in report["layers"]}
    assert methods == dict.fromkeys(attention, "admm") | dict.fromkeys(mlp, "sparsegpt")
    weights = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    for name in methods:
        assert_pattern(weights[f"{name}.weight"], 0.4 if "mlp" in name else "4:8")
    assert (weights[f"{skipped}.weight"] != 0).all()


def test_without_a_recipe_the_report_says_so(prune, tmp_path):
    assert prune(recipe=None)[0] == 0
    report = report_of(tmp_path / "out")
    assert report["recipe"] is None
    assert {layer["method"] for layer in report["layers"]} == {report["method"]}


def test_inspect_checks_each_linear_against_its_own_pattern(prune, tmp_path):
    assert prune()[0] == 0
    patterns = {found.name: found.pattern for found in inspect_folder(tmp_path / "out")}
    assert patterns["model.layers.1.mlp.up_proj"] == "0.4"
    assert patterns["model.layers.1.self_attn.q_proj"] == "4:8"


def test_blocks_combine_with_only_and_skip(prune, tmp_path):
    assert prune("--blocks", "1:", "--only", "self_attn", "--skip", "o_proj", recipe=None)[0] == 0
    names = {layer["name"] for layer in report_of(tmp_path / "out")["layers"]}
    assert names == {f"model.layers.1.self_attn.{part}_proj" for part in "qkv"}


@pytest.mark.parametrize(
    ("extra", "recipe", "fragments"),
    [
        (("--blocks", "2"), None, ("blocks 2 are out", "the model has 2 blocks, 0 to 1")),
        (("--blocks", "all"), None, ("blocks 'all' are not", "0:12")),
        (("--blocks", "1:1"), None, ("blocks 1:1:", "no block")),
        (("--blocks", "0", "--only", r"layers\.1"), None, ("no linear", "--only", "--skip", "--blocks")),
        (("--blocks", "0"), "[[rule]]\nmodules = 'layers.0'\nskip = true", ("prunes nothing",)),
        ((), "[[rule]]\nmodules = '.'\nskip = true", ("prunes nothing", "14 of 14")),
        ((), "[[rule]]\nmodule = '.'\nskip = true", ("mix.toml: rule 1", "'module'", "did you mean modules?")),
        ((), "[[rule]]\nmodules = '.'\nsparsity = 2:4", ("mix.toml", "TOML", "line 3")),
        (("--method", "wanda"), "[[rule]]\nmodules = 'q'\nerror_correction = 1", ("rule 1", "q_proj", "'wanda'")),
        (("--allocation", "owl"), "[[rule]]\nmodules = '.'\nsparsity = '2:4'", ("owl", "4:8")),
        (("--kernels", "auto"), "[[rule]]\nmodules = 'q'\nsparsity = 0.5", ("--kernels", "2:4")),
    ],
)
def test_switches_that_make_no_sense_are_refused(prune, tmp_path, extra, recipe, fragments):
    refused(prune(*extra, recipe=recipe), *fragments)
    assert {path.name for path in tmp_path.iterdir()} <= {"mix.toml"}


def test_what_prunes_nothing_is_refused_before_the_dense_model_is_scored(prune, text_file):
    code, out, _ = prune("--eval", text_file, recipe="[[rule]]\nmodules = '.'\nskip = true")
    assert code == 1
    assert "scoring" not in out
    _, out, _ = prune("--eval", text_file)
    assert out.index("WARNING") < out.index("scoring")


def test_a_missing_recipe_is_refused(prune, tmp_path):
    refused(prune("--recipe", tmp_path / "other.toml", recipe=None), "other.toml", "cannot be read")


@pytest.mark.parametrize("writes", [1, 2])
def test_a_run_goes_on_only_with_the_same_recipe_and_blocks(prune, tmp_path, monkeypatch, writes):
    """The disk is full behind the first block, or when both are finished and the result is written."""
    flags = "--error-correction", 0.5, "--rotate", "off"
    assert prune(*flags)[0] == 0
    whole = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out").rename(tmp_path / "whole")
    real, done = tensor_files.ShardedWriter.add, []

    def add(self, *named):
        if len(done) == writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(real(self, *named))

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files.ShardedWriter, "add", add)
        refused(prune(*flags), "no space left")
    flags = *flags, "--resume"
    refused(prune(*flags, recipe=RECIPE.replace("0.4", "0.3")), "rule 1", "sparsity = '0.4'", "sparsity = '0.3'")
    refused(prune(*flags, recipe=RECIPE + "[[rule]]\nmodules = 'v'\nskip = true"), "rule 4", "None then", "'v'")
    refused(prune(*flags, recipe=None), "rule 1", "rule 2", "None now")
    refused(prune(*flags, "--blocks", "0"), "--blocks: None then, 0 now")
    code, out, _ = prune(*flags, recipe=f"# only a comment\n{RECIPE}")
    assert code == 0
    assert f"going on after block {writes}" in out
    assert out.count("rule 3") == 1
    report = report_of(tmp_path / "out")
    assert len(report["warnings"]) == 1
    assert report["recipe"] == report_of(tmp_path / "whole")["recipe"]
    resumed = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
