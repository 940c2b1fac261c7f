"""The command line driven as a user does: what is written, what is printed, what is refused and how."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sparsegpt.files import tensor_files
from sparsegpt.files.results import write_marker
from sparsegpt.model import families as blocks
from sparsegpt.settings.prune_settings import PRESETS
from tests.architectures import tiny_variant
from tests.support import (
    BROKEN_FOLDERS,
    CHILD_ENVIRONMENT,
    Outcome,
    assert_pattern,
    block_linears,
    broken_folder,
    save_model,
    save_tokenizer,
    write_text,
)

WINDOW = 32
# Written into every report: the contract of design.md, section 2.
REPORT_KEYS = {"model", "sparsity", "method", "settings", "seed", "calibration", "perplexity"}
REPORT_KEYS |= {"density_of_pruned_linears", "seconds", "peak_memory_bytes", "layers", "versions"}
LAYER_KEYS = {"name", "shape", "sparsity", "relative_error", "damping", "seconds"}


@pytest.fixture
def prune(run_cli, llama_folder, text_file, tmp_path):
    """`sparsegpt run` on the tiny Llama; keyword arguments become flags, None takes a flag away."""

    def run(*extra: object, **flags: object) -> Outcome:
        defaults = {"model": llama_folder, "calib": text_file, "eval": "none", "out": tmp_path / "out"}
        defaults |= {"sparsity": "2:4", "samples": 16, "seqlen": WINDOW, "preset": "fast"}
        chosen = {key.replace("_", "-"): value for key, value in {**defaults, **flags}.items() if value is not None}
        return run_cli("run", *(part for key, value in chosen.items() for part in (f"--{key}", value)), *extra)

    return run


@torch.no_grad()
def plain_perplexity(folder: Path, text: Path) -> float:
    """Load a saved folder as anyone would and score it with a float64 loop."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(text.read_text(), add_special_tokens=False)["input_ids"]
    losses = []
    for start in range(0, len(tokens) - WINDOW + 1, WINDOW):
        window = torch.tensor(tokens[start : start + WINDOW])
        logs = model(input_ids=window[None]).logits[0, :-1].log_softmax(-1)
        losses.append(-logs.gather(1, window[1:, None]).mean())
    return math.exp(torch.stack(losses).mean())


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# A whole run


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_run_writes_a_model_that_loads_and_scores_as_its_report_says(prune, run_cli, tmp_path, model_type):
    folder = save_model(tmp_path / "model", model_type, tie_word_embeddings=True)
    held_out = write_text(tmp_path / "held-out.txt", words=400, seed=7)
    out = tmp_path / "out"
    outcome = prune(model=folder, eval=held_out, preset=None)
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert "\x1b" not in outcome.out  # no colours outside a terminal
    assert listing(tmp_path) == {"model", "held-out.txt", "out"}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "report.json"} <= listing(
        out
    )

    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= REPORT_KEYS
    assert {"load", "capture", "solve", "eval", "total"} <= report["seconds"].keys()
    assert report["seconds"]["total"] >= report["seconds"]["capture"] + report["seconds"]["solve"]
    assert report["sparsity"] == "2:4"
    assert report["seed"] == 0
    assert report["calibration"]["samples"] == 16
    assert report["calibration"]["sequence_length"] == WINDOW
    assert len(report["calibration"]["token_hash"]) == 64
    assert report["density_of_pruned_linears"] == pytest.approx(0.5)
    assert report["peak_memory_bytes"] > 1e6
    assert {"torch", "transformers", "sparsegpt"} <= report["versions"].keys()
    assert all(layer.keys() >= LAYER_KEYS for layer in report["layers"])

    score = report["perplexity"][str(held_out)]
    assert score["dense"] == pytest.approx(plain_perplexity(folder, held_out), rel=1e-3)
    assert score["pruned"] == pytest.approx(plain_perplexity(out, held_out), rel=1e-3)
    assert score["dense"] != pytest.approx(score["pruned"], rel=1e-3)
    for shown in (score["dense"], score["pruned"]):
        assert f"{shown:.4g}" in outcome.out

    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert {layer["name"] for layer in report["layers"]} == set(block_linears(loaded))
    for linear in block_linears(loaded).values():
        assert_pattern(linear.weight, "2:4")

    found = json.loads(run_cli("inspect", out, "--json").out)
    assert all(finding["ok"] for finding in found)
    assert sum(finding["pattern"] == "2:4" for finding in found) == len(report["layers"])
    [scored] = json.loads(run_cli("eval", "--model", out, "--data", held_out, "--seqlen", WINDOW, "--json").out)
    assert scored["perplexity"] == pytest.approx(score["pruned"], rel=1e-5)


