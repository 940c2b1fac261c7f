"""How the command line speaks: its console, its one line of refusal, and libraries that keep silent."""

import sys
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


def say(text: str) -> None:
    """One line on stderr, whatever line breaks a user's names bring in."""
    print(f"sparsegpt: {' '.join(text.splitlines())}", file=sys.stderr)


def silence_libraries() -> None:
    """Progress bars and advice of transformers would break the display; its errors still come through."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
