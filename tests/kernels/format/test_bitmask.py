"""The bitmask format: every bit back for any pattern and shape, by the definition; what no packer writes is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsegpt.kernels.format.bitmask import TAIL, Bitmask, BitmaskValues, pack_bitmask, row_starts, unpack_bitmask
from sparsegpt.kernels.format.bitmask_integers import (
    BitmaskIntegers,
    QuantizedBitmask,
    dequantize_bitmask,
    pack_integers,
    quantize_bitmask,
)
from sparsegpt.kernels.format.form import Form
from tests.kernels.helpers import relative_error, sparse_weight, weight24
from tests.support import refused

FLOATS = BitmaskValues()
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
SHAPES = [(1, 1), (3, 31), (5, 32), (7, 33), (40, 100), (33, 257), (0, 8), (4, 0)]


def by_definition(packed: Bitmask) -> Tensor:
    """[N, K], one weight after the other."""
    rows, columns = packed.shape
    dense, at = torch.zeros(rows, columns, dtype=packed.dtype), 0
    for n in range(rows):
        for k in range(columns):
            if int(packed.mask[n, k // 32]) >> k % 32 & 1:
                dense[n, k], at = packed.values[at], at + 1
    assert at + TAIL == len(packed.values)
    return dense


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_comes_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for zeros in (0.0, 0.5, 0.99, 1.0):
        weight = sparse_weight(*shape, zeros, dtype)
        packed = pack_bitmask(weight)
        assert torch.equal(unpack_bitmask(packed).view(BITS[dtype]), weight.view(BITS[dtype]))
        assert torch.equal(by_definition(packed), weight)
        starts = row_starts(packed.offsets, shape[0])
        assert starts.diff().tolist() == weight.count_nonzero(1).tolist() and int(starts[0]) == 0


def test_odd_numbers_and_empty_rows() -> None:
    weight = torch.zeros(4, 40)
    weight[0, :4] = torch.tensor([float("nan"), float("-inf"), 1e-45, -0.0])
    weight[2, 39] = torch.tensor(0x7FA12345, dtype=torch.int32).view(torch.float32)  # a signalling NaN
    packed = pack_bitmask(weight)
    weight[0, 3] = 0.0  # -0.0 is zero
    assert torch.equal(unpack_bitmask(packed).view(torch.int32), weight.view(torch.int32))
    assert packed.offsets.tolist() == [0, 3, 3, 4, 4]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 4)])
def test_a_fixed_count_needs_no_offsets(n: int, m: int) -> None:
    weight = torch.zeros(24, 64)
    weight.unflatten(1, (-1, m))[..., :n] = 1 + torch.rand(24, 64 // m, n)
    packed = pack_bitmask(weight)
    assert packed.offsets.tolist() == [64 * n // m]
    assert torch.equal(unpack_bitmask(packed), weight)
    settled = packed.settled()
    assert len(settled.offsets) == 25 and torch.equal(unpack_bitmask(settled.rows(slice(5, 9))), weight[5:9])


@pytest.mark.parametrize("zeros", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_size(zeros: float) -> None:
    weight = sparse_weight(64, 4096, zeros, torch.bfloat16)
    density = int(weight.count_nonzero()) / weight.numel()
    assert pack_bitmask(weight).nbytes / weight.nbytes == pytest.approx(1 / 16 + density, rel=0.02)
    quantized = density / 4 + 1 / 16 + 1 / 128  # int4, a bit a weight, a scale of 16 bits for 128 of them
    assert quantize_bitmask(weight, 4).nbytes / weight.nbytes == pytest.approx(quantized, rel=0.02)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [*SHAPES, (16, 300)])
def test_integers_by_definition(shape: tuple[int, int], bits: int) -> None:
    rows, columns = shape
    weight = sparse_weight(rows, columns, 0.6)
    packed, most = quantize_bitmask(weight, bits, 64), 2 ** (bits - 1) - 1
    expected, at = torch.zeros(rows, columns), 0
    for n in range(rows):
        for k in range(columns):
            if weight[n, k] != 0:
                byte = int(packed.integers[at * bits // 8]) >> (at % 2 * 4 if bits == 4 else 0) & 2**bits - 1
                q, scale, at = byte - 2**bits * (byte > most), float(packed.scales[n, k // 64]), at + 1
                assert abs(q * scale - float(weight[n, k])) <= scale * (0.5 + 0.002 * most)
                expected[n, k] = q * scale
    assert torch.equal(dequantize_bitmask(replace(packed, dtype=torch.float32)), expected)
    assert torch.equal(dequantize_bitmask(replace(packed, dtype=torch.bfloat16)), expected.bfloat16())
    BitmaskIntegers(bits, 64).check(packed)


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_that_a_solver_chose_are_packed_as_they_are(bits: int) -> None:
    least, most = {4: (-8, 7), 8: (-127, 127)}[bits]
    integers, scales = torch.randint(least, most + 1, (9, 200)), torch.randn(9, 4).half()
    kept = torch.rand(9, 200) < 0.5
    integers *= kept
    for mask in (None, kept):
        packed = pack_integers(integers, scales.float(), bits, 64, kept=mask, dtype=torch.float32)
        expected = integers * scales.float().repeat_interleave(64, 1)[:, :200]
        assert torch.equal(dequantize_bitmask(packed), expected)
        assert int(packed.settled().offsets[-1]) == int((kept if mask is not None else integers).count_nonzero())
    with refused("whole numbers"):
        pack_integers(integers + 0.5, scales, bits, 64)
    with refused(f"from {least} to {most}"):
        pack_integers(integers - 2 * most, scales, bits, 64)
    with refused("not kept is not 0"):
        pack_integers(integers, scales, bits, 64, kept=torch.zeros_like(kept))
    with refused("float16"):
        pack_integers(integers, scales.float() + 1e-6, bits, 64)
    with refused("infinite"):
        pack_integers(integers, scales / 0, bits, 64)


def test_int8_error_is_that_of_its_scale() -> None:
    weight = sparse_weight(16, 512, 0.5)
    assert relative_error(dequantize_bitmask(quantize_bitmask(weight, 8).settled()), weight) < 8e-3


def test_what_keeps_zeros_enough() -> None:
    for form in (FLOATS, BitmaskIntegers(8)):
        assert (
            form.keeps(weight24(8, 32)) and form.keeps(sparse_weight(8, 33, 0.5)) and not form.keeps(torch.ones(8, 32))
        )
        assert form.promised("2:4") and form.promised("0.5") and not form.promised("0.05") and not form.promised("?")
        with refused("w: 0.0% of its weights are zero"):
            form.pack(torch.ones(8, 32), "w")


# ---------------------------------------------------------------- hostile content


def written(form: Form) -> Bitmask | QuantizedBitmask:
    return form.pack(sparse_weight(6, 40, 0.5), "w")  # type: ignore[no-any-return]


FORMS = [FLOATS, BitmaskIntegers(8, 32), BitmaskIntegers(4, 32)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_no_packer_writes_is_refused(form: Form) -> None:
    packed = written(form)
    form.check(packed)
    for row, change in ((1, 1), (6, 1 << 40), (0, -1), (3, -(1 << 62))):
        offsets = packed.offsets.long()
        offsets[row] += change
        for check in (form.check, lambda weight: weight.settled()):
            with refused(f"before row {row}"):
                check(replace(packed, offsets=offsets))
    mask = packed.mask.clone()
    mask[2, 1] ^= 1 << 7  # column 39
    with refused("before row 3"):
        form.check(replace(packed, mask=mask))
    mask = packed.mask.clone()
    mask[2, 1] |= -(1 << 31)
    with refused("after the last of 40 columns"):
        form.check(replace(packed, mask=mask))
    stream = form.parts[0]
    for length in (-1, 1):
        whole = getattr(packed, stream)
        other = whole[:length] if length < 0 else torch.cat([whole, whole[-1:]])
        with refused("the mask keeps"):
            form.check(replace(packed, **{stream: other}))
    with refused("the mask keeps"):
        replace(packed, **{stream: getattr(packed, stream)[:-1]}).settled()
    tail = getattr(packed, stream).clone()
    tail[-1] = 1
    with refused("zeros"):
        form.check(replace(packed, **{stream: tail}))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_parts_of_other_shapes_or_dtypes_are_refused(form: Form) -> None:
    packed = written(form)
    for part, wrong in (
        ("mask", packed.mask[:, :1]),
        ("mask", packed.mask.float()),
        ("offsets", packed.offsets[:-1]),
        ("offsets", packed.offsets.short()),
        ("offsets", packed.offsets[None]),
        (form.parts[0], getattr(packed, form.parts[0])[:3]),
        (form.parts[0], getattr(packed, form.parts[0]).bool()),
    ):
        with refused("bitmask weight of shape (6, 40) needs"):
            replace(packed, **{part: wrong})


@pytest.mark.parametrize("bits", [8, 4])
def test_hostile_integers(bits: int) -> None:
    form = BitmaskIntegers(bits, 32)
    packed = form.pack(sparse_weight(6, 40, 0.5), "w")
    for value in (float("inf"), float("nan"), -float("inf")):
        scales = packed.scales.clone()
        scales[2, 1] = value
        with refused("a scale is infinite or NaN"):
            form.check(replace(packed, scales=scales))
    integers = packed.integers.clone()
    integers[3] = 0x80 if bits == 8 else 0x08
    if bits == 8:
        with refused("an integer of 8 bits is -128"):
            form.check(replace(packed, integers=integers))
    else:
        form.check(replace(packed, integers=integers))
    parts = list(form.tensors(packed))
    parts[1] = packed.scales
    with refused("scales are stored as torch.int16"):
        form.packed(parts, (6, 40))
    with refused("needs integers"):
        replace(packed, scales=packed.scales[:, :1])
