"""Code that comes with a model runs where it is allowed, in every command that loads a model, and nowhere else."""

import contextlib
import io
import json
import sys
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import typer.main

from sparsegpt.cli.commands import app
from sparsegpt.errors import SparseGPTError
from sparsegpt.eval.bench import pipeline
from tests.architectures import tiny_variant
from tests.support import save_tokenizer

REMOTE = {
    "configuration_mine.py": """
from transformers import GptOssConfig


class MineConfig(GptOssConfig):
    model_type = "mine"
""",
    "modeling_mine.py": """
from transformers import GptOssForCausalLM

from .configuration_mine import MineConfig


class MineForCausalLM(GptOssForCausalLM):
    config_class = MineConfig
""",
}
ALLOWED = "--trust-remote-code"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "mine"
    tiny_variant("gpt_oss").save_pretrained(folder)
    save_tokenizer(folder)
    for name, content in REMOTE.items():
        (folder / name).write_text(content)
    path = folder / "config.json"
    places = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    changes = {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": places}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(autouse=True)
def _modules(monkeypatch, tmp_path):
    """Code is copied to where Python finds it, in this process and in others, and forgotten afterwards."""
    from transformers import dynamic_module_utils

    _forget()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield
    _forget()


def _forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def pruned(model, run_cli, text_file, tmp_path):
    given = ("--model", model, "--sparsity", "2:4", "--preset", "paper", "--samples", 4, "--seqlen", 16, "--quiet")
    given = ("run", *given, "--calib", text_file, "--eval", "none", "--out", tmp_path / "out")
    run_cli(*given).refused("code of its own", ALLOWED)
    assert run_cli(*given, ALLOWED).code == 0
    return tmp_path / "out"


def test_what_the_model_calls_its_experts_is_asked_where_allowed(pruned, run_cli, tmp_path):
    """In no other way can experts be found in the files of a model that transformers does not know."""
    found = {}
    for allowed in ((), (ALLOWED,)):
        problems = [row["problem"] for row in json.loads(run_cli("inspect", pruned, "--json", *allowed).out)]
        found[allowed] = problems.count("not checked")
        assert len(problems) == 24 + 4  # besides what was pruned: embedding, head, routers
    assert found == {(): 16, (ALLOWED,): 0}
    run_cli("pack", pruned, tmp_path / "packed").refused("code of its own", ALLOWED)
    assert "packed 24 linears" in run_cli("pack", pruned, tmp_path / "packed", ALLOWED).out


def test_it_is_scored_where_allowed(pruned, run_cli, text_file):
    score = ("eval", "--model", pruned, "--data", text_file, "--seqlen", 16, "--eval-windows", 2, "--kernels", "dense")
    run_cli(*score).refused("code of its own", ALLOWED)
    assert run_cli(*score, ALLOWED).code == 0


def test_it_writes_where_allowed(model, run_cli):
    write = ("generate", "--model", model, "--prompt", "to be", "--new-tokens", 2, "--json")
    run_cli(*write).refused("code of its own", ALLOWED)
    outcome = run_cli(*write, ALLOWED)
    assert outcome.code == 0 and json.loads(outcome.out)["tokens"] == 2, outcome.err


@pytest.mark.parametrize("words", [("shrink", "--keep", "75%"), ("bench", "shrink")], ids=" ".join)
def test_it_is_shrunk_where_allowed(words, model, run_cli, text_file, tmp_path):
    """Where its code may run, the type is still one that no row tells how to shrink."""
    given = (*words, "--model", model, "--calib", text_file, "--eval", text_file, "--samples", 2, "--seqlen", 16)
    given = (*given, "--eval-windows", 2, "--out", tmp_path / "out")
    run_cli(*given).refused("code of its own", ALLOWED)
    outcome = run_cli(*given, ALLOWED)
    assert outcome.code == 1 and "'mine'" in outcome.err.splitlines()[-1]


def test_it_generates_where_allowed(pruned, run_cli, tmp_path):
    assert run_cli("pack", pruned, tmp_path / "packed", ALLOWED).code == 0
    decode = ("bench", "decode", pruned, tmp_path / "packed", "--new-tokens", 2, "--dtype", "fp32", "--json")
    run_cli(*decode).refused("code of its own", ALLOWED)
    outcome = run_cli(*decode, ALLOWED)
    assert outcome.code == 0, outcome.err
    assert [json.loads(line)["model"] for line in outcome.out.splitlines()] == ["dense", "packed"]


def measured_here(command, **_options):
    """What `bench pipeline` lets a process of its own do, in this one."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            pipeline._measure(*json.loads(command[-1]))
    except SparseGPTError as error:
        return CompletedProcess(command, 1, "", str(error))
    return CompletedProcess(command, 0, printed.getvalue(), "")


def test_it_is_measured_where_allowed(model, run_cli, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(run=measured_here))
    common = ("--model", model, "--calib", text_file, "--samples", 2, "--seqlen", 16, "--json")
    ladder = ("--eval", text_file, "--methods", "magnitude", "--patterns", "2:4", "--eval-windows", 2)
    for words in (("quality", *common, *ladder, "--out", tmp_path / "q.png"), ("pipeline", *common)):
        run_cli("bench", *words).refused("code of its own", ALLOWED)
        outcome = run_cli("bench", *words, ALLOWED)
        assert (outcome.code, len(outcome.out.splitlines())) == (0, 2), outcome.err


def commands(command=None, words=()):
    """The words of every command, and its flags."""
    command = command or typer.main.get_command(app)
    yield words, {flag for parameter in command.params for flag in parameter.opts}
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))


LOADING = [
    ("run",),
    ("eval",),
    ("inspect",),
    ("pack",),
    ("generate",),
    ("shrink",),
    ("bench", "decode"),
    ("bench", "quality"),
    ("bench", "shrink"),
    ("bench", "pipeline"),
]


@pytest.mark.parametrize("words", LOADING, ids=" ".join)
def test_every_command_that_loads_a_model_takes_both_flags(words):
    assert {"--revision", ALLOWED} <= dict(commands())[words]


def test_every_command_that_takes_a_model_loads_it():
    assert {words for words, flags in commands() if "--model" in flags} <= set(LOADING)