def test_the_same_command_writes_the_same_bits_and_another_seed_does_not(prune, tmp_path):
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        assert prune(out=tmp_path / name, seed=seed).code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second", "third")]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
    hashes = [
        json.loads((tmp_path / name / "report.json").read_text())["calibration"]["token_hash"]
        for name in ("first", "second", "third")
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_quiet_prints_nothing(prune, text_file):
    outcome = prune("--quiet", eval=text_file)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


def test_the_package_runs_as_a_module_in_a_process_of_its_own(llama_folder, text_file, tmp_path):
    flags = ["--model", llama_folder, "--sparsity", "50%", "--calib", text_file, "--eval", "none", "--samples", 2]
    flags += ["--rotate", "off"]  # nobody has told this process to look for bases quickly
    command = [sys.executable, "-m", "sparsegpt", "run", *map(str, flags), "--seqlen", str(WINDOW)]
    options = {"cwd": tmp_path, "env": CHILD_ENVIRONMENT, "capture_output": True, "text": True}
    ended = subprocess.run(command, check=False, timeout=120, **options)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "\x1b" not in ended.stdout
    assert "saved pruned/tiny-llama-50pct" in ended.stdout  # the default folder
    assert (tmp_path / "pruned" / "tiny-llama-50pct" / "report.json").is_file()


@pytest.mark.parametrize(
    ("sparsity", "name"), [("2:4", "2of4"), ("0.5", "50pct"), ("50%", "50pct"), ("33.3%/row", "33.3pct-per-row")]
)
def test_the_default_folder_is_named_after_model_and_sparsity(prune, tmp_path, monkeypatch, sparsity, name):
    monkeypatch.chdir(tmp_path)
    outcome = prune(sparsity=sparsity, out=None)
    assert outcome.code == 0
    assert outcome.out.endswith(f"saved pruned/tiny-llama-{name}\n")
    [folder] = (tmp_path / "pruned").iterdir()
    assert (folder / "report.json").is_file()


@pytest.mark.parametrize("preset", ["paper", "fast", "default", "best"])
def test_every_preset_runs_and_says_what_it_chose(prune, tmp_path, preset):
    once = dict.fromkeys(("reconstruct", "distill"), 1 if preset == "best" else None)
    outcome = prune(preset=preset, sparsity="4:8", **once)
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["method"] == PRESETS[preset]["method"]
    assert report["settings"]["order"] == PRESETS[preset].get("order", "input")
    assert all(report["settings"][key] == value for key, value in PRESETS[preset].items() if key not in once)


def test_only_and_skip_choose_layers_by_name(prune, tmp_path):
    assert prune(only=r"layers\.1\.", skip="mlp").code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {layer["name"] for layer in report["layers"]} == {f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"}
    weights = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert (weights["model.layers.0.self_attn.q_proj.weight"] != 0).all()
    assert (weights["model.layers.1.mlp.up_proj.weight"] != 0).all()


def test_the_head_of_a_tied_model_is_pruned_on_request(prune, run_cli, tmp_path, text_file):
    folder = save_model(tmp_path / "tied", tie_word_embeddings=True)
    assert prune(model=folder, include="lm_head", eval=text_file, rotate="off").code == 0
    out = tmp_path / "out"
    weights = safetensors.torch.load_file(out / "model.safetensors")
    assert_pattern(weights["lm_head.weight"], "2:4")
    dense = safetensors.torch.load_file(folder / "model.safetensors")
    assert torch.equal(weights["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    report = json.loads((out / "report.json").read_text())
    assert report["perplexity"][str(text_file)]["pruned"] == pytest.approx(plain_perplexity(out, text_file), rel=1e-3)
    assert run_cli("inspect", out).code == 0
    assert prune("--overwrite", model=folder, include="lm_head", only="self_attn").code == 0
    assert_pattern(safetensors.torch.load_file(out / "model.safetensors")["lm_head.weight"], "2:4")


def test_half_precision_files_stay_half_precision(prune, tmp_path, text_file):
    folder = save_model(tmp_path / "half")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    safetensors.torch.save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert prune(model=folder, eval=text_file).code == 0
    out = tmp_path / "out"
    weights = safetensors.torch.load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    report = json.loads((out / "report.json").read_text())
    assert report["perplexity"][str(text_file)]["pruned"] == pytest.approx(plain_perplexity(out, text_file), rel=1e-3)


def test_several_texts_are_scored_in_one_run(prune, tmp_path, text_file):
    other = write_text(tmp_path / "other.txt", words=300, seed=3)
    assert prune(eval=f"{text_file}, {other}").code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["perplexity"]) == {str(text_file), str(other)}


def test_an_absurd_dense_perplexity_is_said_loudly_even_when_quiet(prune, tmp_path, text_file):
    folder = save_model(tmp_path / "broken")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 100
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    outcome = prune("--quiet", model=folder, eval=text_file)
    assert outcome.code == 0
    assert "WARNING: dense perplexity" in outcome.out + outcome.err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]


def test_too_few_calibration_tokens_are_warned_of(prune, tmp_path):
    outcome = prune(samples=1)
    assert outcome.code == 0
    assert "32 calibration tokens for 64 input features" in outcome.out + outcome.err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]


# eval and inspect


def test_eval_prints_lines_or_json(run_cli, llama_folder, text_file):
    arguments = ["eval", "--model", llama_folder, "--data", text_file, "--seqlen", WINDOW]
    expected = plain_perplexity(llama_folder, text_file)
    lines = run_cli(*arguments)
    assert lines.code == 0
    assert f"{expected:.2f}" in lines.out
    outcome = run_cli(*arguments, "--json", "--batch-size", 3)
    [score] = json.loads(outcome.out)
    assert score["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert score.keys() >= {"data", "perplexity", "bits_per_byte", "tokens", "windows"}
    with_bos = json.loads(run_cli(*arguments, "--json", "--bos", "always").out)[0]
    assert with_bos["perplexity"] != score["perplexity"]


def test_inspect_fails_and_names_the_group_when_one_is_broken(prune, run_cli, tmp_path):
    assert prune().code == 0
    out = tmp_path / "out"
    assert run_cli("inspect", out).code == 0
    path = out / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][9, 16:20] = 1
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    outcome = run_cli("inspect", out)
    outcome.refused("1 of", "model.layers.1.mlp.up_proj", "row 9, columns 16 to 19", "4 non-zeros")
    assert outcome.code == 1
    outcome = run_cli("inspect", out, "--json")
    assert outcome.code == 1
    broken = [finding["name"] for finding in json.loads(outcome.out) if not finding["ok"]]
    assert broken == ["model.layers.1.mlp.up_proj"]


# Packed folders and kernels


def test_a_2_4_folder_packs_inspects_scores_and_unpacks(prune, run_cli, tmp_path, text_file):
    assert prune(eval=text_file).code == 0
    out, packed, unpacked = tmp_path / "out", tmp_path / "packed", tmp_path / "unpacked"
    outcome = run_cli("pack", out, packed)
    assert outcome.code == 0, outcome.err
    assert "packed 14 linears" in outcome.out
    found = json.loads(run_cli("inspect", packed, "--json").out)
    assert sum(finding["pattern"] == "2:4" and finding["ok"] for finding in found) == 14
    score = ["--data", text_file, "--seqlen", WINDOW, "--json"]
    dense, small = (json.loads(run_cli("eval", "--model", folder, *score).out)[0] for folder in (out, packed))
    assert small["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-4)
    assert run_cli("unpack", packed, unpacked).code == 0
    before, after = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (out, unpacked))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("variant", "linears"), [("gpt2", 8), ("mixtral", 2 * (4 + 3 * 4)), ("gpt_oss", 2 * (4 + 2 * 4))]
)
def test_transposed_weights_and_experts_go_the_whole_way(variant, linears, prune, run_cli, tmp_path, text_file):
    """run with --kernels, pack, inspect, eval of the packed folder, unpack: one perplexity, the same bits."""
    dense, out, packed, unpacked = (tmp_path / name for name in ("dense", "out", "packed", "unpacked"))
    tiny_variant(variant).save_pretrained(dense)
    save_tokenizer(dense)
    outcome = prune(model=dense, eval=text_file, kernels="auto")
    assert outcome.code == 0, outcome.err
    score = json.loads((out / "report.json").read_text())["perplexity"][str(text_file)]
    assert score["kernels"] == pytest.approx(score["pruned"], rel=1e-3)
    for values in ((), ("--values", "int8")):
        outcome = run_cli("pack", out, packed, *values, "--overwrite")
        assert outcome.code == 0, outcome.err
        assert f"packed {linears} linears" in outcome.out
        assert all(finding["ok"] for finding in json.loads(run_cli("inspect", packed, "--json").out))
        arguments = ["eval", "--model", packed, "--data", text_file, "--seqlen", WINDOW, "--json", "--kernels", "dense"]
        [found] = json.loads(run_cli(*arguments).out)
        assert found["perplexity"] == pytest.approx(score["pruned"], rel=0.02 if values else 1e-3)
    run_cli("pack", out, packed, "--overwrite")
    assert run_cli("unpack", packed, unpacked).code == 0
    before, after = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (out, unpacked))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_kernels_give_the_same_score(prune, run_cli, tmp_path, text_file):
    assert prune(eval=text_file, kernels="auto").code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    score = report["perplexity"][str(text_file)]
    assert score["kernels"] == pytest.approx(score["pruned"], rel=1e-4)
    arguments = ["eval", "--model", tmp_path / "out", "--data", text_file, "--seqlen", WINDOW, "--json"]
    [found] = json.loads(run_cli(*arguments, "--kernels", "dense").out)
    assert found["perplexity"] == pytest.approx(score["pruned"], rel=1e-4)


