"""Text to token windows: a seeded draw for calibration, one long stream for evaluation."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsegpt.errors import SparseGPTError, unknown

from .packing import Layout, lay_out, without_own_start
from .sources import TextSource

BOS_CHOICES = ("auto", "always", "never")
# What becomes of documents; see `mixture.draw_mixture`.
DOCUMENT_CHOICES = ("auto", "join", "pack", "single")
# Families trained with a beginning-of-sequence token in every window, and lost without it.
BOS_IN_EVERY_WINDOW = ("gemma",)
DRAWS_WITHOUT_A_FIT = 10_000  # documents in a row too short for a window; more draws would not help


@dataclass(frozen=True)
class Calibration:
    """Calibration windows, each a LongTensor [tokens], and what a report needs to name them.

    bos: the beginning-of-sequence token that every window begins with. documents: one of DOCUMENT_CHOICES.
    boundary: in packed windows, the token that every document begins with, and that is nowhere else.
    """

    rows: tuple[torch.Tensor, ...]
    source: str
    seed: int
    bos: int | None = None
    documents: str = "auto"
    boundary: int | None = None

    @property
    def windows(self) -> torch.Tensor | list[torch.Tensor]:
        """LongTensor [samples, sequence_length], or a list of LongTensors [tokens] where lengths differ."""
        rows = list(self.rows)
        return torch.stack(rows) if len({len(row) for row in rows}) == 1 else rows

    @property
    def token_hash(self) -> str:
        """SHA-256, hexadecimal, of the windows as little-endian int64, row by row."""
        return hashlib.sha256(b"".join(row.cpu().numpy().astype("<i8").tobytes() for row in self.rows)).hexdigest()

    def describe(self) -> dict[str, object]:
        """The entry "calibration" of report.json; sequence_length is that of the longest window."""
        return {
            "source": self.source,
            "samples": len(self.rows),
            "sequence_length": max(map(len, self.rows)),
            "tokens": sum(map(len, self.rows)),
            "seed": self.seed,
            "token_hash": self.token_hash,
            "bos": self.bos,
            "documents": self.documents,
            "boundary": self.boundary,
        }


def check_documents(choice: str) -> None:
    """Raises SparseGPTError for another choice than those of DOCUMENT_CHOICES."""
    if choice not in DOCUMENT_CHOICES:
        raise unknown("documents", choice, DOCUMENT_CHOICES, settings=("documents",))


def check_bos(choice: str) -> None:
    """Raises SparseGPTError for another choice than those of BOS_CHOICES."""
    if choice not in BOS_CHOICES:
        raise unknown("bos", choice, BOS_CHOICES)


def bos_token(tokenizer: Any, model_type: str, choice: str) -> int | None:
    """The beginning-of-sequence token before every window, in calibration and evaluation alike; None for none.

    choice: "always", "never", or "auto", where the family needs it. Raises SparseGPTError for another choice, and for a
    tokenizer without such a token where it is wanted.
    """
    check_bos(choice)
    wanted = choice == "always" or (choice == "auto" and model_type.startswith(BOS_IN_EVERY_WINDOW))
    if not wanted:
        return None
    if tokenizer.bos_token_id is None:
        raise SparseGPTError("the tokenizer has no beginning-of-sequence token: set bos to never", settings=("bos",))
    return int(tokenizer.bos_token_id)


def draw_rows(
    source: TextSource,
    tokenizer: Any,
    samples: int,
    sequence_length: int,
    seed: int,
    bos: int | None = None,
    documents: str = "auto",
) -> list[torch.Tensor]:
    """Windows [sequence_length] of one source that are not packed, or shorter ones; see `mixture.draw_mixture`."""
    source = source.for_tokenizer(tokenizer)
    draw = _DRAWS["within" if documents == "auto" and source.windows_within_documents else documents]
    text_length = sequence_length if bos is None else sequence_length - 1
    windows = draw(source, tokenizer, samples, text_length, torch.Generator().manual_seed(seed))
    return windows if bos is None else [torch.cat([window.new_tensor([bos]), window]) for window in windows]


def lay_out_source(source: TextSource, tokenizer: Any, samples: int, sequence_length: int, seed: int) -> Layout:
    """What goes into each of so many packed windows [sequence_length]; raises as `draw_mixture` does."""
    source = source.for_tokenizer(tokenizer)
    drawn = _in_turns(source, tokenizer, torch.Generator().manual_seed(seed), sequence_length)
    return lay_out((without_own_start(tokens, tokenizer) for tokens in drawn), samples, sequence_length)


def check_size(samples: int, sequence_length: int, bos: int | None) -> None:
    """Raises SparseGPTError where there would be no window, or no text in one."""
    length = sequence_length if bos is None else sequence_length - 1
    if samples < 1 or length < 1:
        raise SparseGPTError(
            f"expected at least 1 calibration window of at least 1 token, found {samples} of {length}; "
            "raise the samples or the sequence length",
            settings=("samples", "sequence_length"),
        )


def evaluation_tokens(source: TextSource, tokenizer: Any) -> tuple[torch.Tensor, int]:
    """All tokens of the text, LongTensor [tokens] without special tokens, and the length of the text in UTF-8 bytes."""
    return encode(source.text, tokenizer), len(source.text.encode())


def encode(text: str, tokenizer: Any) -> torch.Tensor:
    """Token ids of one text, LongTensor [tokens], without special tokens."""
    # verbose=False: a text longer than the model's context is what is wanted here, not worth a warning
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def _windows_of_stream(
    source: TextSource, tokenizer: Any, samples: int, sequence_length: int, generator: torch.Generator
) -> list[torch.Tensor]:
    tokens = encode(source.text, tokenizer)
    positions = len(tokens) - sequence_length + 1
    if positions < 1:
        raise _too_short(source, sequence_length, len(tokens))
    starts = torch.randint(positions, (samples,), generator=generator)
    return [tokens[start : start + sequence_length] for start in starts.tolist()]


def _windows_within_documents(
    source: TextSource, tokenizer: Any, samples: int, sequence_length: int, generator: torch.Generator
) -> list[torch.Tensor]:
    # As published for c4: its shard is too big to tokenize whole, and a window across two web pages teaches nothing.
    texts = source.texts
    documents = (_long_document(texts, source.name, tokenizer, sequence_length, generator) for _ in range(samples))
    return [_piece(tokens, sequence_length, generator) for tokens in documents]


def _single_documents(
    source: TextSource, tokenizer: Any, samples: int, sequence_length: int, generator: torch.Generator
) -> list[torch.Tensor]:
    documents = itertools.islice(_in_turns(source, tokenizer, generator), samples)
    return [_piece(tokens, sequence_length, generator) for tokens in documents]


_DRAWS = {
    "auto": _windows_of_stream,
    "join": _windows_of_stream,
    "within": _windows_within_documents,
    "single": _single_documents,
}


def _piece(tokens: torch.Tensor, sequence_length: int, generator: torch.Generator) -> torch.Tensor:
    """A document [tokens], or of a longer one a piece of this length from anywhere."""
    positions = max(1, len(tokens) - sequence_length + 1)
    start = int(torch.randint(positions, (), generator=generator))
    return tokens[start : start + sequence_length]


def _in_turns(source: TextSource, tokenizer: Any, generator: torch.Generator, least: int = 1) -> Iterator[torch.Tensor]:
    """The documents [tokens] in a random order, then in another, without end; at least so many tokens in a round."""
    texts = source.texts
    while True:
        found = 0
        for index in torch.randperm(len(texts), generator=generator).tolist():
            tokens = encode(texts[index], tokenizer)
            found += len(tokens)
            if len(tokens):
                yield tokens
        if found < least:
            raise _too_short(source, least, found)


def _too_short(source: TextSource, expected: int, found: int) -> SparseGPTError:
    return SparseGPTError(
        f"{source.name}: expected at least {expected} tokens for one calibration window, found {found}; give more text "
        "or lower the sequence length",
        settings=("sequence_length",),
    )


def _long_document(
    texts: Sequence[str], name: str, tokenizer: Any, sequence_length: int, generator: torch.Generator
) -> torch.Tensor:
    longest = 0
    for _ in range(DRAWS_WITHOUT_A_FIT):
        drawn = int(torch.randint(len(texts), (), generator=generator))
        tokens = encode(texts[drawn], tokenizer)
        if len(tokens) >= sequence_length:
            return tokens
        longest = max(longest, len(tokens))
    raise SparseGPTError(
        f"{name}: expected a document of {sequence_length} tokens, found none longer than {longest} "
        f"in {DRAWS_WITHOUT_A_FIT} draws; lower the sequence length",
        settings=("sequence_length",),
    )
