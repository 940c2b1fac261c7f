"""Packed content from files: what no packer writes is refused before a kernel sees it, by the definition."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels import Packed24, quantize
from sparsegpt.kernels.format.pack import FloatValues, check_positions, pack
from sparsegpt.kernels.format.quantized import IntegerValues, unpack_integers
from tests.kernels.helpers import weight24
from tests.support import refused

FLOATS = FloatValues()


def with_bits(words: Tensor, index: int, shift: int, width: int, value: int) -> Tensor:
    """A copy of int32 words [1, W] with one field set."""
    changed = words.clone()
    word = int(changed[0, index]) & 0xFFFFFFFF
    word = word & ~((2**width - 1) << shift) | (value & (2**width - 1)) << shift
    changed[0, index] = word - 2**32 if word >= 2**31 else word
    return changed


@pytest.mark.parametrize("group", range(16))
@pytest.mark.parametrize("nibble", range(16))
def test_positions_are_two_in_order_in_every_place_of_a_word(nibble: int, group: int) -> None:
    meta = with_bits(pack(weight24(1, 64)).meta, group // 8, group % 8 * 4, 4, nibble)
    first, second = nibble & 3, nibble >> 2
    if first < second:
        check_positions(meta)
    else:
        with refused(f"row 0, group {group}", f"positions {first} and {second}"):
            check_positions(meta)


@pytest.mark.parametrize("shape", [(1, 4), (7, 36), (64, 288)])
def test_what_a_packer_writes_passes(shape: tuple[int, int]) -> None:
    packed = pack(weight24(*shape))
    FLOATS.check(packed)
    for bits in (4, 8):
        IntegerValues(bits, 32).check(quantize(packed, bits, 32))


def test_the_first_wrong_group_is_named() -> None:
    packed = pack(weight24(5, 96))
    packed.meta[2, 1] = 0x44444494  # positions 1 and 2
    FLOATS.check(packed)
    packed.meta[3, 0] = 0
    packed.meta[2, 1] = 0x44444454
    with refused("row 2, group 9", "positions 1 and 1"):
        FLOATS.check(packed)


def test_values_after_the_last_column_are_zero() -> None:
    packed = pack(weight24(3, 36))
    for column, sound in ((17, True), (18, False), (31, False)):
        values = packed.values.clone()
        values[1, column] = float("nan")
        if sound:
            FLOATS.check(replace(packed, values=values))  # a NaN is as legal as in a dense weight
        else:
            with refused("after the last of 36 columns"):
                FLOATS.check(replace(packed, values=values))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_values_are_numbers_in_floating_point(dtype: torch.dtype) -> None:
    packed = pack(weight24(3, 32))
    with refused("values (3, 16) in floating point", str(dtype)):
        Packed24(packed.values.to(dtype), packed.meta, packed.shape)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
def test_scales_are_finite(value: float) -> None:
    form = IntegerValues(8, 32)
    small = form.pack(weight24(3, 64), "weight")
    small.scales[2, 1] = value
    with refused("a scale is infinite or NaN"):
        form.check(small)
    for sound in (0.0, -1.0):
        small.scales[2, 1] = sound
        form.check(small)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8, torch.int64, torch.bool])
def test_scales_are_stored_as_bits(dtype: torch.dtype) -> None:
    form = IntegerValues(8, 32)
    words, scales, meta = form.tensors(form.pack(weight24(3, 64), "weight"))
    with refused("scales are stored as torch.int16", str(dtype)):
        form.packed((words, torch.zeros(scales.shape, dtype=dtype), meta), (3, 64))


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_of_eight_bits_are_symmetric(bits: int) -> None:
    form, least = IntegerValues(bits, 32), -(2 ** (bits - 1))
    small = form.pack(weight24(1, 64), "weight")
    for index in range(small.words.shape[1]):
        for shift in range(0, 32, bits):
            wrong = replace(small, words=with_bits(small.words, index, shift, bits, least))
            assert int((unpack_integers(wrong.words, bits) == least).sum()) == 1
            if bits == 8:
                with refused("an integer of 8 bits is -128"):
                    form.check(wrong)
            else:
                form.check(wrong)
            form.check(replace(small, words=with_bits(small.words, index, shift, bits, least + 1)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [4, 12, 36, 40, 60])
def test_integers_after_the_last_column_are_zero(bits: int, columns: int) -> None:
    form = IntegerValues(bits, 32)
    small = form.pack(weight24(1, columns), "weight")
    fields = 32 // bits
    for place in range(unpack_integers(small.words, bits).shape[1]):
        changed = replace(small, words=with_bits(small.words, place // fields, place % fields * bits, bits, 1))
        if place < columns // 2:
            form.check(changed)
        else:
            with refused("after the last of"):
                form.check(changed)


@pytest.mark.parametrize(
    "values",
    [
        5,
        [],
        {},
        {"bits": 8, "group_size": 128},
        {"bits": 8.0, "group_size": 128, "dtype": "bfloat16"},
        {"bits": True, "group_size": 128, "dtype": "bfloat16"},
        {"bits": float("inf"), "group_size": 128, "dtype": "bfloat16"},
        {"bits": 8, "group_size": 128, "dtype": "int8"},
        {"bits": 8, "group_size": 128, "dtype": "nn"},
        {"bits": 8, "group_size": 128, "dtype": 3},
        {"bits": 8, "group_size": "128", "dtype": "bfloat16"},
    ],
)
def test_settings_of_another_form_are_one_line(values: object) -> None:
    with pytest.raises(SparseGPTError, match="update sparsegpt"):
        IntegerValues.read({"pattern": "2:4", "values": values})
