"""How options are given, shown and taken up: every field reaches its dataclass, and the help says what it means."""

import inspect
import os
import re
import shlex
import subprocess
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main

import sparsegpt
from sparsegpt.cli.commands import app
from sparsegpt.cli.run_command import run
from sparsegpt.errors import SparseGPTError
from sparsegpt.run import job, planning
from sparsegpt.run.options import RunOptions
from sparsegpt.settings.option import Group, option_of
from sparsegpt.settings.prune_settings import PRESETS, PruneSettings, resolve_settings
from sparsegpt.settings.recipe import read_recipe


def all_commands(command=None, words=()):
    """The words of every command and the command itself, groups included."""
    command = command or typer.main.get_command(app)
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from all_commands(inner, (*words, name))


COMMANDS = dict(all_commands())


@pytest.fixture
def told(run_cli, monkeypatch):
    """Call `sparsegpt run ...`; returns what the job was told instead of doing it."""

    def call(*arguments: object) -> tuple[RunOptions, PruneSettings]:
        found = []
        monkeypatch.setattr(job, "run", lambda options, settings, display, ranks: found.append((options, settings)))
        outcome = run_cli("run", "--quiet", *arguments)
        assert outcome.code == 0, outcome.err
        [values] = found
        return values

    return call


# What is given reaches the job


def test_without_options_the_defaults_of_the_dataclasses_hold(told):
    options, settings = told("--sparsity", "2:4")
    typed = {"preset": "default", "command": "sparsegpt run --quiet --sparsity 2:4"}
    assert options == RunOptions("demo", "pydoc", ("pydoc",), Path("pruned/demo-2of4"), **typed)
    assert settings == resolve_settings("2:4")
    assert settings.asked == ()


def test_every_option_reaches_its_field(told, tmp_path):
    (tmp_path / "mix.toml").write_text("[[rule]]\nmodules = 'fc2'\nskip = true")
    of_run = {
        "model": "opt-125m",
        "calibration": "c4",
        "documents": "single",
        "samples": 7,
        "sequence_length": 33,
        "seed": 2**63 - 1,
        "eval_windows": 5,
        "eval_tasks": ("arc_easy", "hellaswag"),
        "include_path": Path("tasks"),
        "task_limit": 4,
        "bos": "never",
        "revision": "old",
        "trust_remote_code": True,
        "only": "fc",
        "skip": "fc1",
        "blocks": "0:2",
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 3,
        "micro_batch": 2,
        "activations": "disk",
        "scratch": Path("scratch"),
        "out": Path("to/here"),
        "overwrite": True,
        "resume": True,
        "kernels": "dense",
        "sample_tokens": 8,
        "push_to_hub": "org/name",
        "verify": False,
    }
    of_pruning = {
        "method": "sparsegpt+refit",
        "damping": 0.02,
        "block_size": 64,
        "error_correction": 0.25,
        "residual_correction": 0.125,
        "quantize": "int4:32",
        "quantizer": "rtn",
        "allocation": "owl",
        "rotate": "values",
        "reconstruct": 2,
        "look_ahead": 1,
        "learning_rate": 1e-3,
        "distill": 4,
        "distill_rate": 2e-4,
    }
    joined = {"eval_tasks": "arc_easy, hellaswag"}
    flags = {"calibration": "--calib", "sequence_length": "--seqlen", "verify": "--no-verify"}
    words = ["--sparsity", "0.7", "--preset", "fast", "--eval", " ptb, x.txt ,", "--include", "lm_head"]
    words += ["--recipe", str(tmp_path / "mix.toml")]
    for name, value in (of_run | of_pruning).items():
        words.append(flags.get(name, "--" + name.replace("_", "-")))
        words += [] if isinstance(value, bool) else [joined.get(name, str(value))]
    options, settings = told(*words)
    # gpu_memory is for plans, rank_timeout for torchrun: see below
    given = {field.name for field in fields(RunOptions) if option_of(field)}
    assert given == {*of_run, "evaluate", "include_head", "gpu_memory", "rank_timeout"}
    typed = {"preset": "fast", "command": shlex.join(["sparsegpt", "run", "--quiet", *words])}
    assert options == RunOptions(evaluate=("ptb", "x.txt"), include_head=True, **of_run, **typed)
    given = {field.name for field in fields(PruneSettings) if option_of(field)}
    assert given == {*of_pruning, "sparsity", "recipe"}
    assert settings == resolve_settings("0.7", "fast", recipe=read_recipe(tmp_path / "mix.toml"), **of_pruning)
    assert set(settings.asked) == {*of_pruning, "recipe"}


