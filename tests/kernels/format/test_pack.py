"""The packed format against its definition, written out group by group."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels import Packed24, dequantize, first_violation, quantize, unpack
from sparsegpt.kernels.format.form import Form
from sparsegpt.kernels.format.interop import to_cutlass, to_semi_structured
from sparsegpt.kernels.format.pack import pack, words_to_nibbles
from sparsegpt.kernels.format.quantized import pack_integers24, unpack_integers
from sparsegpt.kernels.layers.forms import read_form, samples
from sparsegpt.sparsity import NM
from tests.forked import Forked
from tests.kernels.helpers import relative_error, weight24

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def unpack_by_definition(packed: Packed24) -> Tensor:
    rows, columns = packed.shape
    dense = torch.zeros(rows, columns, dtype=packed.values.dtype)
    for n in range(rows):
        for g in range(columns // 4):
            nibble = (int(packed.meta[n, g // 8]) >> (4 * (g % 8))) & 15
            assert (nibble & 3) < (nibble >> 2)
            dense[n, 4 * g + (nibble & 3)] = packed.values[n, 2 * g]
            dense[n, 4 * g + (nibble >> 2)] = packed.values[n, 2 * g + 1]
    return dense


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (3, 32), (5, 36), (64, 96), (7, 100), (0, 64), (2, 0)])
def test_round_trip_is_exact_and_means_what_the_format_says(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight24(*shape, dtype)
    packed = pack(weight)
    assert torch.equal(unpack(packed), weight)
    assert torch.equal(unpack_by_definition(packed), weight)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), words=st.integers(1, 3), data=st.data())
def test_any_bits_survive(rows: int, words: int, data: st.DataObject) -> None:
    """NaN, infinities and subnormals are values like any other; zeros of both signs are zeros."""
    pool = [0.0, -0.0, 1.0, -2.5, float("inf"), float("nan"), 1e-40]
    groups = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), *[st.sampled_from(pool)] * 2),
                                min_size=rows * words * 8, max_size=rows * words * 8))  # fmt: skip
    weight = torch.zeros(rows * words * 8, 4)
    for g, (i, j, a, b) in enumerate(groups):
        weight[g, i], weight[g, j] = a, b
    weight = weight.view(rows, words * 32)
    back = unpack(pack(weight))
    assert torch.equal((back + 0.0).view(torch.int32), (weight + 0.0).view(torch.int32))  # + 0.0 makes -0.0 +0.0


def test_negative_zero_counts_as_zero_and_comes_back_positive() -> None:
    weight = torch.tensor([[1.0, -0.0, 2.0, -0.0] * 8])
    packed = pack(weight)
    assert torch.equal(packed.values, torch.tensor([[1.0, 2.0] * 8]))
    lone = pack(torch.tensor([[-0.0, -0.0, 5.0, -0.0] * 8]))
    assert not lone.values.signbit().any() and lone.values[0, :2].tolist() == [0.0, 5.0]


def test_sixteen_bit_weights_take_nine_sixteenths() -> None:
    weight = weight24(64, 256, torch.bfloat16)
    assert pack(weight).nbytes * 16 == weight.nbytes * 9


def test_non_contiguous_and_large_weights() -> None:
    assert torch.equal(unpack(pack(weight24(48, 64).t().contiguous().t())), weight24(48, 64))
    wide = weight24(3, 1 << 21)  # more than one chunk of rows
    assert torch.equal(unpack(pack(wide)), wide)


def test_broken_pattern_names_tensor_and_first_bad_group() -> None:
    weight = weight24(8, 100)
    weight[5, 96:100] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    weight[6, 0:4] = 1.0
    with pytest.raises(
        SparseGPTError, match=r"layer\.q: not 2:4: row 5, columns 96\.\.99 hold \[1\.0, 2\.0, 0\.0, 3\.0\]"
    ):
        pack(weight, "layer.q")
    assert first_violation(weight) == (5, 24)
    assert first_violation(weight24(8, 100)) is None


@pytest.mark.parametrize(("n", "m", "columns"), [(1, 4, 100), (2, 4, 64), (4, 8, 64), (3, 5, 35), (299, 300, 600)])
def test_the_first_violation_of_any_pattern(n: int, m: int, columns: int) -> None:
    weight = torch.zeros(3, columns)
    weight[:, : columns // m * m].view(3, -1, m)[..., :n] = 1.0
    weight[0, 0] = -0.0
    assert first_violation(weight, NM(n, m)) is None
    weight[2, -1] = weight[1, m + n] = 1.0
    weight[1, m : m + n] = float("nan")
    assert first_violation(weight, NM(n, m)) == (1, 1)
    with pytest.raises(SparseGPTError, match=f"groups of {m}"):
        first_violation(torch.zeros(2, m + 1), NM(n, m))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4, 6), "divisible by 4"),
        (torch.zeros(4), "2-D"),
        (torch.zeros(2, 4, 4), "2-D"),
        (torch.zeros(4, 8, dtype=torch.int8), "torch.int8"),
    ],
)
def test_refusals(weight: Tensor, message: str) -> None:
    with pytest.raises(SparseGPTError, match=message):
        pack(weight, "w")


@pytest.mark.parametrize("form", samples(), ids=str)
def test_a_form_gives_back_what_it_was_given(form: Form) -> None:
    """Through the tensors of a file, by rows, and through plain data."""
    weight = weight24(40, 100, torch.bfloat16)
    packed = form.of_model(weight.dtype).pack(weight, "w")
    again = form.of_model(weight.dtype).packed(form.tensors(packed), (40, 100))
    dense = form.unpack(packed)
    assert torch.equal(form.unpack(again), dense) and dense.dtype == packed.dtype == weight.dtype
    again = again.settled()
    assert torch.equal(form.unpack(again.rows(slice(7, 20))), dense[7:20]) and again.rows(slice(0, 40)) is again
    assert packed.nbytes == sum(tensor.nbytes for tensor in form.tensors(packed))
    assert read_form(json.loads(json.dumps(form.settings()))) == form and form.promised("2:4")
    assert form.keeps(weight) and not form.keeps(weight + 1) and not form.keeps(weight.char())
    any_pattern = form.pattern == "bitmask"
    assert form.promised("0.5") == form.keeps(weight[:, :98]) == any_pattern


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pattern": "4:8"},
        {"pattern": "2:4", "values": {"bits": 2, "group_size": 32, "dtype": "bfloat16"}},
        {"pattern": "2:4", "values": {"bits": 8, "group_size": 32, "dtype": "nn"}},
        {"pattern": "2:4", "values": 8},
    ],
)
def test_settings_of_no_form_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(SparseGPTError, match="update sparsegpt"):
        read_form(settings)


def test_mismatched_parts_are_refused() -> None:
    packed = pack(weight24(8, 64))
    with pytest.raises(SparseGPTError, match="needs values"):
        Packed24(packed.values, packed.meta, (8, 96))
    with pytest.raises(SparseGPTError, match="needs values"):
        Packed24(packed.values, packed.meta.long(), (8, 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (128, 160)])
def test_cutlass_layout_is_torchs_own(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    weight = weight24(*shape, dtype)
    values, meta = to_cutlass(pack(weight))
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), weight)


def test_semi_structured_tensor_is_torchs_own() -> None:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    weight = weight24(64, 128, torch.float16)
    tensor = to_semi_structured(pack(weight))
    assert type(tensor).__name__ == "SparseSemiStructuredTensorCUTLASS" and tensor.shape == weight.shape
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(tensor.packed, tensor.meta), weight)


def test_cutlass_refusals() -> None:
    with pytest.raises(SparseGPTError, match="float16 or bfloat16"):
        to_cutlass(pack(weight24(32, 32)))
    with pytest.raises(SparseGPTError, match="divisible by 32"):
        to_cutlass(pack(weight24(16, 32, torch.float16)))


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 8e-3), (4, 0.14)])
@pytest.mark.parametrize("shape", [(16, 128), (5, 300), (3, 36)])
def test_quantised_values(shape: tuple[int, int], bits: int, tolerance: float) -> None:
    packed = pack(weight24(*shape))
    small = quantize(packed, bits, 64)
    back = dequantize(small, torch.float32)
    assert torch.equal(back.meta, packed.meta)
    assert relative_error(back.values, packed.values) < tolerance  # half a step of amax / 127 or amax / 7
    # by definition: value v of row n is field v % per of word v // per, times the scale of its 32 kept values
    per, q = 32 // bits, unpack_integers(small.words, bits)
    for n, v in ((0, 0), (shape[0] - 1, packed.values.shape[1] - 1), (1, 17)):
        field = (int(small.words[n, v // per]) >> (bits * (v % per))) & (2**bits - 1)
        signed = field - 2**bits * (field >> (bits - 1))
        assert signed == int(q[n, v])
        assert float(back.values[n, v]) == signed * float(small.scales[n, v // 32])
    again = quantize(back, bits, 64)
    assert torch.equal(dequantize(again, torch.float32).values, back.values)


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_that_a_solver_chose_are_packed_as_they_are(bits: int) -> None:
    least, most = {4: (-8, 7), 8: (-127, 127)}[bits]
    integers = (weight24(9, 200) * most / 4).round().clamp(least, most)
    scales = torch.randn(9, 4).half()
    small = pack_integers24(integers, scales.float(), bits, 64)
    expected = integers * scales.float().repeat_interleave(64, 1)[:, :200]
    assert torch.equal(unpack(dequantize(small, torch.float32)), expected) and small.dtype == torch.bfloat16
    for wrong, chosen, message in (
        (integers + 0.5, scales, "whole numbers"),
        (integers * 2 + most, scales, f"from {least} to {most}"),
        (torch.ones(9, 200), scales, "w: not 2:4"),
        (integers, scales.float() + 1e-6, "float16"),
        (integers, scales / 0, "infinite"),
        (integers, scales[:, :3], "needs words, scales"),
    ):
        with pytest.raises(SparseGPTError, match=message):
            pack_integers24(wrong, chosen, bits, 64, name="w")


def test_int4_size_and_refusals() -> None:
    packed = pack(weight24(64, 1024, torch.bfloat16))
    assert quantize(packed, 4).nbytes * 8 == 64 * 1024 * 3.125
    with pytest.raises(SparseGPTError, match="4 or 8 bits"):
        quantize(packed, 3)
    with pytest.raises(SparseGPTError, match="multiple of 32"):
        quantize(packed, 4, 48)
    packed.values[0, 0] = float("inf")
    with pytest.raises(SparseGPTError, match="finite"):
        quantize(packed, 4)


def test_nibbles_of_words() -> None:
    packed = pack(weight24(4, 64))
    nibbles = words_to_nibbles(packed.meta)
    for g in range(16):
        assert torch.equal(nibbles[:, g].int(), (packed.meta[:, g // 8] >> (4 * (g % 8))) & 15)


def test_import_is_light(forked_light: Forked) -> None:
    heavy = ("triton", "transformers", "safetensors")
    code = f"import sys, sparsegpt.kernels; print([name for name in {heavy} if name in sys.modules])"
    assert forked_light.python("-c", code).strip() == "[]"
