"""A bitmask with int8 or int4 values and one scale for each group of dense columns (symmetric rounding).

    value = q * scale,  q an integer from -8 to 7 or from -127 to 127
    integers [ceil((V + 32) bits / 8)] uint8   kept integers in two's complement, row by row, of two in a byte the low
                                               bits first; 32 zeros follow
    scales   [N, ceil(Kp / group_size)]        float16, one for `group_size` columns of the weight
    mask, offsets                              as in bitmask.py; offsets count integers

A group of scales is a range of columns, not of kept values: the grid of a solver that goes along the columns fits, for
any mask. With int4 and groups of 128 a weight takes 4 d + 1 + 1/8 bits at a density d. `quantize_bitmask` rounds to
nearest; `pack_integers` takes the integers and scales that a solver has chosen, as they are.
Dimension key: N out_features, K in_features, Kp padded, S scale groups, V kept weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.bitmask import (
    DEMAND,
    PATTERN,
    TAIL,
    BitmaskValues,
    check_count,
    check_mask,
    check_mask_shapes,
    check_zeros,
    is_sparse,
    mask_shape,
    mask_to_words,
    offsets_of,
    row_starts,
    settled_offsets,
    words_to_mask,
)
from sparsegpt.kernels.format.integers import (
    IntegerForm,
    check_scales,
    check_settings,
    exact_scales,
    group_scales,
    largest_integer,
    on_grid,
    scales_of_bits,
    whole_integers,
)
from sparsegpt.kernels.format.pack import chunks, pad_columns, padded_columns, select


@dataclass(frozen=True, eq=False)
class QuantizedBitmask:
    """A weight [N, K] in packed form with integer values.

    integers, scales, mask, offsets: as in the module's key, on one device. shape: the dense (N, K). dtype: of the
    numbers that the integers stand for, and of the inputs that they are multiplied with.

    Raises SparseGPTError when they do not belong together.
    """

    integers: Tensor
    scales: Tensor
    mask: Tensor
    offsets: Tensor
    shape: tuple[int, int]
    bits: int
    group_size: int
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group_size)
        check_mask_shapes(self.mask, self.offsets, self.shape)
        expected = scales_shape(self.shape, self.group_size)
        flat = self.integers.ndim == 1 and self.room >= TAIL and self.integers.dtype == torch.uint8
        if not flat or tuple(self.scales.shape) != expected or self.scales.dtype != torch.float16:
            raise SparseGPTError(
                f"int{self.bits} bitmask weight of shape {self.shape} needs integers [{TAIL * self.bits // 8} or more] "
                f"in uint8 and scales {expected} in float16; found {list(self.integers.shape)} {self.integers.dtype} "
                f"and {tuple(self.scales.shape)} {self.scales.dtype}"
            )

    @property
    def room(self) -> int:
        """How many integers there are, those after the last kept one counted."""
        return self.integers.shape[0] * 8 // self.bits

    @property
    def device(self) -> torch.device:
        """Of its tensors."""
        return self.integers.device

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors together."""
        return self.integers.nbytes + self.scales.nbytes + self.mask.nbytes + self.offsets.nbytes

    def settled(self) -> QuantizedBitmask:
        """[N, K] -> the same weight as kernels take it: contiguous, an offset for each row, and these right.

        Raises SparseGPTError where offsets and integers are not those of the mask.
        """
        offsets = settled_offsets(self.mask, self.offsets, self.room)
        integers, scales, mask = self.integers.contiguous(), self.scales.contiguous(), self.mask.contiguous()
        return replace(self, integers=integers, scales=scales, mask=mask, offsets=offsets)

    def rows(self, part: slice) -> QuantizedBitmask:
        """Rows of a settled weight [N, K] -> [n, K], on the same memory; `part` has a start, a stop and no step."""
        if part == slice(0, self.shape[0]):
            return self
        offsets, shape = self.offsets[part.start : part.stop + 1], (part.stop - part.start, self.shape[1])
        return replace(self, scales=self.scales[part], mask=self.mask[part], offsets=offsets, shape=shape)


