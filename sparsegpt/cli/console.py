"""How the command line speaks: its console, its one line of refusal, and libraries that keep silent."""

import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_OF_A_FILE = 160


def open_console() -> "Console":
    """Colours and bars on a terminal; plain lines anywhere else.

    Names and paths that a user gives are printed as they are: `[x]` is no markup and `:x:` no emoji.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, markup=False, emoji=False, width=WIDTH_OF_A_FILE, no_color=True)


def typed_command() -> str | None:
    """The command line as typed, fit for a shell; None when a program that is not ours calls the commands."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return shlex.join(["python", "-m", "sparsegpt", *sys.argv[1:]])
    return shlex.join(["sparsegpt", *sys.argv[1:]]) if called.stem == "sparsegpt" else None


def say(text: str) -> None:
    """One line on stderr, whatever line breaks a user's names bring in."""
    print(f"sparsegpt: {' '.join(text.splitlines())}", file=sys.stderr)


def silence_libraries() -> None:
    """Progress bars and advice of transformers would break the display; its errors still come through."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    silence_hub()


def silence_hub() -> None:
    """No progress bars of the Hub's client, and no lines about each of its retries: the refusal says what matters."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
