"""The one exception that the command line shows as a single line, without a traceback, and what such a line quotes."""

from collections.abc import Iterable


class SparseGPTError(Exception):
    """Input or state that the engine refuses: the message says what was expected, what was found and what to do.

    settings: names of those that may help, as in PruneSettings and RunOptions. A message speaks to Python and the
    command line alike, so it names no flags: the command line adds those of its own for these settings.
    """

    def __init__(self, message: str = "", *, settings: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.settings = tuple(settings)


def first_line(error: BaseException) -> str:
    """What an exception of a library says, as part of one line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
