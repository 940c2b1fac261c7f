"""Sparsity patterns as values: parsed once at the edge, carried as types inside."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sparsegpt.errors import SparseGPTError

EXPECTED = 'expected "n:m" such as 2:4 (keep 2 of every 4), a fraction of zeros such as 0.5 or 50%, or 50%/row'
SHARES = "expected a share of zeros from 0 to below 1, or below 100%, such as 0.5 or 50%"
# Columns that share one threshold when sparsegpt prunes a fraction: the published number.
BLOCK_SIZE = 128


@dataclass(frozen=True)
class Unstructured:
    """A `fraction` of all weights is zero, anywhere in the layer or the same number in every row.

    Raises SparseGPTError unless 0 <= fraction < 1.
    """

    fraction: float
    per_row: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise SparseGPTError(f"sparsity {self.fraction:g} is out of range: {SHARES}")

    def __str__(self) -> str:
        text = repr(float(self.fraction))
        return f"{text}/row" if self.per_row else text

    @property
    def zeros(self) -> float:
        """Fraction of weights that become zero."""
        return self.fraction

    def check(self, in_features: int, name: str) -> None:
        """Every width can be pruned without structure."""


@dataclass(frozen=True)
class NM:
    """At most `n` of every `m` consecutive inputs are non-zero. Raises SparseGPTError unless 0 < n < m."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise SparseGPTError(
                f"sparsity {self.n}:{self.m} keeps {self.n} of every {self.m} weights: n:m needs 0 < n < m, as in 2:4"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def zeros(self) -> float:
        """Fraction of weights that become zero."""
        return 1 - self.n / self.m

    def check(self, in_features: int, name: str) -> None:
        """Raises SparseGPTError, naming the layer, unless groups of m tile its inputs."""
        if in_features % self.m:
            raise SparseGPTError(
                f"{name}: {in_features} input features do not divide into groups of {self.m}; "
                f"choose another pattern than {self} or leave this layer out of what is pruned",
                settings=("sparsity", "skip"),
            )


Sparsity = Unstructured | NM


def parse_sparsity(value: "str | float | Sparsity") -> Sparsity:
    """Turn "2:4", "0.5", "50%", "50%/row", 0.5 or a pattern object into a pattern object.

    Raises SparseGPTError when the text has none of these forms or its numbers are out of range.
    """
    if isinstance(value, Unstructured | NM):
        return value
    text = str(value).strip()
    try:
        return _parse(text)
    except SparseGPTError as error:
        meant = " or ".join(filter(_is_sparsity, _readings(text)))
        question = f"; did you mean {meant}?" if meant else ""
        raise SparseGPTError(f"{error}{question}") from None


def doubtful(text: str) -> str | None:
    """What to tell somebody who asks for less than 1% of zeros by a percentage, such as 0.5%; None for others."""
    share = _parse(text.strip()).zeros
    if not 0 < share < 0.01 or "%" not in text:
        return None
    return f"sparsity {text} leaves {1 - share:.4g} of the weights: if a fraction was meant, leave out the percent sign"


def check_block_size(block_size: int, pattern: Sparsity) -> None:
    """Raises SparseGPTError unless blocks hold whole groups; the default is fine with every pattern, n:m ignores it."""
    splits_groups = isinstance(pattern, NM) and block_size % pattern.m and block_size != BLOCK_SIZE
    if block_size < 1:
        raise SparseGPTError(f"block size {block_size} must be positive")
    if splits_groups:
        raise SparseGPTError(f"block size {block_size} must be a multiple of the group of {pattern}")


def _parse(text: str) -> Sparsity:
    if pattern := re.fullmatch(r"(\d{1,6}):(\d{1,6})", text):
        return NM(int(pattern[1]), int(pattern[2]))
    if fraction := re.fullmatch(r"(-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(%?)(/row)?", text):
        share = float(fraction[1]) / (100 if fraction[2] else 1)
        if not 0 <= share < 1:
            raise SparseGPTError(f"sparsity {text} is out of range: {SHARES}")
        return Unstructured(share, per_row=bool(fraction[3]))
    raise SparseGPTError(f"sparsity {text!r} is not understood: {EXPECTED}")


def _readings(text: str) -> Iterator[str]:
    """What somebody may have meant who wrote 4:2, 2/4, 2 of 4, 2.4, 50, 50 %, 50pct or 0,5."""
    if pair := re.fullmatch(r"(\d{1,6})\s*(?:[:/_-]|x|of|out of)\s*(\d{1,6})|(\d+)\.(4|8|16|32)", text):
        yield ":".join(sorted(filter(None, pair.groups()), key=int))
    if share := re.fullmatch(r"(\d{1,6}(?:[.,]\d{1,6})?)\s*(%|pct|percent|)\s*((?:/|per|-per-)\s*row)?", text):
        number, row = share[1].replace(",", "."), "/row" if share[3] else ""
        if float(number) != 1 or share[2]:
            yield f"{number}{row}" if float(number) < 1 and not share[2] else f"{number}%{row}"


def _is_sparsity(text: str) -> bool:
    try:
        return _parse(text).zeros > 0
    except SparseGPTError:
        return False
