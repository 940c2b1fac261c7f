"""Packed 2:4 with int8 or int4 values and one scale for each group of dense columns (storage; symmetric rounding).

    value = q * scale,  q an integer from -8 to 7 or from -127 to 127
    words  [N, Kp / 2 * bits / 32] int32   32 / bits kept values each, lowest bits first, in the order of the values
    scales [N, ceil(Kp / group_size)]      float16, one for `group_size` dense columns (group_size / 2 kept values)
    meta   [N, Kp / 32] int32              as in the packed format

With int4 and groups of 128 a 16-bit weight takes 2 + 1 + 1/8 bits. Rounding to nearest is the
storage's own; a solver that chooses q to fit the activations writes the same fields.
Dimension key: N out_features, Kp padded in_features, S scale groups, V kept values of a scale group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError
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
from sparsegpt.kernels.format.pack import (
    PATTERN,
    WORD_COLUMNS,
    FloatValues,
    Packed24,
    check_padding,
    check_positions,
    pack,
    packed_shapes,
    unpack,
)


@dataclass(frozen=True, eq=False)
class Quantized24:
    """A 2:4 weight [N, K] with integer values.

    words, scales, meta: as in the module's key. shape: the dense (N, K). dtype: of the numbers that the integers stand
    for, and of the inputs that they are multiplied with.

    Raises SparseGPTError when they do not belong together.
    """

    words: Tensor
    scales: Tensor
    meta: Tensor
    shape: tuple[int, int]
    bits: int
    group_size: int
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        (rows, kept), meta_shape = packed_shapes(self.shape)
        check_settings(self.bits, self.group_size)
        expected = ((rows, kept * self.bits // 32), (rows, -(-2 * kept // self.group_size)), meta_shape)
        found = (tuple(self.words.shape), tuple(self.scales.shape), tuple(self.meta.shape))
        dtypes = (self.words.dtype, self.scales.dtype, self.meta.dtype)
        if found != expected or dtypes != (torch.int32, torch.float16, torch.int32):
            raise SparseGPTError(
                f"int{self.bits} 2:4 weight of shape {self.shape} needs words, scales, meta {expected} in int32, "
                f"float16, int32; found {found} in {', '.join(map(str, dtypes))}"
            )

    @property
    def device(self) -> torch.device:
        """Of words, scales and metadata."""
        return self.words.device

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales and metadata together."""
        return self.words.nbytes + self.scales.nbytes + self.meta.nbytes

    def settled(self) -> Quantized24:
        """[N, K] -> the same weight as kernels take it: its tensors contiguous, themselves where they are."""
        words, scales, meta = self.words.contiguous(), self.scales.contiguous(), self.meta.contiguous()
        return replace(self, words=words, scales=scales, meta=meta)

    def rows(self, part: slice) -> Quantized24:
        """Rows of the weight [N, K] -> [n, K], on the same memory; `part` has a start, a stop and no step."""
        if part == slice(0, self.shape[0]):
            return self
        shape = (part.stop - part.start, self.shape[1])
        return replace(self, words=self.words[part], scales=self.scales[part], meta=self.meta[part], shape=shape)


def quantize(packed: Packed24, bits: int, group_size: int = 128) -> Quantized24:
    """[N, K] packed -> the kept values in `bits` (8 or 4) bits, a float16 scale for each `group_size` dense columns.

    Raises SparseGPTError for other bits, a group_size that is not a multiple of 32, or weights whose scale is not a
    finite float16.
    """
    check_settings(bits, group_size)
    values_NSV, largest = _scale_groups(packed.values.float(), group_size), largest_integer(bits)
    scales_NS = group_scales(values_NSV, bits)
    q_NSV = (values_NSV / scales_NS.float()[..., None]).round().clamp(-largest, largest).to(torch.int32)
    words = _pack_integers(q_NSV.flatten(1)[:, : packed.values.shape[1]], bits)
    return Quantized24(words, scales_NS, packed.meta, packed.shape, bits, group_size, packed.dtype)


def pack_integers24(
    integers: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int = 128,
    *,
    dtype: torch.dtype = torch.bfloat16,
    name: str = "weight",
) -> Quantized24:
    """Integers [N, K] and scales [N, ceil(Kp / group_size)] that somebody has chosen -> packed, nothing rounded again.

    Raises SparseGPTError as `pack` for integers that are not 2:4, for integers out of range or not whole, and for
    scales that are no finite float16 numbers, or do not fit.
    """
    check_settings(bits, group_size)
    packed = pack(whole_integers(integers, bits).float(), name)
    words = _pack_integers(packed.values.to(torch.int32), bits)
    small = Quantized24(words, exact_scales(scales), packed.meta, packed.shape, bits, group_size, dtype)
    check_scales(small.scales)
    return small