def scales_shape(shape: tuple[int, int], group_size: int) -> tuple[int, int]:
    """The shape of the scales for a dense (N, K)."""
    return shape[0], -(-padded_columns(shape[1]) // group_size)


def quantize_bitmask(weight: Tensor, bits: int, group_size: int = 128) -> QuantizedBitmask:
    """[N, K] of any pattern -> packed, its non-zeros in `bits` (8 or 4) bits by rounding to nearest.

    Raises SparseGPTError for other bits, a group_size that is not a multiple of 32, or weights whose scale is not a
    finite float16.
    """
    check_settings(bits, group_size)
    shape = (weight.shape[0], weight.shape[1])
    scales_NS = torch.zeros(scales_shape(shape, group_size), dtype=torch.float16, device=weight.device)
    integers_NK = torch.empty(shape, dtype=torch.int8, device=weight.device)
    for rows in chunks(shape):
        values_NK = pad_columns(weight[rows]).float()
        scales_NS[rows] = group_scales(_groups(values_NK, group_size), bits)
        most, divisor_NK = largest_integer(bits), _by_column(scales_NS[rows], group_size, shape[1])
        integers_NK[rows] = (values_NK[:, : shape[1]] / divisor_NK).round().clamp(-most, most).to(torch.int8)
    return pack_integers(integers_NK, scales_NS, bits, group_size, kept=weight != 0, dtype=weight.dtype)


def pack_integers(
    integers: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int = 128,
    *,
    kept: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> QuantizedBitmask:
    """Integers [N, K] and scales [N, ceil(Kp / group_size)] that somebody has chosen -> packed, nothing rounded again.

    Args:
        integers: of any integer or floating-point dtype, whole numbers from -8 to 7 or from -127 to 127.
        scales: finite; float16, or exactly representable in it.
        kept: [N, K] bool, which weights are in the mask; those whose integer is not 0 by default.
        dtype: of the weights that integers and scales stand for.

    Raises:
        SparseGPTError: integers out of range or not whole, scales that are no such numbers, shapes that do not fit, an
            integer other than 0 where `kept` says that there is none.
    """
    check_settings(bits, group_size)
    shape = (integers.shape[0], integers.shape[1])
    mask_NW = torch.zeros(mask_shape(shape), dtype=torch.int32, device=integers.device)
    found = [torch.empty(0, dtype=torch.int8, device=integers.device)]
    for rows in chunks(shape):
        integers_NK = whole_integers(integers[rows], bits)
        mask_NK = integers_NK != 0 if kept is None else kept[rows]
        if bool(integers_NK.masked_fill(mask_NK, 0).any()):
            raise SparseGPTError("an integer that is not kept is not 0: expected zeros wherever `kept` is False")
        mask_NK = pad_columns(mask_NK)
        mask_NW[rows] = mask_to_words(mask_NK)
        found.append(select(pad_columns(integers_NK), mask_NK))
    stream = _to_stream(torch.cat([*found, found[0].new_zeros(TAIL)]), bits)
    packed = QuantizedBitmask(
        stream, exact_scales(scales), mask_NW, offsets_of(mask_NW), shape, bits, group_size, dtype
    )
    check_scales(packed.scales)
    return packed


def dequantize_bitmask(packed: QuantizedBitmask) -> Tensor:
    """Packed -> dense [N, K], q * scale in its dtype (rounded once, from float32): the torch twin of the kernels."""
    dense = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    for rows, integers_NK in _dense_integers(packed):
        scales_NK = _by_column(packed.scales[rows], packed.group_size, packed.shape[1])
        dense[rows] = integers_NK[:, : packed.shape[1]].float() * scales_NK
    return dense


def _dense_integers(packed: QuantizedBitmask) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time: which, and their integers [n, Kp] int8."""
    starts = row_starts(packed.offsets, packed.shape[0])
    for rows in chunks(packed.shape):
        mask_NK = words_to_mask(packed.mask[rows])
        kept = _from_stream(packed.integers, packed.bits, int(starts[rows.start]), int(starts[rows.stop]))
        yield rows, kept.new_zeros(mask_NK.shape).masked_scatter_(mask_NK, kept)


@dataclass(frozen=True)
class BitmaskIntegers(IntegerForm):
    """A bitmask with integers of `bits`, one scale for `group_size` columns; `dtype` is what the weights were.

    Raises SparseGPTError for other bits than 8 and 4, and a group_size that is no multiple of 32.
    """

    pattern: ClassVar[str] = PATTERN
    demand: ClassVar[str] = DEMAND
    parts: ClassVar[tuple[str, ...]] = ("integers", "scales", "mask", "offsets")

    def promised(self, sparsity: str) -> bool:
        """Any pattern with zeros enough."""
        return is_sparse(sparsity)

    def keeps(self, weight: Tensor) -> bool:
        """[N, K] -> whether it has zeros enough."""
        return BitmaskValues().keeps(weight)

    def pack(self, weight: Tensor, name: str) -> QuantizedBitmask:
        """[N, K] -> packed: to the bit where a solver has put the weight on such a grid, else rounded to nearest.

        Raises SparseGPTError for too few zeros, and as `quantize_bitmask`.
        """
        check_zeros(weight, name)
        if (found := on_grid(weight, self.bits, self.group_size)) is not None:
            return pack_integers(*found, self.bits, self.group_size, kept=weight != 0, dtype=weight.dtype)
        return quantize_bitmask(weight, self.bits, self.group_size)

    def unpack(self, packed: QuantizedBitmask) -> Tensor:
        """Packed -> [N, K], q * scale in the packed weight's dtype."""
        return dequantize_bitmask(packed)

    def tensors(self, packed: QuantizedBitmask) -> tuple[Tensor, ...]:
        """Packed [N, K] -> integers, scales as bit patterns in int16 (no cast may change them), mask and offsets."""
        return packed.integers, packed.scales.view(torch.int16), packed.mask, packed.offsets

    def packed(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> QuantizedBitmask:
        """Integers, scales in int16, mask and offsets -> packed [N, K]. Raises SparseGPTError where they do not fit."""
        integers, scales, mask, offsets = tensors
        settings = (self.bits, self.group_size, self.dtype)
        return QuantizedBitmask(integers, scales_of_bits(scales), mask, offsets, shape, *settings)

    def check(self, packed: QuantizedBitmask) -> None:
        """Packed [N, K]. Raises SparseGPTError for a mask, offsets, scales or integers that no packer writes.

        Offsets and integers are those of the mask; scales are finite, no integer is -128.
        """
        check_mask(packed.mask, packed.offsets, packed.shape)
        integers = _from_stream(packed.integers, packed.bits, 0, packed.room)
        check_count(packed.mask, packed.room, integers[-TAIL:], spare=8 // packed.bits - 1)
        check_scales(packed.scales)
        if packed.bits == 8 and bool((integers == -128).any()):
            raise SparseGPTError("an integer of 8 bits is -128: expected -127 to 127")

    def stored(self, packed: QuantizedBitmask) -> str:
        """Packed [N, K] -> that it is a bitmask, its bits and group size."""
        return f"{PATTERN} {self}"


# ---------------------------------------------------------------- integers


def _to_stream(integers: Tensor, bits: int) -> Tensor:
    """[V] int8 -> bytes uint8."""
    if bits == 8:
        return integers.view(torch.uint8)
    pairs = functional.pad(integers, (0, len(integers) % 2)).view(torch.uint8).view(-1, 2)
    stream: Tensor = pairs[:, 0] & 15 | pairs[:, 1] << 4
    return stream


def _from_stream(stream: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """Bytes uint8 -> the integers of range(start, stop), int8."""
    if bits == 8:
        return stream[start:stop].view(torch.int8)
    pairs = stream[start // 2 : (stop + 1) // 2].view(torch.int8)
    both: Tensor = torch.stack((pairs << 4 >> 4, pairs >> 4), dim=-1).flatten()  # >> of int8 keeps the sign
    kept: Tensor = both[start % 2 : start % 2 + stop - start]
    return kept


def _groups(values_NK: Tensor, group_size: int) -> Tensor:
    """[n, Kp] -> [n, S, group_size], zeros after the last column."""
    missing = -values_NK.shape[1] % group_size
    return functional.pad(values_NK, (0, missing)).view(len(values_NK), -1, group_size)


def _by_column(scales_NS: Tensor, group_size: int, columns: int) -> Tensor:
    """Scales [n, S] -> [n, K] float32, that of each column."""
    return scales_NS.float().repeat_interleave(group_size, dim=1)[:, :columns]
