"""Text to token windows: a seeded draw for calibration, one long stream for evaluation."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from sparsegpt.errors import SparseGPTError, unknown

from .sources import TextSource

BOS_CHOICES = ("auto", "always", "never")
# Families trained with a beginning-of-sequence token in every window, and lost without it.
BOS_IN_EVERY_WINDOW = ("gemma",)
DRAWS_WITHOUT_A_FIT = 10_000  # documents in a row too short for a window; more draws would not help


@dataclass(frozen=True)
class Calibration:
    """Calibration windows, LongTensor [samples, sequence_length], and what a report needs to name them."""

    windows: torch.Tensor
    source: str
    seed: int
    token_hash: str  # SHA-256, hexadecimal, of the windows as little-endian int64, row by row
    bos: int | None = None  # the beginning-of-sequence token that every window begins with

    def describe(self) -> dict[str, object]:
        """The entry "calibration" of report.json."""
        samples, sequence_length = self.windows.shape
        return {
            "source": self.source,
            "samples": samples,
            "sequence_length": sequence_length,
            "seed": self.seed,
            "token_hash": self.token_hash,
            "bos": self.bos,
        }


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


def draw_windows(
    source: TextSource, tokenizer: Any, samples: int, sequence_length: int, seed: int, bos: int | None = None
) -> Calibration:
    """Windows [samples, sequence_length] of tokens, the same ones for the same text, tokenizer and seed.

    Every start position of the token stream is equally likely and windows may overlap. Where `source` keeps windows
    within documents (c4), a document is drawn first, again and again until one is long enough, then a position in it.
    bos: the token that every window begins with, one of its `sequence_length` tokens; no other special token is added.
    Raises `SparseGPTError` where the text is too short.
    """
    text_length = sequence_length if bos is None else sequence_length - 1
    if samples < 1 or text_length < 1:
        raise SparseGPTError(
            f"expected at least 1 calibration window of at least 1 token, found {samples} of {sequence_length}; "
            "raise the samples or the sequence length",
            settings=("samples", "sequence_length"),
        )
    generator = torch.Generator().manual_seed(seed)
    draw = _windows_within_documents if source.windows_within_documents else _windows_of_stream
    windows = draw(source, tokenizer, samples, text_length, generator)
    if bos is not None:
        windows = torch.cat([windows.new_full((samples, 1), bos), windows], dim=1)
    return Calibration(windows, source.name, seed, hash_tokens(windows), bos)


def evaluation_tokens(source: TextSource, tokenizer: Any) -> tuple[torch.Tensor, int]:
    """All tokens of the text, LongTensor [tokens] without special tokens, and the length of the text in UTF-8 bytes."""
    return encode(source.text, tokenizer), len(source.text.encode())


def encode(text: str, tokenizer: Any) -> torch.Tensor:
    """Token ids of one text, LongTensor [tokens], without special tokens."""
    # verbose=False: a text longer than the model's context is what is wanted here, not worth a warning
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def hash_tokens(windows: torch.Tensor) -> str:
    """[samples, sequence_length] -> SHA-256, hexadecimal, of the tokens as little-endian int64."""
    return hashlib.sha256(windows.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def _windows_of_stream(
    source: TextSource, tokenizer: Any, samples: int, sequence_length: int, generator: torch.Generator
) -> torch.Tensor:
    tokens = encode(source.text, tokenizer)
    positions = len(tokens) - sequence_length + 1
    if positions < 1:
        raise SparseGPTError(
            f"{source.name}: expected at least {sequence_length} tokens for one calibration window, "
            f"found {len(tokens)}; give more text or lower the sequence length",
            settings=("sequence_length",),
        )
    starts = torch.randint(positions, (samples, 1), generator=generator)
    return tokens[starts + torch.arange(sequence_length)]


def _windows_within_documents(
    source: TextSource, tokenizer: Any, samples: int, sequence_length: int, generator: torch.Generator
) -> torch.Tensor:
    # As published for c4: its shard is too big to tokenize whole, and a window across two web pages teaches nothing.
    windows = []
    for _ in range(samples):
        tokens = _long_document(source, tokenizer, sequence_length, generator)
        start = int(torch.randint(len(tokens) - sequence_length + 1, (), generator=generator))
        windows.append(tokens[start : start + sequence_length])
    return torch.stack(windows)


def _long_document(
    source: TextSource, tokenizer: Any, sequence_length: int, generator: torch.Generator
) -> torch.Tensor:
    longest = 0
    for _ in range(DRAWS_WITHOUT_A_FIT):
        drawn = int(torch.randint(len(source.documents), (), generator=generator))
        tokens = encode(source.documents[drawn], tokenizer)
        if len(tokens) >= sequence_length:
            return tokens
        longest = max(longest, len(tokens))
    raise SparseGPTError(
        f"{source.name}: expected a document of {sequence_length} tokens, found none longer than {longest} "
        f"in {DRAWS_WITHOUT_A_FIT} draws; lower the sequence length",
        settings=("sequence_length",),
    )
