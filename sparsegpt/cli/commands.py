"""The command line, `python -m sparsegpt`: all commands. Nothing else prints or exits.

Exit codes: 0 done, 1 refused with one line on stderr, 2 wrong usage, 130 interrupted.
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from sparsegpt.cli.bench_commands import bench, tune
from sparsegpt.cli.console import say
from sparsegpt.cli.generate_command import generate
from sparsegpt.cli.model_commands import evaluate_model, export, inspect, pack, unpack
from sparsegpt.cli.options import Command
from sparsegpt.cli.report_commands import compare, push, report
from sparsegpt.cli.run_command import run
from sparsegpt.cli.shrink_command import shrink
from sparsegpt.cli.study_commands import study
from sparsegpt.errors import SparseGPTError
from sparsegpt.files.unchanged import bus_errors_told

NAME = "sparsegpt"  # of the script, also where shells complete it
WRONG_USAGE = 2  # the exit code
# Of click, which typer may keep inside itself under another name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
app = typer.Typer(
    name=NAME,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "shrink": shrink,
    "eval": evaluate_model,
    "inspect": inspect,
    "pack": pack,
    "unpack": unpack,
    "export": export,
    "generate": generate,
    "push": push,
    "report": report,
    "compare": compare,
    "tune": tune,
}
for name, command in COMMANDS.items():
    app.command(name, cls=Command)(command)
app.add_typer(bench, name="bench")
app.add_typer(study, name="study")


def _print_version(wanted: bool) -> None:
    if wanted:
        from sparsegpt import __version__

        print(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback()
def _all_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """One-shot pruning of large language models."""


def main() -> None:
    """Run the command line; every refusal is one line on stderr, with exit code 1, or 2 for wrong usage."""
    try:
        _check_words(sys.argv)
        _check_ranks(sys.argv)
        with bus_errors_told(say):
            code = app(prog_name=NAME, standalone_mode=False)
    except SparseGPTError as error:
        if told := str(error):  # else another rank has said it
            say(told)
        code = 1
    except _UsageError as error:
        _say_usage(error)
        code = WRONG_USAGE
    if code:
        sys.exit(code)


def _check_ranks(words: list[str]) -> None:
    """Of all commands only a run is for several processes. Without torchrun nothing is loaded to know that."""
    if "TORCHELASTIC_RUN_ID" in os.environ and (words[1:2] != ["run"] or "--plan" in words):
        from sparsegpt.driver.ranks import refuse_ranks

        refuse_ranks("a plan" if "--plan" in words else " ".join([NAME, *words[1:2]]))


def _say_usage(error: Any) -> None:
    """What is wrong with the words of a command, and where it says how they go; without words it printed its help."""
    said, command = error.format_message().strip(), error.ctx.command_path if error.ctx else NAME
    if said and said != command and not said.startswith("Usage:"):
        say(f"{said.rstrip('.')} (see `{command} --help`)")
    elif said:
        print(said)


def _check_words(words: list[str]) -> None:
    """Refuse bytes that are no text: safetensors opens no such path, and no report could name it."""
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise SparseGPTError(f"{word!a} is not UTF-8 text: give the file another name")