def dequantize(weight: Quantized24, dtype: torch.dtype) -> Packed24:
    """Integers [N, K] -> the packed weight q * scale in `dtype` (the product is rounded once, from float32)."""
    q_NSV = _scale_groups(unpack_integers(weight.words, weight.bits).float(), weight.group_size)
    values = (q_NSV * weight.scales.float()[..., None]).flatten(1)[:, : WORD_COLUMNS // 2 * weight.meta.shape[1]]
    return Packed24(values.to(dtype).contiguous(), weight.meta, weight.shape)


@dataclass(frozen=True)
class IntegerValues(IntegerForm):
    """2:4 with the kept values as integers of `bits`, one scale for `group_size` columns; `dtype` is what they were.

    Raises SparseGPTError for other bits than 8 and 4, and a group_size that is no multiple of 32.
    """

    pattern: ClassVar[str] = str(PATTERN)
    demand: ClassVar[str] = str(PATTERN)
    parts: ClassVar[tuple[str, ...]] = ("words", "scales", "meta")

    def promised(self, sparsity: str) -> bool:
        """2:4."""
        return sparsity == self.pattern

    def keeps(self, weight: Tensor) -> bool:
        """[N, K] -> whether it keeps 2:4."""
        return FloatValues().keeps(weight)

    def pack(self, weight: Tensor, name: str) -> Quantized24:
        """[N, K] -> packed: to the bit where a solver has put the weight on such a grid, else rounded to nearest.

        Raises as `pack` and `quantize`.
        """
        if (found := on_grid(weight, self.bits, self.group_size)) is not None:
            return pack_integers24(*found, self.bits, self.group_size, dtype=weight.dtype, name=name)
        return quantize(pack(weight, name), self.bits, self.group_size)

    def unpack(self, packed: Quantized24) -> Tensor:
        """Packed -> [N, K], q * scale in the packed weight's dtype."""
        return unpack(dequantize(packed, packed.dtype))

    def tensors(self, packed: Quantized24) -> tuple[Tensor, ...]:
        """Packed [N, K] -> words, scales as bit patterns in int16 (no cast of a model may change them), and meta."""
        return packed.words, packed.scales.view(torch.int16), packed.meta

    def packed(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Quantized24:
        """Words, scales in int16 and meta -> packed [N, K]. Raises SparseGPTError where they do not fit."""
        words, scales, meta = tensors
        return Quantized24(words, scales_of_bits(scales), meta, shape, self.bits, self.group_size, self.dtype)

    def check(self, packed: Quantized24) -> None:
        """Packed [N, K]. Raises SparseGPTError for metadata not of two positions, scales and integers out of range.

        Scales are finite, no integer is -128, and those after column K are 0.
        """
        check_positions(packed.meta)
        check_scales(packed.scales)
        if packed.bits == 8 and bool((packed.words.contiguous().view(torch.int8) == -128).any()):
            raise SparseGPTError("an integer of 8 bits is -128: expected -127 to 127")
        fields, kept = 32 // packed.bits, packed.shape[1] // 2  # of a word; of a row, before the groups added
        last = slice(kept // fields, None)
        check_padding(unpack_integers(packed.words[:, last], packed.bits), (packed.shape[0], 2 * (kept % fields)))

    def stored(self, packed: Quantized24) -> str:
        """Packed [N, K] -> its bits and group size."""
        return str(self)


def unpack_integers(words: Tensor, bits: int) -> Tensor:
    """Packed words [N, W] int32 -> signed integers [N, W * 32 / bits] int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    fields: Tensor = (words[..., None] << (32 - bits - shifts)) >> (32 - bits)  # >> of int32 keeps the sign
    return fields.flatten(1)


def _pack_integers(q: Tensor, bits: int) -> Tensor:
    fields = rearrange(q & (2**bits - 1), "n (w f) -> n w f", f=32 // bits)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=q.device)
    placed: Tensor = fields << shifts
    return placed.sum(-1, dtype=torch.int32)  # disjoint bits: the sum is their union


def _scale_groups(values: Tensor, group_size: int) -> Tensor:
    kept = max(1, min(group_size // 2, values.shape[1]))  # a group wider than the row is the row
    missing = -values.shape[1] % kept
    return rearrange(functional.pad(values, (0, missing)), "n (s v) -> n s v", v=kept)
