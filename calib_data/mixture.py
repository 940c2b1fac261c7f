"""Calibration text from several sources: windows of each in turns, as many as its share says.

`a,b` takes equal shares, `a=0.7,b=0.3` those.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsegpt.errors import SparseGPTError

from .own_text import with_own_text
from .packing import assemble, boundary_token
from .sources import Split, TextSource, check_text, load_text
from .windows import Calibration, check_documents, check_size, draw_rows, lay_out_source


@dataclass(frozen=True)
class Share:
    """A text by its name, and how much of a mixture it is, in any unit; None where nothing was said."""

    name: str
    weight: float | None = None


def shares_of(names: str) -> tuple[Share, ...]:
    """The sources of a comma-separated list; a path that exists is one source, whatever stands in it.

    Raises SparseGPTError where the list names one twice, and for weights that are no shares of all of them.
    """
    if _is_path(names):
        return (Share(names),)
    found = tuple(_share(name) for part in names.split(",") if (name := part.strip())) or (Share(names),)
    if len({share.name for share in found}) < len(found):
        raise SparseGPTError(f"calibration text {names!r} names one twice: leave it out", settings=("calibration",))
    if len({share.weight is None for share in found}) > 1:
        raise SparseGPTError(
            f"calibration text {names!r} gives some texts a share and others none: give all of them one, as in a=1,b=2",
            settings=("calibration",),
        )
    return found


def _share(text: str) -> Share:
    name, equals, weight = text.rpartition("=")
    if not equals or _is_path(text):
        return Share(text)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (name and 0 < value < math.inf):
        raise SparseGPTError(
            f"calibration text {text!r}: expected a share above 0 after the name, as in wiki.txt=0.5, found {weight!r}",
            settings=("calibration",),
        )
    return Share(name, value)


def _is_path(name: str) -> bool:
    try:
        return bool(name.strip()) and Path(name).exists()
    except (OSError, ValueError):  # a name that is no path here
        return False


def load_texts(names: str, split: Split) -> tuple[TextSource, ...]:
    """The texts of a comma-separated list with their shares; raises SparseGPTError as `load_text` does."""
    return tuple(replace(load_text(share.name, split), weight=share.weight) for share in shares_of(names))


def check_texts(names: str, split: Split) -> None:
    """`check_text` for every text of a comma-separated list."""
    for share in shares_of(names):
        check_text(share.name, split)


def draw_mixture(
    sources: Sequence[TextSource],
    tokenizer: Any,
    samples: int,
    sequence_length: int,
    seed: int,
    bos: int | None = None,
    documents: str = "auto",
    model: Any = None,
) -> Calibration:
    """Windows [samples, sequence_length] of tokens, the same ones for the same texts, tokenizer and seed.

    They come in turns, each from the source that lags most behind its share. bos: the token that every window begins
    with, one of its `sequence_length` tokens; no other special token is added.
    documents: "join" makes one stream of them, of which every start is equally likely and windows may overlap; "pack"
    lays them side by side behind a boundary token (`packing`); "single" makes a window of each, a shorter one of a
    short document, and of a long one a piece. "auto" joins, but for sources that keep windows within documents (c4):
    there one is drawn, again and again until it is long enough, then a position in it.
    model: writes the text of the source `self` (`own_text`).
    Raises SparseGPTError where a text is too short, for another choice of documents, and where a source would get no
    window.
    """
    check_documents(documents)
    check_size(samples, sequence_length, bos)
    turns = _turns([source.weight or 1.0 for source in sources], samples)
    counts = [turns.count(place) for place in range(len(sources))]
    if not all(counts):
        raise SparseGPTError(
            f"expected a calibration window of each of {len(sources)} texts, found {samples} in all; raise the samples "
            "or the smallest share",
            settings=("samples", "calibration"),
        )
    sources = [
        with_own_text(source, model, tokenizer, count, sequence_length, seed)
        for source, count in zip(sources, counts, strict=True)
    ]
    boundary = None
    drawn: Sequence[Iterable[torch.Tensor]]
    if documents == "pack":
        layouts = [
            lay_out_source(source, tokenizer, count, sequence_length, seed)
            for source, count in zip(sources, counts, strict=True)
        ]
        boundary = boundary_token([window for layout in layouts for window in layout], tokenizer, bos)
        drawn = [assemble(layout, boundary) for layout in layouts]
    else:
        drawn = [
            draw_rows(source, tokenizer, count, sequence_length, seed, bos, documents)
            for source, count in zip(sources, counts, strict=True)
        ]
    left = [iter(rows) for rows in drawn]
    rows = tuple(next(left[place]) for place in turns)
    return Calibration(rows, ", ".join(map(_shown, sources)), seed, bos, documents, boundary)


def draw_windows(
    source: TextSource,
    tokenizer: Any,
    samples: int,
    sequence_length: int,
    seed: int,
    bos: int | None = None,
    documents: str = "auto",
) -> Calibration:
    """Windows [samples, sequence_length] of one source; as `draw_mixture`, and raises as it does."""
    return draw_mixture([source], tokenizer, samples, sequence_length, seed, bos, documents)


def _turns(weights: Sequence[float], samples: int) -> list[int]:
    """Which source each window comes from; with equal weights one after the other."""
    total, given, turns = sum(weights), [0] * len(weights), list[int]()
    for count in range(1, samples + 1):
        lags = [weight / total * count - had for weight, had in zip(weights, given, strict=True)]
        turns.append(max(range(len(weights)), key=lambda place: (round(lags[place], 9), -place)))
        given[turns[-1]] += 1
    return turns


def _shown(source: TextSource) -> str:
    return source.name if source.weight is None else f"{source.name}={source.weight:g}"
