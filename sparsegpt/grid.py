"""Which integers kept weights may be rounded to: parsed once at the edge, carried as a type inside."""

import re
from dataclasses import dataclass

from sparsegpt.errors import SparseGPTError
from sparsegpt.sparsity import NM, Sparsity

EXPECTED = "expected int2 to int8, or uint2 to uint8 with zero points, such as int4, int4:32 (groups) or int8:row"
GROUP_SIZE = 128


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits, a scale for `group_size` inputs of a row (None: for the row).

    symmetric: about 0; otherwise every group has a zero point. The last group of a row may be shorter.
    Raises SparseGPTError for bits outside 2 to 8 and group sizes below 2.
    """

    bits: int
    group_size: int | None = GROUP_SIZE
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SparseGPTError(f"integers of {self.bits} bits: {EXPECTED}", settings=("quantize",))
        if self.group_size is not None and self.group_size < 2:
            raise SparseGPTError(
                f"a group of {self.group_size} weights has a scale for itself: give 2 or more", settings=("quantize",)
            )

    def __str__(self) -> str:
        group = "row" if self.group_size is None else self.group_size
        return f"{'' if self.symmetric else 'u'}int{self.bits}:{group}"

    @property
    def most(self) -> int:
        """The largest d that a group may hold: with zero points, where its zero point is 0."""
        return (1 << self.bits - self.symmetric) - 1

    @property
    def least(self) -> int:
        """The least d that a group may hold: with zero points, where its zero point is the largest."""
        return -self.most - (self.symmetric and self.bits < 8)

    def width(self, in_features: int) -> int:
        """Inputs of a group in a row of so many."""
        return in_features if self.group_size is None else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """Scales of a row of so many inputs."""
        return -(-in_features // self.width(in_features))

    def bits_per_weight(self, in_features: int, kept: float = 1.0) -> float:
        """Bits of a weight: its integer, and its share of a scale of 16 bits and of a zero point.

        kept: the share of integers that are stored, each with what says where it belongs: one bit a weight.
        """
        each = 16 if self.symmetric else 16 + self.bits
        where = 1 if kept < 1 else 0
        return self.bits * kept + where + each * self.groups(in_features) / in_features

    def check(self, sparsity: Sparsity) -> None:
        """Raises SparseGPTError where a group of weights would cut a group of n:m."""
        if isinstance(sparsity, NM) and self.group_size is not None and self.group_size % sparsity.m:
            raise SparseGPTError(
                f"groups of {self.group_size} weights under one scale cut groups of {sparsity}: give a multiple of "
                f"{sparsity.m}",
                settings=("quantize", "sparsity"),
            )


def parse_grid(value: "str | Grid | None") -> Grid | None:
    """Turn "int4", "int4:32", "int8:row", "uint4:64" or a Grid into a Grid; "none" or None into None.

    Raises SparseGPTError when the text has none of these forms or its numbers are out of range.
    """
    if value is None or isinstance(value, Grid):
        return value
    text = str(value).strip().lower()
    if text == "none":
        return None
    found = re.fullmatch(r"(u?)int(\d{1,2})(?::(\d{1,6}|row))?", text)
    if found is None:
        raise SparseGPTError(f"quantize {value!r} is not understood: {EXPECTED}, or none", settings=("quantize",))
    group = None if found[3] == "row" else int(found[3] or GROUP_SIZE)
    return Grid(int(found[2]), group, symmetric=not found[1])
