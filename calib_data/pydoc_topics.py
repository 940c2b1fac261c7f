"""The reference prose that every CPython carries (`pydoc_data.topics`), split by topic name.

A topic is held out for evaluation when a hash of its name says so, whatever the Python version. Topics overlap: the
chapter on special names contains the one on attribute access. Whatever a training topic shares with a held-out topic
is therefore removed from the training side, paragraph by paragraph.
"""

import hashlib
import re
from collections.abc import Iterable

HELD_OUT_PERCENT = 12  # of the names; about a fifth of the text, for the long topics happen to be among them
SHARED_WORDS = 8  # a run of so many equal words is a copy, not a coincidence
SHARED_LINE = 30  # characters of a line of code or table that is a copy

_WORD = re.compile(r"\w+")

Fingerprint = str | tuple[str, ...]


def is_held_out(topic: str) -> bool:
    """Whether the topic of this name belongs to the evaluation side: a property of the name alone."""
    digest = hashlib.sha256(f"held out:{topic}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def held_out_topics() -> dict[str, str]:
    """Name -> whole text of every evaluation topic, sorted by name."""
    return {name: text for name, text in _topics().items() if is_held_out(name)}


def training_topics() -> dict[str, str]:
    """Name -> text of every other topic, sorted by name, without the paragraphs that a held-out topic repeats."""
    held_out = fingerprints(held_out_topics().values())
    own = {name: text for name, text in _topics().items() if not is_held_out(name)}
    kept = {name: without_overlap(text, held_out) for name, text in own.items()}
    return {name: text for name, text in kept.items() if text}


def fingerprints(texts: Iterable[str]) -> set[Fingerprint]:
    """Every run of `SHARED_WORDS` words (lower case, across line breaks) and every line of `SHARED_LINE` characters."""
    found: set[Fingerprint] = set()
    for text in texts:
        words = _WORD.findall(text.lower())
        found.update(zip(*(words[offset:] for offset in range(SHARED_WORDS)), strict=False))
        lines = (" ".join(line.split()) for line in text.splitlines())
        found.update(line for line in lines if len(line) >= SHARED_LINE)
    return found


def without_overlap(text: str, held_out: set[Fingerprint]) -> str:
    """`text` without the paragraphs (between blank lines) that share a fingerprint with the held-out text."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(paragraph for paragraph in paragraphs if fingerprints([paragraph]).isdisjoint(held_out))


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics  # half a megabyte that only these functions need

    return dict(sorted(topics.items()))
