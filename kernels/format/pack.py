"""The packed 2:4 format: of every four consecutive inputs two are stored, with a nibble that says which two.

    values [N, Kp / 2]         kept weights: group g of row n is values[n, 2g], values[n, 2g + 1], in input order
    meta   [N, Kp / 32] int32  nibble g % 8 of word g // 8 is i0 | i1 << 2, the two kept positions, i0 < i1 always
    Kp = K rounded up to a multiple of 32; the groups added hold zeros

    dense[n, 4g + i0] = values[n, 2g],  dense[n, 4g + i1] = values[n, 2g + 1],  everything else 0

The nibble is the metadata of NVIDIA's sparse tensor cores (PTX ISA, "mma.sp", 2:4 granularity) in logical order.
A 16-bit weight takes 9/16 of its dense bytes. Words are little-endian, as in safetensors.
-0.0 counts as zero and comes back as +0.0; every other bit pattern comes back as it was.
Dimension key: N out_features, K in_features, G groups of four, B bytes of metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.form import Form
from sparsegpt.sparsity import NM
from sparsegpt.strips import strips

PATTERN = NM(2, 4)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
GROUP = 4
WORD_COLUMNS = 32  # dense columns that one int32 of metadata describes
_CHUNK = 1 << 22  # weights handled at a time, so that the working memory stays small beside the tensor
EMPTY_WORD = 0x44444444  # metadata of eight groups that keep positions 0 and 1
_INVALID = 255
# Which of the four are non-zero (bit i = input i) -> nibble. With fewer than two, the lowest free position joins in.
_NIBBLE_OF_CODE = (4, 4, 4, 4, 8, 8, 9, _INVALID, 12, 12, 13, _INVALID, 14, _INVALID, _INVALID, _INVALID)
# Nibble -> four booleans as the bytes of one int32. Nibbles without i0 < i1 never occur (`check_positions`).
_MASK_OF_NIBBLE = tuple(1 << 8 * (nibble & 3) | 1 << 8 * (nibble >> 2) for nibble in range(16))


@dataclass(frozen=True, eq=False)
class Packed24:
    """A 2:4 weight [N, K] in packed form.

    Attributes:
        values: [N, Kp / 2], floating point.
        meta: [N, Kp / 32], int32, on the same device.
        shape: (N, K) of the dense weight.

    Raises SparseGPTError when the three do not belong together.
    """

    values: Tensor
    meta: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        expected = packed_shapes(self.shape)
        found = (tuple(self.values.shape), tuple(self.meta.shape))
        if found != expected or self.meta.dtype != torch.int32 or self.values.dtype not in DTYPES:
            raise SparseGPTError(
                f"packed weight of shape {self.shape} needs values {expected[0]} in floating point and meta "
                f"{expected[1]} torch.int32; found {found[0]} {self.values.dtype} and {found[1]} {self.meta.dtype}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the values, and of the dense weight."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Of values and metadata."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata together."""
        return self.values.nbytes + self.meta.nbytes

    def settled(self) -> Packed24:
        """[N, K] -> the same weight as kernels take it: its tensors contiguous, themselves where they are."""
        return Packed24(self.values.contiguous(), self.meta.contiguous(), self.shape)

    def rows(self, part: slice) -> Packed24:
        """Rows of the weight [N, K] -> [n, K], on the same memory; `part` has a start, a stop and no step."""
        if part == slice(0, self.shape[0]):
            return self
        return Packed24(self.values[part], self.meta[part], (part.stop - part.start, self.shape[1]))


