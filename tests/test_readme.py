"""The README's promises: its commands run one after another, its Python runs, its flags exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sparsegpt.cli import commands as cli
from tests.architectures import architecture_table
from tests.support import CHILD_ENVIRONMENT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PREFIX = re.compile(r"^(?:\$ )?(?:\S*python3? -m )?sparsegpt ")
# A reader's own model cannot be had here: of `--model`, only what an earlier command wrote, and the demo.
LOCAL = re.compile(r"--model (?!demo\b|pruned/)|bench ")
# Less text than a reader would take, for the same commands.
SHORTER = {
    "run": ["--samples", "8", "--seqlen", "64", "--eval", "none"],
    "eval": ["--seqlen", "64", "--eval-windows", "4"],
    "tune": ["--shapes", "32x64", "--tokens", "1", "--rounds", "1"],
}


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The arguments of every command that calls the engine in a shell block, continued lines joined."""
    text = "\n".join(fenced("(?:sh|bash|console)")).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in text.split("\n")]
    return [PREFIX.sub("", line) for line in lines if PREFIX.match(line)]


needs_text = pytest.mark.skipif(README.count("\n") < 10, reason="the README is not written yet")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder in which the commands on the demo model have run one after another, as a reader runs them."""
    folder = tmp_path_factory.mktemp("readme")
    runnable = [command for command in commands() if not LOCAL.search(command)]
    assert runnable
    for recipe in fenced("toml"):  # the first line is the file's name
        (folder / recipe.split("\n")[0].removeprefix("# ")).write_text(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in runnable:
            words = shlex.split(command)
            patch.setattr(sys, "argv", ["sparsegpt", *words, *SHORTER.get(words[0], [])])
            try:
                cli.main()
            except SystemExit as ended:
                assert not ended.code, command
    return folder


@needs_text
def test_commands_on_the_demo_model_run_one_after_another(done):
    assert (done / "pruned/demo/report.json").is_file()


@pytest.mark.parametrize("command", commands())
def test_every_command_and_flag_exists(command):
    """Also of commands that need the Hub or a GPU."""
    import typer.main

    words = shlex.split(command)
    found = typer.main.get_command(cli.app)
    while hasattr(found, "commands"):
        found = found.commands[words.pop(0)]
    flags = {flag for parameter in found.params for flag in parameter.opts}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= flags


@needs_text
def test_there_is_a_python_example():
    assert fenced("python")


@pytest.mark.parametrize("code", fenced("python"))
def test_python_examples_run(code, done):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=done, env=CHILD_ENVIRONMENT, check=False
    )
    assert result.returncode == 0, result.stderr


@needs_text
def test_no_place_holder_is_left():
    assert not re.findall(r"@@\w+@@|TODO|FIXME", README)


@needs_text
def test_links_to_files_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert not [target for target in targets if not (ROOT / target).exists()]


@needs_text
def test_the_table_of_architectures_is_that_of_the_code():
    """`python -m tests.architectures` prints it."""
    found = re.search(r"<!-- architectures -->\n(.*?)\n<!-- /architectures -->", README, flags=re.DOTALL)
    assert found
    assert found[1] == architecture_table()