def test_kernels_without_2_4_weights_are_refused(prune, run_cli, llama_folder, text_file, tmp_path):
    prune(sparsity="4:8", kernels="auto").refused("--kernels", "2:4", "4:8")
    run_cli("eval", "--model", llama_folder, "--data", text_file, "--kernels", "dense").refused("2:4")
    run_cli("pack", llama_folder, tmp_path / "packed").refused()
    run_cli("pack", llama_folder, tmp_path / "packed", "--group-size", 64).refused("--group-size", "--values")
    run_cli("unpack", llama_folder, tmp_path / "unpacked").refused()
    assert not list(tmp_path.iterdir())


def test_unknown_kernels_are_refused_before_the_work(prune, tmp_path):
    prune(kernels="warp").refused("'warp'", "auto", "dense")
    assert not list(tmp_path.iterdir())


# Bad input


@pytest.mark.parametrize("sparsity", ["4:2", "5:4", "4:4", "0:4", "1.5", "1", "100%", "-1", "abc", "nan", "", "2:4:8"])
def test_a_sparsity_that_makes_no_sense_is_refused(prune, tmp_path, sparsity):
    prune(f"--sparsity={sparsity}", sparsity=None).refused("sparsity")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", BROKEN_FOLDERS)
def test_a_model_folder_that_is_not_whole_is_refused(prune, llama_folder, tmp_path, how):
    folder, fragments = broken_folder(llama_folder, tmp_path / "broken", how)
    prune(model=folder).refused(*fragments)
    assert listing(tmp_path) == {"broken"}


