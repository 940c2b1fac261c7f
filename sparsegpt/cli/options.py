"""Options of commands, made from the fields of dataclasses that say how they are given (settings/option.py)."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from sparsegpt.cli.console import say, silence_hub
from sparsegpt.errors import SparseGPTError
from sparsegpt.run.options import RunOptions
from sparsegpt.settings.option import Group, Option, option_of

INTERRUPTED = 130  # the exit code
Function = TypeVar("Function", bound=Callable[..., None])


class Command(TyperCommand):
    """A command that adds to a refusal the flags of the settings that it names."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except SparseGPTError as error:
            # of what is on unless it is turned off, the flag that does so
            flags = {
                parameter.name: _shown([*parameter.secondary_opts, *parameter.opts][0]) for parameter in self.params
            }
            advice = [flags[name] for name in _settings_of(error) if name in flags]
            if not advice:
                raise
            raise SparseGPTError(f"{error} ({', '.join(advice)})") from error


def _shown(name: str) -> str:
    """A flag as it is typed; an argument as the help calls it."""
    return name if name.startswith("-") else name.upper()


def _settings_of(error: BaseException | None) -> list[str]:
    """The settings that an error names, and those that it was raised from."""
    named: dict[str, None] = {}
    while error is not None:
        named |= dict.fromkeys(getattr(error, "settings", ()))
        error = error.__cause__
    return list(named)


def parameters(source: type, preset: Mapping[str, str] | None = None) -> list[Parameter]:
    """A parameter for each field of a dataclass that is an option.

    preset: what a preset gives for fields, in words. Such an option is None unless it is given.
    """
    presets = preset or {}
    return [
        _parameter(setting, told, presets.get(setting.name))
        for setting in fields(source)
        if (told := option_of(setting)) is not None
    ]


def _parameter(setting: "Field[Any]", told: Option, preset: str | None) -> Parameter:
    default, shown = _default(setting, told) if preset is None else (None, preset)
    kind: Any = told.typed or setting.type
    if default is None:
        kind = kind | None
    annotation: Any = Annotated[kind, _info(setting.name, told, shown)]
    return Parameter(setting.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _default(setting: "Field[Any]", told: Option) -> tuple[Any, str | bool]:
    """Default of an option, and how the help shows it: True for the value itself."""
    if told.unset:
        return None, told.unset
    default = told.default if setting.default is MISSING else setting.default
    if setting.default is MISSING and default is None:
        return Parameter.empty, False
    return default, "off" if default is False else True


def _info(name: str, told: Option, shown: str | bool) -> OptionInfo:
    def check(value: Any) -> Any:  # typer's own maximum would fill a column of the help with 19 digits
        if told.maximum is not None and value is not None and value > told.maximum:
            raise typer.BadParameter(f"{value} is more than {told.maximum}.")
        return at_home(value) if isinstance(value, Path) else value

    info: OptionInfo = typer.Option(
        told.flag or f"--{name.replace('_', '-')}",
        help=told.help,
        min=told.minimum,
        callback=check,
        rich_help_panel=told.group,
        show_default=shown,
    )
    return info


def at_home(path: Path) -> Path:
    """A path with the `~` that a shell leaves alone, as in --out=~/pruned, turned into the home folder."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise typer.BadParameter(f"{path}: there is no such user.") from error


def takes(*options: Parameter) -> Callable[[Function], Function]:
    """Give a function of `**arguments` the signature that typer reads: these options, group by group."""

    def rank(parameter: Parameter) -> tuple[int, bool]:
        (info,) = parameter.annotation.__metadata__
        return list(Group).index(info.rich_help_panel), parameter.default is not Parameter.empty

    def dress(function: Function) -> Function:
        function.__dict__["__signature__"] = inspect.Signature(sorted(options, key=rank))
        return function

    return dress


def given(source: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a call's arguments that are options of this dataclass."""
    return {setting.name: arguments[setting.name] for setting in fields(source) if option_of(setting) is not None}


def _shared(name: str, shown: str | bool | None = None) -> OptionInfo:
    """An option of `run` for another command, whose own signature says the default."""
    (told,) = (option_of(setting) for setting in fields(RunOptions) if setting.name == name)
    assert told is not None
    return _info(name, told, shown or told.unset or True)


Model = Annotated[str, _shared("model")]
Calibration = Annotated[str | None, _shared("calibration")]
Samples = Annotated[int, _shared("samples")]
Length = Annotated[int | None, _shared("sequence_length")]
WindowLength = Annotated[int, _shared("sequence_length", shown=True)]
Seed = Annotated[int, _shared("seed")]
EvalWindows = Annotated[int | None, _shared("eval_windows")]
EvalTasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        help="lm-eval tasks, comma-separated (the extra `tasks`).",
        rich_help_panel=Group.MODEL,
        show_default="none",
    ),
]
IncludePath = Annotated[Path | None, _shared("include_path")]
TaskLimit = Annotated[int | None, _shared("task_limit")]
BosChoice = Annotated[str, _shared("bos")]
Device = Annotated[str, _shared("device")]
Dtype = Annotated[str, _shared("dtype")]
BatchSize = Annotated[int | None, _shared("batch_size")]
Overwrite = Annotated[bool, _shared("overwrite", shown="off")]
TrustRemoteCode = Annotated[bool, _shared("trust_remote_code", shown="off")]
Revision = Annotated[str | None, _shared("revision")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=Group.OUTPUT, show_default="off")]


def data_names(text: str, setting: str = "evaluate") -> tuple[str, ...]:
    """The names of a comma-separated list; none for "none". Raises SparseGPTError, for `setting`, without any."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        what = "text: give names or files" if setting == "evaluate" else "task: give names"
        raise SparseGPTError(f"{text!r} names no {what}, or none", settings=(setting,))
    return () if names == ("none",) else names


def folder_of(model: str, revision: str | None) -> Path:
    """The folder of a model by its path, Hub id or short name; one of another kind is refused."""
    from sparsegpt.model.loading import model_folder

    silence_hub()
    return model_folder(model, revision)