def padded_columns(columns: int) -> int:
    """Columns rounded up to whole metadata words."""
    return -(-columns // WORD_COLUMNS) * WORD_COLUMNS


def packed_shapes(shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of `values` and `meta` for a dense `shape`. Raises SparseGPTError unless rows are groups of four."""
    rows, columns = shape
    if columns % GROUP:
        raise SparseGPTError(f"2:4 needs in_features divisible by 4; found shape {shape}: leave this weight dense")
    padded = padded_columns(columns)
    return (rows, padded // 2), (rows, padded // WORD_COLUMNS)


def pack(weight: Tensor, name: str = "weight") -> Packed24:
    """[N, K] of the pattern -> packed.

    Args:
        weight: [N, K] floating point, at most two non-zeros in every four consecutive columns; K divisible by 4.
        name: how errors call the tensor.

    Raises:
        SparseGPTError: not a 2-D floating-point tensor, K not divisible by 4, or the pattern is broken (the message
            names the tensor and the first bad group).
    """
    _check_dense(weight, name)
    shape = (weight.shape[0], weight.shape[1])
    values_shape, meta_shape = packed_shapes(shape)
    values = torch.empty(values_shape, dtype=weight.dtype, device=weight.device)
    meta = torch.empty(meta_shape, dtype=torch.int32, device=weight.device)
    for rows in chunks(shape):
        weight_NK = pad_columns(weight[rows])
        nibbles_NG = _nibbles(weight_NK, name, rows.start)
        kept = select(weight_NK, _mask(nibbles_NG)).view(values[rows].shape)
        values[rows] = kept.masked_fill_(kept == 0, 0)  # turns -0.0 into 0.0
        meta[rows] = _nibbles_to_words(nibbles_NG)
    return Packed24(values, meta, shape)


def unpack(packed: Packed24) -> Tensor:
    """Packed -> dense [N, K], same dtype and device: the torch twin of every decompression kernel."""
    columns = packed.shape[1]
    dense = packed.values.new_empty(packed.shape)
    for rows in chunks(packed.shape):
        mask_NK = _mask(words_to_nibbles(packed.meta[rows]))
        weight_NK = packed.values.new_zeros(mask_NK.shape).masked_scatter_(mask_NK, packed.values[rows])
        dense[rows] = weight_NK[:, :columns]
    return dense


def first_violation(weight: Tensor, pattern: NM = PATTERN) -> tuple[int, int] | None:
    """[N, K] -> (row, group) of the first group of m inputs with more than n non-zeros, or None when there is none.

    Raises SparseGPTError for K that does not divide into groups of m.
    """
    pattern.check(weight.shape[1], "weight")
    for rows in chunks((weight.shape[0], weight.shape[1])):
        kept_NGM = rearrange(weight[rows] != 0, "n (g m) -> n g m", m=pattern.m)
        violation = _first(kept_NGM.sum(-1, dtype=torch.int32) > pattern.n)
        if violation is not None:
            return rows.start + violation[0], violation[1]
    return None


@dataclass(frozen=True)
class FloatValues(Form):
    """2:4 with every kept value as it was: the form of Packed24."""

    pattern: ClassVar[str] = str(PATTERN)
    demand: ClassVar[str] = str(PATTERN)
    parts: ClassVar[tuple[str, ...]] = ("values", "meta")

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Self | None:
        """2:4 without a word on values."""
        return cls() if settings.get("pattern") == cls.pattern and settings.get("values") is None else None

    def settings(self) -> dict[str, Any]:
        """The pattern."""
        return {"pattern": self.pattern}

    @classmethod
    def samples(cls) -> Sequence[Form]:
        """The one there is."""
        return (cls(),)

    def of_model(self, dtype: torch.dtype) -> Form:
        """The same for every dtype."""
        return self

    def promised(self, sparsity: str) -> bool:
        """2:4."""
        return sparsity == self.pattern

    def keeps(self, weight: Tensor) -> bool:
        """[N, K] -> whether it is of a floating-point dtype and keeps 2:4."""
        return weight.dtype in DTYPES and weight.shape[1] % GROUP == 0 and first_violation(weight) is None

    def pack(self, weight: Tensor, name: str) -> Packed24:
        """[N, K] -> packed; raises as `pack`."""
        return pack(weight, name)

    def unpack(self, packed: Packed24) -> Tensor:
        """Packed -> [N, K]."""
        return unpack(packed)

    def tensors(self, packed: Packed24) -> tuple[Tensor, ...]:
        """Packed [N, K] -> values [N, Kp / 2] and meta [N, Kp / 32]."""
        return packed.values, packed.meta

    def packed(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Packed24:
        """Values [N, Kp / 2] and meta [N, Kp / 32] -> packed [N, K]; SparseGPTError where they do not fit."""
        values, meta = tensors
        return Packed24(values, meta, shape)

    def check(self, packed: Packed24) -> None:
        """Packed [N, K]. Raises SparseGPTError for metadata not of two positions, and for values after column K."""
        check_positions(packed.meta)
        check_padding(packed.values, packed.shape)

    def stored(self, packed: Packed24) -> str:
        """Packed [N, K] -> its dtype."""
        return str(packed.dtype).removeprefix("torch.")


def check_positions(meta: Tensor) -> None:
    """Metadata words [N, W]. Raises SparseGPTError, with row and group, where a nibble has not i0 < i1.

    All eight nibbles of a word at once: 3 + i1 - i0 has bit 2 just where i1 > i0, and stays within its four bits.
    """
    first, second = meta & 0x33333333, meta >> 2 & 0x33333333
    ordered = (second | 0x44444444) - first - 0x11111111 & 0x44444444
    wrong = _first(ordered != 0x44444444)
    if wrong is not None:
        row, word = wrong
        nibbles = words_to_nibbles(meta[row : row + 1, word : word + 1])[0].tolist()
        group = next(index for index, nibble in enumerate(nibbles) if nibble & 3 >= nibble >> 2)
        raise SparseGPTError(
            f"metadata of row {row}, group {8 * word + group} keeps positions {nibbles[group] & 3} and "
            f"{nibbles[group] >> 2}: expected two different ones of 0 to 3, in order"
        )


def check_padding(values: Tensor, shape: tuple[int, int]) -> None:
    """[N, Kp / 2], of a weight [N, K]. Raises SparseGPTError where a value of the groups after column K is not 0."""
    if bool(values[:, shape[1] // 2 :].any()):
        raise SparseGPTError(f"there are values after the last of {shape[1]} columns: expected zeros")


def words_to_nibbles(meta: Tensor) -> Tensor:
    """Metadata words [N, W] int32 -> nibbles [N, G] uint8, eight groups a word."""
    bytes_NB = meta.contiguous().view(torch.uint8)
    return torch.stack((bytes_NB & 15, bytes_NB >> 4), dim=-1).flatten(1)


def _nibbles_to_words(nibbles_NG: Tensor) -> Tensor:
    low_NB, high_NB = rearrange(nibbles_NG, "n (b two) -> two n b", two=2)
    both_NB: Tensor = low_NB | high_NB << 4
    return both_NB.contiguous().view(torch.int32)


def _codes(weight: Tensor) -> Tensor:
    """[N, K] -> [N, G] int32: which of each four weights are non-zero, as a number 0..15."""
    bytes_NG = (weight != 0).view(torch.int32)  # four booleans, input 0 in the lowest byte
    # byte i times 2^(24 - 7 i) puts its bit at 24 + i; the other products land elsewhere and never carry
    gathered_NG: Tensor = bytes_NG * ((1 << 24) + (1 << 17) + (1 << 10) + (1 << 3)) >> 24
    return gathered_NG & 15


def _lookup(table: tuple[int, ...], dtype: torch.dtype, index: Tensor) -> Tensor:
    entries = torch.tensor(table, dtype=dtype, device=index.device)
    return entries.index_select(0, index.int().flatten()).view(index.shape)


def _mask(nibbles_NG: Tensor) -> Tensor:
    """Nibbles [N, G] -> kept positions [N, 4 G] bool; two in each group of four."""
    return _lookup(_MASK_OF_NIBBLE, torch.int32, nibbles_NG).view(torch.bool)


def _nibbles(weight: Tensor, name: str, first_row: int) -> Tensor:
    """Some rows [n, Kp] -> their nibbles [n, Kp / 4] uint8; raises on a group with more than two non-zeros."""
    nibbles_NG = _lookup(_NIBBLE_OF_CODE, torch.uint8, _codes(weight))
    violation = _first(nibbles_NG == _INVALID)
    if violation is not None:
        row, group = violation
        found = weight[row, GROUP * group : GROUP * (group + 1)].tolist()
        raise SparseGPTError(
            f"{name}: not 2:4: row {first_row + row}, columns {GROUP * group}..{GROUP * group + 3} hold {found}, "
            "more than two non-zeros; prune it to 2:4 first or leave this layer dense"
        )
    return nibbles_NG


def _first(bad_NG: Tensor) -> tuple[int, int] | None:
    """[N, G] bool -> (row, group) of the first True, or None."""
    if not bool(bad_NG.any()):
        return None
    row, group = divmod(int(bad_NG.flatten().to(torch.uint8).argmax()), bad_NG.shape[1])
    return row, group


def select(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight[mask]` [V]; on the CPU through numpy, whose masked copy is five to ten times as fast as torch's."""
    if weight.device.type != "cpu":
        return weight[mask]
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
        weight.dtype.itemsize
    ]  # numpy knows no bfloat16
    return torch.from_numpy(weight.view(bits).numpy()[mask.numpy()]).view(weight.dtype)


def pad_columns(weight: Tensor) -> Tensor:
    """[N, K] -> [N, Kp] contiguous, zeros after column K."""
    missing = padded_columns(weight.shape[1]) - weight.shape[1]
    return functional.pad(weight, (0, missing)) if missing else weight.contiguous()


def chunks(shape: tuple[int, int]) -> list[slice]:
    """Rows of a weight of this shape to work on at a time; none of a weight without elements."""
    return strips(shape[0] if shape[1] else 0, max(1, _CHUNK // max(1, shape[1])))


def _check_dense(weight: Tensor, name: str) -> None:
    if weight.ndim != 2 or weight.dtype not in DTYPES:
        raise SparseGPTError(
            f"{name}: packing needs a 2-D weight in bfloat16, float16, float32 or float64; "
            f"found {tuple(weight.shape)} {weight.dtype}"
        )
    if weight.shape[1] % GROUP:
        raise SparseGPTError(
            f"{name}: 2:4 needs in_features divisible by 4; found shape {tuple(weight.shape)}: leave this weight dense"
        )
