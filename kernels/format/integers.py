"""What packed integers share, whatever mask they stand under: grids, scales, settings, and the form's part of it.

    value = q * scale,  q an integer from -8 to 7 or from -127 to 127, one float16 scale for `group_size` columns

Scales have either sign: the end of four bits that reaches further is where a solver wants it.

Dimension key: N out_features, K in_features, Kp padded, S scale groups, V values of a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError
from sparsegpt.grid import Grid
from sparsegpt.kernels.format.form import Form
from sparsegpt.kernels.format.pack import DTYPES, WORD_COLUMNS, padded_columns
from sparsegpt.quantization import recover

# Of a weight, before all of it is tried.
ROWS_TRIED = 4
_INFINITY = 0x7C00  # the bits of float16's infinity; from there on to 0x7FFF it is NaN
_MAGNITUDE = 0x7FFF  # all but the sign


@dataclass(frozen=True)
class IntegerForm(Form):
    """A form of integers of `bits`, one scale for `group_size` columns; `dtype` is what the weights were.

    Raises SparseGPTError for other bits than 8 and 4, and a group_size that is no multiple of 32.
    """

    bits: int
    group_size: int = 128
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group_size)

    def __str__(self) -> str:
        return f"int{self.bits}, groups of {self.group_size}"

    @property
    def rounding(self) -> str:
        """To which integers; a weight that is on such a grid already keeps every bit."""
        return f"values rounded to {self}, where they were not"

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Self | None:
        """The pattern with `values`, a mapping to bits, group_size and dtype.

        Raises SparseGPTError for other content.
        """
        found = read_integers(settings, cls.pattern)
        return None if found is None else cls(*found)

    def settings(self) -> dict[str, Any]:
        """The pattern, and `values` as `read` takes them."""
        return integer_settings(self.pattern, self.bits, self.group_size, self.dtype)

    @classmethod
    def samples(cls) -> Sequence[Form]:
        """int8 and int4."""
        return cls(8), cls(4)

    def of_model(self, dtype: torch.dtype) -> Form:
        """The integers stand for numbers of this dtype."""
        return replace(self, dtype=dtype)


def on_grid(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor] | None:
    """[N, K] -> integers [N, K] and scales [N, ceil(Kp / group_size)] that give the weight's very bits; None for none.

    So a weight that a solver has rounded is packed as it was scored. A few rows tell first whether there is a grid.
    """
    grid = Grid(bits, group_size)
    try:
        recover(weight[:ROWS_TRIED], grid)
        found = recover(weight, grid)
    except SparseGPTError:
        return None
    groups = -(-padded_columns(weight.shape[1]) // group_size)
    scales = found.scales.scale
    return found.steps, functional.pad(scales, (0, groups - scales.shape[1])).to(torch.float16)


def largest_integer(bits: int) -> int:
    """The largest integer of so many bits."""
    return int(2 ** (bits - 1) - 1)


def least_integer(bits: int) -> int:
    """The least integer of so many bits: of eight its negative is one too."""
    return -largest_integer(bits) - (bits < 8)


def group_scales(values_NSV: Tensor, bits: int) -> Tensor:
    """Values [N, S, V] of groups -> their scales [N, S] float16, so that the largest becomes the largest integer.

    Raises SparseGPTError for values whose scale is not a finite float16.
    """
    # 2^-24 is the smallest float16: an all-zero group divides by it and gives zeros
    scales_NS = (values_NSV.abs().amax(-1) / largest_integer(bits)).clamp_min(2.0**-24).half()
    if not bool(scales_NS.isfinite().all()):
        raise SparseGPTError(
            f"int{bits}: a group's scale is not a finite float16; the weight holds inf, NaN or > 65504"
        )
    return scales_NS


def whole_integers(integers: Tensor, bits: int) -> Tensor:
    """[N, K] whole numbers of `bits` -> int8. Raises SparseGPTError for others."""
    small, least, most = integers.to(torch.int8), least_integer(bits), largest_integer(bits)
    if bool((small != integers).any()) or bool(((small < least) | (small > most)).any()):
        raise SparseGPTError(f"int{bits}: expected whole numbers from {least} to {most}")
    return small


def exact_scales(scales: Tensor) -> Tensor:
    """[N, S] -> float16. Raises SparseGPTError where that changes a scale."""
    small = scales.half()
    if bool((small.to(scales.dtype) != scales).any()):
        raise SparseGPTError("scales are stored in float16: choose them among its numbers before rounding the weights")
    return small


def check_scales(scales: Tensor) -> None:
    """[N, S] float16. Raises SparseGPTError unless all are finite."""
    if bool(((scales.view(torch.int16) & _MAGNITUDE) >= _INFINITY).any()):
        raise SparseGPTError("a scale is infinite or NaN: expected finite float16 numbers")


def integer_settings(pattern: str, bits: int, group_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of integers under a pattern."""
    name = str(dtype).removeprefix("torch.")
    return {"pattern": pattern, "values": {"bits": bits, "group_size": group_size, "dtype": name}}


def read_integers(settings: Mapping[str, Any], pattern: str) -> tuple[int, int, torch.dtype] | None:
    """(bits, group_size, dtype) that `integer_settings` wrote for a pattern; None for others, or without values.

    Raises SparseGPTError for content that is not known here.
    """
    values = settings.get("values")
    if settings.get("pattern") != pattern or values is None:
        return None
    try:
        dtype, bits, group_size = getattr(torch, values["dtype"]), values["bits"], values["group_size"]
        if dtype not in DTYPES or not all(type(number) is int for number in (bits, group_size)):
            raise ValueError(f"{dtype}, {bits}, {group_size}")
        check_settings(bits, group_size)
    except (KeyError, TypeError, ValueError, AttributeError, SparseGPTError) as error:
        raise SparseGPTError(f"values {str(values)[:200]} are not known here: update sparsegpt") from error
    return bits, group_size, dtype


def check_settings(bits: int, group_size: int) -> None:
    """Raises SparseGPTError for bits other than 8 and 4, and a group_size that is no multiple of 32."""
    if bits not in (4, 8):
        raise SparseGPTError(f"quantised values have 4 or 8 bits; found {bits}")
    if group_size < WORD_COLUMNS or group_size % WORD_COLUMNS:
        raise SparseGPTError(f"a scale group covers a multiple of {WORD_COLUMNS} columns; found {group_size}")


def scales_of_bits(stored: Tensor) -> Tensor:
    """[N, S] int16, as files hold scales (no cast of a model may change them) -> float16, on the same memory.

    Raises SparseGPTError for another dtype.
    """
    if stored.dtype != torch.int16:
        raise SparseGPTError(f"scales are stored as torch.int16, the bits of float16; found {stored.dtype}")
    return stored.view(torch.float16)