def test_what_is_for_ranks_is_refused_where_there_are_none(run_cli):
    run_cli("run", "--sparsity", "2:4", "--ranks", 8).refused("--ranks is for planning", "torchrun")
    run_cli("run", "--sparsity", "2:4", "--rank-timeout", 5).refused("started by torchrun", "--rank-timeout")


def test_a_plan_is_told_of_a_gpu_that_is_not_there(run_cli, monkeypatch):
    found = []

    def plan_run(options, settings, ranks):
        found.append((options, settings, ranks))
        raise SparseGPTError("seen")

    monkeypatch.setattr(planning, "plan_run", plan_run)
    run_cli("run", "--sparsity", "2:4", "--preset", "paper", "--plan", "--gpu-memory", 80, "--ranks", 8).refused("seen")
    [(options, settings, ranks)] = found
    assert (options.gpu_memory, ranks) == (80, 8)
    assert settings == resolve_settings("2:4", "paper")
    run_cli("run", "--sparsity", "2:4", "--gpu-memory", 80).refused("--gpu-memory", "--plan")


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_not_given_is_what_the_preset_says(told, preset):
    _, settings = told("--sparsity", "50%/row", "--preset", preset)
    assert settings == resolve_settings("50%/row", preset)
    assert settings.asked == ()


# Help


@pytest.fixture
def help_of(run_cli, monkeypatch):
    """The help of a command, one line an option."""
    monkeypatch.setenv("COLUMNS", "300")

    def print_help(*words: str, flag: str = "--help") -> str:
        outcome = run_cli(*words, flag)
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out

    return print_help


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_short_and_long_help(help_of, words):
    text = help_of(*words)
    assert f"Usage: {' '.join(('sparsegpt', *words))} " in text
    assert help_of(*words, flag="-h") == text


def test_help_of_run_is_in_groups_with_every_default(help_of):
    text = help_of("run")
    titles = re.findall(r"^╭─ (.+?) ─+╮$", text, flags=re.MULTILINE)
    assert titles == ["Options", *Group]
    for parameter in COMMANDS["run",].params:
        if parameter.name == "help":
            continue
        [line] = re.findall(rf"^│[ *]+{parameter.opts[0]} .*$", text, flags=re.MULTILINE)
        assert re.search(r"\[default: .+\]|\[required\]", line), line


@pytest.mark.parametrize(
    ("flag", "default"),
    [
        ("--model", "demo"),
        ("--calib", "(pydoc for the demo, else c4)"),
        ("--eval", "(pydoc for the demo, else wikitext2)"),
        ("--samples", "128"),
        ("--preset", "default"),
        ("--method", "(default preset: admm)"),
        ("--damping", "(default preset: by sample size)"),
        ("--error-correction", "(default preset: 0.5)"),
        ("--residual-correction", "(default preset: 0.75)"),
        ("--reconstruct", "(default preset: 0)"),
        ("--block-size", "(128)"),  # no preset changes it
        ("--learning-rate", "(0.0005)"),
        ("--resume", "(off)"),
        ("--out", "(pruned/<model>-<sparsity>, such as pruned/demo-2of4 or pruned/demo-50pct)"),
    ],
)
def test_defaults_are_shown_as_they_are(help_of, flag, default):
    [line] = re.findall(rf"^│ +{flag} .*$", help_of("run"), flags=re.MULTILINE)
    assert f"[default: {default}]" in line


@pytest.mark.parametrize("words", [words for words in COMMANDS if words], ids=" ".join)
def test_every_command_and_option_has_a_help_text(words):
    assert COMMANDS[words].help
    assert not [parameter.name for parameter in COMMANDS[words].params if not parameter.help]


# The version, and completion by shells


def test_the_version_is_that_of_the_package(run_cli):
    outcome = run_cli("--version")
    assert (outcome.code, outcome.out) == (0, f"sparsegpt {version('sparsegpt')}\n")
    assert sparsegpt.__version__ == version("sparsegpt")


def test_what_is_loaded_late_is_listed():
    assert set(sparsegpt.__all__) <= set(dir(sparsegpt))
    with pytest.raises(AttributeError, match="prune_everything"):
        sparsegpt.prune_everything()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sparsegpt un", {"unpack"}),
        ("sparsegpt run --res", {"--resume", "--residual-correction"}),
        ("sparsegpt bench de", {"decode"}),
    ],
)
def test_shells_complete_commands_and_options(run_cli, monkeypatch, words, expected):
    monkeypatch.setenv("_SPARSEGPT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    outcome = run_cli()
    assert outcome.code == 0
    assert set(outcome.out.split()) == expected


def test_completion_can_be_shown_for_bash(run_cli, monkeypatch, tmp_path):
    from typer import completion

    monkeypatch.setattr(completion, "_get_shell_name", lambda: "bash")
    outcome = run_cli("--show-completion")
    assert outcome.code == 0
    (tmp_path / "complete.sh").write_text(outcome.out)
    script = f"source {tmp_path / 'complete.sh'}; complete -p sparsegpt"
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env={**os.environ})
    assert "-F _sparsegpt_completion" in found.stdout