def test_an_unknown_model_type_without_a_clear_structure_is_refused_with_the_known_ones(prune, tmp_path, llama_folder):
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    folder = tmp_path / "single"  # one block is no list of equal blocks
    shutil.copytree(llama_folder, folder)
    config = OpenAIGPTConfig(n_embd=8, n_layer=1, n_head=1, vocab_size=96, n_positions=64)
    OpenAIGPTLMHeadModel(config).save_pretrained(folder)
    prune(model=folder).refused("'openai-gpt'", "llama", "opt", "add a row to FAMILIES")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [("", ("calib.txt",)), (" \n", ("calib.txt",)), ("a few words", ("calib.txt", "32"))],
)
def test_an_empty_or_too_short_calibration_text_is_refused(prune, tmp_path, text, fragments):
    path = tmp_path / "calib.txt"
    path.write_text(text)
    prune(calib=path).refused(*fragments)


def test_a_missing_calibration_file_is_refused(prune):
    prune(calib="/no/such.txt").refused("/no/such.txt")
    prune(calib="wikitext3").refused("wikitext3", "wikitext2")


def test_too_short_a_text_for_scoring_is_refused(prune, run_cli, tmp_path, llama_folder):
    path = tmp_path / "short.txt"
    path.write_text("a few words")
    prune(eval=path).refused("less than one window of 32")
    run_cli("eval", "--model", llama_folder, "--data", path).refused("less than one window of 64")


