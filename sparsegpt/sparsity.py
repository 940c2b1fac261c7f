"""Sparsity patterns as values: parsed once at the edge, carried as types inside."""

import re
from dataclasses import dataclass

from sparsegpt.errors import SparseGPTError

EXPECTED = 'expected "n:m" such as 2:4 (keep 2 of every 4), a fraction of zeros such as 0.5 or 50%, or 50%/row'


@dataclass(frozen=True)
class Unstructured:
    """A `fraction` of all weights is zero, anywhere in the layer or the same number in every row.

    Raises SparseGPTError unless 0 <= fraction < 1.
    """

    fraction: float
    per_row: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise SparseGPTError(f"sparsity {self.fraction:g} is out of range: a fraction of zeros lies in [0, 1)")

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
    if pattern := re.fullmatch(r"(\d{1,6}):(\d{1,6})", text):
        return NM(int(pattern[1]), int(pattern[2]))
    if fraction := re.fullmatch(r"(-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(%?)(/row)?", text):
        return Unstructured(float(fraction[1]) / (100 if fraction[2] else 1), per_row=bool(fraction[3]))
    raise SparseGPTError(f"sparsity {text!r} is not understood: {EXPECTED}")
