"""The one exception that the command line shows as a single line, without a traceback, and what such a line quotes."""

import difflib
from collections.abc import Iterable

# From this likeness on (difflib's ratio) a word may be a slip of another.
LIKENESS = 0.6


class SparseGPTError(Exception):
    """Input or state that the engine refuses: the message says what was expected, what was found and what to do.

    settings: names of those that may help, as in PruneSettings and RunOptions. A message speaks to Python and the
    command line alike, so it names no flags: the command line adds those of its own for these settings.
    """

    def __init__(self, message: str = "", *, settings: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.settings = tuple(settings)


def unknown(what: str, found: str, known: Iterable[str], *, settings: Iterable[str] = ()) -> SparseGPTError:
    """The refusal of a word that is none of the known ones: it lists them, and asks for the nearest."""
    names = tuple(known)
    return SparseGPTError(
        f"{what} {found!r} is not known: expected one of {', '.join(names)}{did_you_mean(found, names)}",
        settings=settings,
    )


def did_you_mean(word: str, known: Iterable[str], likeness: float = LIKENESS) -> str:
    """A question that ends a message, for the nearest known word; "" where none is near."""
    found = nearest(word, known, likeness)
    return f"; did you mean {found}?" if found else ""


def nearest(word: str, known: Iterable[str], likeness: float = LIKENESS) -> str | None:
    """The known word that is most like this one, small and capital letters alike; None where none is near."""
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), names, n=1, cutoff=likeness)
    return names[found[0]] if found else None


def first_line(error: BaseException) -> str:
    """What an exception of a library says, as part of one line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
