"""How a setting is given on the command line, written beside the setting itself.

A dataclass's field carries it as metadata, `samples: int = field(default=128, metadata=option("Calibration windows.",
Group.MODEL))`. The command line is made from these fields; this file knows nothing of it.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass
from enum import StrEnum
from typing import Any


class Group(StrEnum):
    """The parts of a command's help, in their order."""

    MODEL = "Model and text"
    PATTERN = "Pattern and method"
    RECOVERY = "Recovery"
    SELECTION = "Selection"
    MACHINE = "Machine"
    OUTPUT = "Output"


@dataclass(frozen=True)
class Option:
    """A setting on the command line.

    flag: where it is not the field's name. minimum, maximum: of a number. typed: the type of what is typed, where it is
    not the field's own. default: of a field that has none. unset: what leaving the option out means, in words, where no
    value says it. A field without any of the three last must be given.
    """

    help: str
    group: Group
    flag: str = ""
    minimum: float | None = None
    maximum: float | None = None
    typed: type | None = None
    default: Any = None
    unset: str = ""


def option(help_text: str, group: Group, **more: Any) -> Mapping[str, Option]:
    """Metadata that makes a field an option of the command line; `more` as in `Option`."""
    return {"option": Option(help_text, group, **more)}


def option_of(setting: "Field[Any]") -> Option | None:
    """What `option` has written beside a field; None for a field that is no option."""
    found: Option | None = setting.metadata.get("option")
    return found
