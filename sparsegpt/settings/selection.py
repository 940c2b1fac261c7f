"""Which layers a user means: regular expressions on module names, ranges of blocks."""

import functools
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from sparsegpt.errors import SparseGPTError

_RANGE = re.compile(r"(?P<first>\d{0,9})(?P<open>:(?P<end>\d{0,9}))?", re.ASCII)
# Letters of an expression, and how often its counts together may repeat a part: each is compiled as often as it counts.
LETTERS, REPEATS = 100_000, 10_000
_COUNTS = re.compile(r"\{(\d*)(?:,(\d*))?\}", re.ASCII)
_SHOWN = 200  # letters of an expression in a message
# Seconds that one expression may take for all names together: some take longer than anybody's patience on one name.
SECONDS = 2.0


class Expression:
    """A regular expression with an end: it may come from a file of somebody else's."""

    def __init__(self, text: str, what: str, setting: str) -> None:
        import regex  # --help and refusals need none

        self.text, self.what, self.settings = text, what, tuple(filter(None, (setting,)))
        self._left = SECONDS
        if len(text) > LETTERS or _repeats(text) > REPEATS:
            raise self._refusal(
                f"is too large: expected {LETTERS} letters at most, and counts below {REPEATS} together"
            )
        try:
            with warnings.catch_warnings():  # what a later Python may read differently, this one reads as ever
                warnings.simplefilter("ignore")
                re.compile(text)  # what counts as an expression is Python's own syntax
                self._pattern = regex.compile(text)
        except (re.error, regex.error, OverflowError, RecursionError, ValueError) as error:
            raise self._refusal(f"is not a regular expression: {' '.join(str(error).split())}") from error

    def found_in(self, name: str) -> bool:
        """Whether it matches anywhere in a name. Raises SparseGPTError once its time is up."""
        started = time.perf_counter()
        try:
            found = self._pattern.search(name, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError as error:
            raise self._refusal(f"takes longer than {SECONDS:g} s on {name}: repeat nothing that repeats") from error
        self._left -= time.perf_counter() - started
        return found

    def _refusal(self, why: str) -> SparseGPTError:
        shown = self.text if len(self.text) <= _SHOWN else self.text[:_SHOWN] + "..."
        return SparseGPTError(f"{self.what} {shown!r} {why}", settings=self.settings)


def _repeats(text: str) -> int:
    """The product of all counts such as {3} and {2,5}, as if each stood inside of the others."""
    product = 1
    for found in _COUNTS.finditer(text):
        product *= max([1, *(int(digits[:9]) for digits in found.groups(default="") if digits)])
        if product > REPEATS:
            break
    return product


@functools.lru_cache
def compile_regex(text: str, what: str, setting: str = "") -> Expression:
    """The regular expression `text`. Raises SparseGPTError, beginning with `what`, where it is none."""
    return Expression(text, what, setting)


def name_filter(only: str | None = None, skip: str | None = None) -> Callable[[str], bool]:
    """Which full module names to prune: those where the regex `only` is found, without those where `skip` is.

    Raises SparseGPTError where one of them is no regular expression.
    """
    wanted, unwanted = (
        compile_regex(text, name, name) if text else None for name, text in (("only", only), ("skip", skip))
    )
    return lambda name: not (wanted and not wanted.found_in(name)) and not (unwanted and unwanted.found_in(name))


@dataclass(frozen=True)
class BlockRanges:
    """Some of a model's decoder blocks: half-open ranges of their indices, None for an end that is left out."""

    text: str
    ranges: tuple[tuple[int | None, int | None], ...]

    def indices(self, count: int) -> frozenset[int]:
        """The blocks meant, of a model with `count` blocks. Raises SparseGPTError for those it does not have."""
        found: set[int] = set()
        for start, end in self.ranges:
            first, stop = start or 0, count if end is None else end
            if first >= count or stop > count:
                raise SparseGPTError(
                    f"blocks {self.text} are out of range: the model has {count} blocks, 0 to {count - 1}; "
                    "ranges leave out their end, as in 0:12",
                    settings=("blocks",),
                )
            found.update(range(first, stop))
        return frozenset(found)


def parse_blocks(value: "str | BlockRanges | None") -> BlockRanges:
    """Turn "0:12", "3", ":4", "20:", or several with commas between, into ranges; None means all blocks.

    Raises SparseGPTError for text of another form and for ranges without any block.
    """
    if isinstance(value, BlockRanges):
        return value
    if value is None:
        return BlockRanges(":", ((None, None),))
    ranges: list[tuple[int | None, int | None]] = []
    for part in value.split(","):
        found = _RANGE.fullmatch(part.strip())
        if not found or not part.strip():
            raise SparseGPTError(
                f"blocks {value!r} are not understood: expected ranges such as 0:12, 3, :4 or 20:", settings=("blocks",)
            )
        first = int(found["first"]) if found["first"] else None
        if not found["open"]:
            assert first is not None
            ranges.append((first, first + 1))
            continue
        end = int(found["end"]) if found["end"] else None
        if end is not None and end <= (first or 0):
            raise SparseGPTError(
                f"blocks {value}: {part.strip()} holds no block, as a range leaves out its end", settings=("blocks",)
            )
        ranges.append((first, end))
    return BlockRanges(value, tuple(ranges))