def test_a_width_that_groups_do_not_divide_is_refused(prune, tmp_path, text_file):
    folder = save_model(tmp_path / "odd", intermediate_size=66)
    outcome = prune(model=folder, eval=text_file)
    outcome.refused("model.layers.0.mlp.down_proj", "66", "leave this layer out of what is pruned", "--skip")
    assert "scoring" not in outcome.out + outcome.err
    assert prune(model=folder, skip="down_proj").code == 0


def test_activations_that_overflow_name_the_layer(prune, tmp_path):
    folder = save_model(tmp_path / "hot")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][4] = 1e38
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    prune(model=folder, rotate="off").refused("model.layers.1.mlp.", "NaN or infinite activations")
    assert listing(tmp_path) == {"hot", ".out.unfinished"}  # block 0 was finished, and is kept


def test_an_existing_result_is_refused_without_overwrite(prune, tmp_path):
    assert prune(sparsity="4:8").code == 0
    before = (tmp_path / "out" / "report.json").read_bytes()
    prune().refused(str(tmp_path / "out"), "--overwrite")
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    assert prune("--overwrite").code == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["sparsity"] == "2:4"
    assert listing(tmp_path) == {"out"}


def test_a_file_as_out_is_refused(prune, tmp_path):
    (tmp_path / "out").write_text("precious")
    prune("--overwrite").refused("is a file")
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("flags", [{"only": "("}, {"skip": "["}, {"only": "nothing"}, {"skip": "."}])
def test_a_choice_of_layers_that_makes_no_sense_is_refused(prune, flags):
    prune(**flags).refused(*flags)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ({"method": "obc"}, ("'obc'", "sparsegpt")),
        ({"preset": "fastest"}, ("'fastest'", "paper")),
        ({"method": "magnitude", "error_correction": "0.5"}, ("never updates weights",)),
        ({"error_correction": "1.5"}, ("error correction",)),
        ({"residual_correction": "nan"}, ("residual correction",)),
        ({"damping": "-1"}, ("damping",)),
        ({"damping": "nan"}, ("damping",)),
        ({"block_size": "0"}, ("block size",)),
        ({"reconstruct": "-1"}, ("epochs",)),
        ({"dtype": "int4"}, ("'int4'", "float32")),
        ({"device": "tpu"}, ("'tpu'", "cpu")),
        ({"bos": "sometimes"}, ("'sometimes'", "never")),
        ({"include": "embeddings"}, ("'embeddings'", "lm_head")),
        ({"include": "lm_head", "skip": "lm_head"}, ("lm_head", "--include", "--skip")),
        ({"learning_rate": "0.1"}, ("learning rate", "--reconstruct")),
        ({"distill_rate": "0.1"}, ("distillation rate", "--distill")),
        ({"samples": "0"}, ()),
        ({"samples": "-3"}, ()),
        ({"seqlen": "0"}, ()),
        ({"seqlen": "-8"}, ()),
        ({"batch_size": "0"}, ()),
        ({"batch_size": "-2"}, ()),
        ({"seed": "one"}, ()),
        ({"seed": "99999999999999999999999"}, ()),
    ],
)
def test_flags_that_make_no_sense_are_refused(prune, tmp_path, text_file, flags, fragments):
    prune(eval=text_file, **flags).refused(*fragments)
    assert not (tmp_path / "out").exists()