# Refusals


def refuse(monkeypatch, error: SparseGPTError) -> None:
    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(job, "run", run)


def test_a_refusal_is_given_the_flags_of_the_settings_that_it_names(run_cli, monkeypatch):
    error = SparseGPTError("too few tokens", settings=("samples", "sequence_length", "verify", "patience"))
    assert str(error) == "too few tokens"
    refuse(monkeypatch, error)
    outcome = run_cli("run", "--sparsity", "2:4")
    assert outcome.code == 1
    assert outcome.err == "sparsegpt: too few tokens (--samples, --seqlen, --no-verify)\n"


def test_flags_are_those_of_the_first_cause_too(run_cli, monkeypatch):
    outer = SparseGPTError("rule 1: too much")
    outer.__cause__ = SparseGPTError("too much", settings=["damping"])
    refuse(monkeypatch, outer)
    assert run_cli("run", "--sparsity", "2:4").err == "sparsegpt: rule 1: too much (--damping)\n"


def test_a_command_names_only_flags_and_arguments_of_its_own(run_cli, monkeypatch, tmp_path, llama_folder):
    from sparsegpt.kernels.checkpoint import archive

    def pack_folder(*_: object, **options: object) -> None:
        raise SparseGPTError("it is there", settings=("overwrite", "damping", "out"))

    monkeypatch.setattr(archive, "pack_folder", pack_folder)
    assert run_cli("pack", llama_folder, tmp_path / "out").err == "sparsegpt: it is there (--overwrite, OUT)\n"


def test_a_refusal_is_one_line_whatever_breaks_lines(run_cli, monkeypatch):
    refuse(monkeypatch, SparseGPTError("a\nb\r\nc\x0bd\x85e\u2028f"))
    assert run_cli("run", "--sparsity", "2:4").err == "sparsegpt: a b c d e f\n"


TEXTS = [
    parameter.annotation.__metadata__[0].default  # where typer keeps the flag
    for parameter in inspect.signature(run).parameters.values()
    if parameter.annotation.__origin__ in (str, str | None, Path, Path | None)
]


@pytest.mark.parametrize("flag", TEXTS)
def test_any_text_is_taken_or_refused_with_one_line(run_cli, llama_folder, text_file, tmp_path, monkeypatch, flag):
    """Markup, an emoji's name and a line break, in every option that takes a text."""
    monkeypatch.chdir(tmp_path)
    words = {"--model": llama_folder, "--calib": text_file, "--eval": "none", "--sparsity": "2:4", "--preset": "fast"}
    words |= {"--samples": 2, "--seqlen": 16, "--out": tmp_path / "out", flag: "[/x] :dog:\nc"}
    outcome = run_cli("run", *(part for pair in words.items() for part in pair))
    if outcome.code:
        outcome.refused()
        assert outcome.code == 1


def test_bytes_that_are_no_text_are_refused(run_cli, tmp_path):
    """Python hands them on as surrogates; safetensors opens no such file."""
    run_cli("run", "--sparsity", "2:4", "--out", tmp_path / "\udcff").refused("\\udcff' is not UTF-8 text")
    assert not list(tmp_path.iterdir())


def test_names_are_printed_as_they_are(run_cli, text_file, tmp_path):
    """Brackets are no markup, and `:dog:` is no emoji; a line in a file is not broken, however long."""
    from tests.support import save_model

    folder = save_model(tmp_path / "[/bold] :dog:" / "model")
    text = folder / "[red]text.txt"
    text.write_text(text_file.read_text()[:4000])
    out = folder.parent / ("[x/] " + "long" * 40)
    words = ["run", "--model", folder, "--calib", text, "--eval", text, "--samples", 2, "--seqlen", 16, "--out", out]
    outcome = run_cli(*words, "--sparsity", "2:4", "--preset", "fast")
    assert outcome.code == 0, outcome.err
    assert outcome.out.endswith(f"\nsaved {out}\n")
    assert f"\nloading {folder}\n" in outcome.out
    assert run_cli("inspect", out).code == 0
    assert f"{text}: perplexity" in run_cli("eval", "--model", out, "--data", text, "--seqlen", 16).out
    assert "[/bold] :dog:" in run_cli("run", "--plan", "--sparsity", "2:4", "--model", folder).out
