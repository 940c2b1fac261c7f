"""Calibration text from several sources: the same number of windows from each, in turns."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsegpt.errors import SparseGPTError

from .sources import Split, TextSource, check_text, load_text
from .windows import Calibration, draw_windows, hash_tokens


def text_names(names: str) -> tuple[str, ...]:
    """The sources of a comma-separated list; a path that exists is one source, whatever stands in it.

    Raises SparseGPTError where the list names one twice.
    """
    try:
        is_path = bool(names.strip()) and Path(names).exists()
    except (OSError, ValueError):  # a name that is no path here
        is_path = False
    found = (names,) if is_path else tuple(name for part in names.split(",") if (name := part.strip()))
    if len(set(found)) < len(found):
        raise SparseGPTError(f"calibration text {names!r} names one twice: leave it out", settings=("calibration",))
    return found or (names,)  # which is then refused by its name


def load_texts(names: str, split: Split) -> tuple[TextSource, ...]:
    """The texts of a comma-separated list; raises SparseGPTError as `load_text` does."""
    return tuple(load_text(name, split) for name in text_names(names))


def check_texts(names: str, split: Split) -> None:
    """`check_text` for every text of a comma-separated list."""
    for name in text_names(names):
        check_text(name, split)


def draw_mixture(
    sources: Sequence[TextSource], tokenizer: Any, samples: int, sequence_length: int, seed: int, bos: int | None = None
) -> Calibration:
    """Windows [samples, sequence_length], the first from the first source, the next from the next, and so on around.

    Each source's windows are those that `draw_windows` gives for it alone, which says what bos means.
    Raises SparseGPTError as it does, and for fewer windows than sources.
    """
    if samples < len(sources):
        raise SparseGPTError(
            f"expected a calibration window of each of {len(sources)} texts, found {samples}; raise the samples",
            settings=("samples", "calibration"),
        )
    shares = [len(range(place, samples, len(sources))) for place in range(len(sources))]
    drawn = [
        draw_windows(source, tokenizer, share, sequence_length, seed, bos)
        for source, share in zip(sources, shares, strict=True)
    ]
    windows = torch.stack([drawn[index % len(drawn)].windows[index // len(drawn)] for index in range(samples)])
    return Calibration(windows, ", ".join(source.name for source in sources), seed, hash_tokens(windows), bos)