def test_windows_beyond_the_positions_of_the_model_are_refused(prune, run_cli, tmp_path, text_file):
    folder = save_model(tmp_path / "opt", "opt")
    prune(model=folder, seqlen=65).refused("65", "64", "--seqlen")
    run_cli("eval", "--model", folder, "--data", text_file, "--seqlen", 65).refused("65", "64", "--seqlen")


def test_wrong_usage_exits_with_2(run_cli, prune):
    for outcome in (run_cli("run"), run_cli("prune"), prune("--no-such-flag"), run_cli("inspect")):
        assert outcome.code == 2
        assert "Traceback" not in outcome.err


@pytest.mark.parametrize("command", [[], ["run"], ["eval"], ["inspect"]])
def test_help_is_printed(run_cli, command):
    outcome = run_cli(*command, "--help")
    assert outcome.code == 0
    assert "Usage" in outcome.out


def test_inspect_and_eval_refuse_what_they_cannot_read(run_cli, tmp_path):
    run_cli("inspect", tmp_path / "missing").refused("missing", "does not exist")
    run_cli("eval", "--model", tmp_path / "missing").refused("missing", "does not exist")


# What goes wrong in the middle


def test_a_full_disk_leaves_the_old_result(prune, tmp_path, monkeypatch):
    assert prune(sparsity="4:8").code == 0
    before = (tmp_path / "out" / "report.json").read_bytes()
    real = tensor_files.ShardedWriter.add

    def add(self, *named):
        real(self, *named)
        if "embed_tokens" in named[0][0]:  # of the result; the finished blocks are written by then
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files.ShardedWriter, "add", add)
        prune("--overwrite").refused("no space left", str(tmp_path / "out"))
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    assert listing(tmp_path) == {"out", ".out.unfinished"}
    assert prune("--overwrite", "--resume").code == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["sparsity"] == "2:4"
    assert listing(tmp_path) == {"out"}


def test_a_disk_full_at_the_last_file_leaves_nothing(prune, tmp_path, monkeypatch):
    def write_text(self, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", write_text)
    prune().refused("no space left")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_in_the_middle_exits_with_130(prune, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(blocks, "prunable_linears", interrupt)
    from sparsegpt.driver import choices

    monkeypatch.setattr(choices, "prunable_linears", interrupt)
    outcome = prune()
    assert outcome.code == 130
    assert outcome.err.count("\n") == 1
    assert "interrupted" in outcome.err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_during_pruning_exits_with_130_and_leaves_the_old_result(forked, llama_folder, text_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    write_marker(out, "run")
    flags = ["--model", llama_folder, "--calib", text_file, "--eval", "none", "--sparsity", "2:4", "--samples", 64]
    flags += ["--seqlen", WINDOW, "--out", out, "--overwrite", "--reconstruct", 100_000, "--rotate", "off"]
    process = forked.start("-m", "sparsegpt", "run", *flags)
    limit = time.monotonic() + 120
    while "\npruning" not in forked.printed() and time.monotonic() < limit:
        time.sleep(0.05)
    time.sleep(1)  # it is at work, for hours
    os.kill(process, signal.SIGINT)
    ended = forked.finish()
    assert ended.returncode == 130, ended.stderr
    assert len([line for line in ended.stderr.splitlines() if line.strip()]) == 1
    assert re.search("interrupted .*; nothing was written", ended.stderr)
    assert (out / "old").read_text() == "old"
    assert listing(tmp_path) == {"out"}
