"""The bitmask format: one bit a weight says whether it is kept, and the kept weights lie row by row. Any pattern.

    values  [V + 32]             kept weights, row by row in input order; 32 zeros follow, so that a kernel may read on
    mask    [N, Kp / 32] int32   bit i of word w is column 32 w + i: set where a weight is kept
    offsets [N + 1] int32        row n is values[offsets[n] : offsets[n + 1]]; int64 from 2^31 values on; or
            [1]                  the number of kept weights in a row, where every row keeps as many (n:m patterns)
    Kp = K rounded up to a multiple of 32; the bits of the columns added are 0

At a density d a 16-bit weight takes d + 1/16 of its dense bytes: at one half what 2:4 takes, 9/16. Words are
little-endian, as in safetensors. -0.0 counts as zero and comes back as +0.0; every other bit pattern comes back as it
was. With integers in place of values: bitmask_integers.py.
Dimension key: N out_features, K in_features, V kept weights, W words of a row, B bytes of a row's mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.form import Form
from sparsegpt.kernels.format.pack import DTYPES, WORD_COLUMNS, chunks, pad_columns, padded_columns, select
from sparsegpt.sparsity import parse_sparsity

PATTERN = "bitmask"
TAIL = 32  # values after the last kept one: a kernel reads whole registers
# With fewer zeros than this a weight hardly gets smaller, and no faster.
LEAST_ZEROS = 1 / 8
DEMAND = "a zero in eight weights"
# byte i of eight booleans times 2^(56 - 7 i) puts its bit at 56 + i; the other products land elsewhere and never carry
_GATHER = sum(1 << (56 - 7 * i) for i in range(8))
_SPREAD = tuple(sum(1 << 8 * i for i in range(8) if byte >> i & 1) for byte in range(256))  # byte -> eight booleans


@dataclass(frozen=True, eq=False)
class Bitmask:
    """A weight [N, K] in packed form.

    values, mask, offsets: as in the module's key, on one device. shape: the dense (N, K).

    Raises SparseGPTError where shapes or dtypes do not belong together.
    """

    values: Tensor
    mask: Tensor
    offsets: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        check_mask_shapes(self.mask, self.offsets, self.shape)
        if self.values.ndim != 1 or len(self.values) < TAIL or self.values.dtype not in DTYPES:
            raise SparseGPTError(
                f"bitmask weight of shape {self.shape} needs values [{TAIL} or more] in floating point; found "
                f"{list(self.values.shape)} {self.values.dtype}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the values, and of the dense weight."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Of its tensors."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors together."""
        return self.values.nbytes + self.mask.nbytes + self.offsets.nbytes

    def settled(self) -> Bitmask:
        """[N, K] -> the same weight as kernels take it: contiguous, an offset for each row, and these right.

        Raises SparseGPTError where offsets and values are not those of the mask.
        """
        offsets = settled_offsets(self.mask, self.offsets, len(self.values))
        return replace(self, values=self.values.contiguous(), mask=self.mask.contiguous(), offsets=offsets)

    def rows(self, part: slice) -> Bitmask:
        """Rows of a settled weight [N, K] -> [n, K], on the same memory; `part` has a start, a stop and no step."""
        if part == slice(0, self.shape[0]):
            return self
        offsets, shape = self.offsets[part.start : part.stop + 1], (part.stop - part.start, self.shape[1])
        return replace(self, mask=self.mask[part], offsets=offsets, shape=shape)


def pack_bitmask(weight: Tensor, name: str = "weight") -> Bitmask:
    """[N, K] floating point, of any pattern -> packed.

    Raises SparseGPTError, with the name, for anything but a 2-D tensor of one of DTYPES.
    """
    if weight.ndim != 2 or weight.dtype not in DTYPES:
        raise SparseGPTError(
            f"{name}: packing needs a 2-D weight in bfloat16, float16, float32 or float64; "
            f"found {tuple(weight.shape)} {weight.dtype}"
        )
    shape = (weight.shape[0], weight.shape[1])
    mask_NW = torch.zeros(mask_shape(shape), dtype=torch.int32, device=weight.device)
    found = [weight.new_empty(0)]
    for rows in chunks(shape):
        weight_NK = pad_columns(weight[rows])
        mask_NK = weight_NK != 0
        mask_NW[rows] = mask_to_words(mask_NK)
        found.append(select(weight_NK, mask_NK))
    return Bitmask(torch.cat([*found, weight.new_zeros(TAIL)]), mask_NW, offsets_of(mask_NW), shape)


def unpack_bitmask(packed: Bitmask) -> Tensor:
    """Packed -> dense [N, K], same dtype and device: the torch twin of every decompression kernel."""
    dense, starts = packed.values.new_empty(packed.shape), row_starts(packed.offsets, packed.shape[0])
    for rows in chunks(packed.shape):
        mask_NK = words_to_mask(packed.mask[rows])
        kept = packed.values[int(starts[rows.start]) : int(starts[rows.stop])]
        weight_NK = packed.values.new_zeros(mask_NK.shape).masked_scatter_(mask_NK, kept)
        dense[rows] = weight_NK[:, : packed.shape[1]]
    return dense


@dataclass(frozen=True)
class BitmaskValues(Form):
    """A bitmask with every kept value as it was: the form of Bitmask."""

    pattern: ClassVar[str] = PATTERN
    demand: ClassVar[str] = DEMAND
    parts: ClassVar[tuple[str, ...]] = ("values", "mask", "offsets")

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Self | None:
        """A bitmask without a word on values."""
        return cls() if settings.get("pattern") == PATTERN and settings.get("values") is None else None

    def settings(self) -> dict[str, Any]:
        """The pattern."""
        return {"pattern": PATTERN}

    @classmethod
    def samples(cls) -> Sequence[Form]:
        """The one there is."""
        return (cls(),)

    def of_model(self, dtype: torch.dtype) -> Form:
        """The same for every dtype."""
        return self

    def promised(self, sparsity: str) -> bool:
        """Any pattern with zeros enough."""
        return is_sparse(sparsity)

    def keeps(self, weight: Tensor) -> bool:
        """[N, K] -> whether it is of a floating-point dtype and has zeros enough."""
        return weight.dtype in DTYPES and has_zeros(weight)

    def pack(self, weight: Tensor, name: str) -> Bitmask:
        """[N, K] -> packed; raises as `pack_bitmask`, and for a weight that has too few zeros."""
        check_zeros(weight, name)
        return pack_bitmask(weight, name)

    def unpack(self, packed: Bitmask) -> Tensor:
        """Packed -> [N, K]."""
        return unpack_bitmask(packed)

    def tensors(self, packed: Bitmask) -> tuple[Tensor, ...]:
        """Packed [N, K] -> values [V + 32], mask [N, Kp / 32] and offsets."""
        return packed.values, packed.mask, packed.offsets

    def packed(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Bitmask:
        """Values, mask and offsets -> packed [N, K]. Raises SparseGPTError where they do not fit."""
        values, mask, offsets = tensors
        return Bitmask(values, mask, offsets, shape)

    def check(self, packed: Bitmask) -> None:
        """Packed [N, K]. Raises SparseGPTError for offsets or values not of the mask, and bits after column K."""
        check_mask(packed.mask, packed.offsets, packed.shape)
        check_count(packed.mask, len(packed.values), packed.values[-TAIL:])

    def stored(self, packed: Bitmask) -> str:
        """Packed [N, K] -> that it is a bitmask, and its dtype."""
        return f"{PATTERN} {str(packed.dtype).removeprefix('torch.')}"


# ---------------------------------------------------------------- masks


def mask_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of the mask's words for a dense (N, K)."""
    return shape[0], padded_columns(shape[1]) // WORD_COLUMNS


def mask_to_words(mask: Tensor) -> Tensor:
    """Kept positions [N, Kp] bool -> [N, Kp / 32] int32."""
    bytes_NB = (mask.contiguous().view(torch.int64) * _GATHER >> 56).to(torch.uint8)
    return bytes_NB.view(torch.int32)


def words_to_mask(words: Tensor) -> Tensor:
    """[N, W] int32 -> kept positions [N, 32 W] bool."""
    bytes_B = words.contiguous().view(torch.uint8).flatten()
    spread = torch.tensor(_SPREAD, dtype=torch.int64, device=words.device).index_select(0, bytes_B.int())
    return spread.view(torch.bool).view(words.shape[0], WORD_COLUMNS * words.shape[1])


def count_rows(words: Tensor) -> Tensor:
    """[N, W] int32 -> set bits of each row [N] int64."""
    pairs = words - (words >> 1 & 0x55555555)
    fours = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
    bytes_NW = fours + (fours >> 4) & 0x0F0F0F0F
    return (bytes_NW * 0x01010101 >> 24 & 63).sum(-1)


def offsets_of(mask: Tensor) -> Tensor:
    """Words [N, W] -> offsets [N + 1], or [1] where every row keeps as many."""
    counts = count_rows(mask)
    same = len(counts) > 0 and bool((counts == counts[0]).all())
    offsets = counts[:1] if same else functional.pad(counts.cumsum(0), (1, 0))
    return offsets.to(torch.int32) if int(offsets[-1]) < 1 << 31 else offsets


def row_starts(offsets: Tensor, rows: int) -> Tensor:
    """Offsets of a weight [N, K], in any form -> [N + 1] int64."""
    if len(offsets) == rows + 1:
        return offsets.long()
    return torch.arange(rows + 1, device=offsets.device) * offsets


def settled_offsets(mask: Tensor, offsets: Tensor, room: int) -> Tensor:
    """Words [N, W] and offsets [N + 1] or [1] -> offsets [N + 1] int64, contiguous.

    room: of how many values there are. Raises SparseGPTError where these are not those of the mask.
    """
    starts = row_starts(offsets, mask.shape[0]).contiguous()
    if starts.device.type != "meta":
        _check_starts(mask, starts)
        check_room(int(starts[-1]), room)
    return starts


# ---------------------------------------------------------------- checks


def is_sparse(sparsity: str) -> bool:
    """Whether a layer pruned to this, as a report says it, has zeros enough to be packed."""
    try:
        return parse_sparsity(sparsity).zeros >= LEAST_ZEROS
    except SparseGPTError:
        return False


def has_zeros(weight: Tensor) -> bool:
    """[N, K] -> whether at least one weight in eight is zero."""
    return weight.numel() > 0 and int(weight.count_nonzero()) <= (1 - LEAST_ZEROS) * weight.numel()


def check_zeros(weight: Tensor, name: str) -> None:
    """[N, K]. Raises SparseGPTError, with the name, for a weight that has too few zeros to be worth packing."""
    if not has_zeros(weight):
        zeros = 1 - int(weight.count_nonzero()) / max(1, weight.numel())
        raise SparseGPTError(
            f"{name}: {zeros:.1%} of its weights are zero, a bitmask pays from {LEAST_ZEROS:.1%} on: prune it first or "
            "leave this layer dense"
        )


def check_mask_shapes(mask: Tensor, offsets: Tensor, shape: tuple[int, int]) -> None:
    """Words and offsets of a weight [N, K]. Raises SparseGPTError where shapes or dtypes do not fit."""
    expected, lengths = mask_shape(shape), (shape[0] + 1, 1)
    fits = tuple(mask.shape) == expected and offsets.ndim == 1 and len(offsets) in lengths
    if not fits or mask.dtype != torch.int32 or offsets.dtype not in (torch.int32, torch.int64):
        raise SparseGPTError(
            f"bitmask weight of shape {shape} needs a mask {expected} in int32 and offsets [{lengths[0]}] or [1] in "
            f"int32 or int64; found {tuple(mask.shape)} {mask.dtype} and {list(offsets.shape)} {offsets.dtype}"
        )


def check_mask(mask: Tensor, offsets: Tensor, shape: tuple[int, int]) -> None:
    """Words [N, W] of a weight [N, K]. Raises SparseGPTError for bits after column K, and offsets of other rows."""
    rest = shape[1] % WORD_COLUMNS
    if rest and bool((mask[:, -1].long() & 0xFFFFFFFF).ge(1 << rest).any()):
        raise SparseGPTError(f"the mask keeps weights after the last of {shape[1]} columns")
    _check_starts(mask, row_starts(offsets, shape[0]))


def check_count(mask: Tensor, room: int, tail: Tensor, spare: int = 0) -> None:
    """Words [N, W]. Raises SparseGPTError where there are not as many values as set bits, and zeros after them.

    room: of how many values there are; spare: so many more may fill the last byte. tail: the last of them.
    """
    kept = int(count_rows(mask).sum())
    check_room(kept, room)
    if room > kept + TAIL + spare or bool(tail.any()):
        raise SparseGPTError(f"the mask keeps {kept} weights: expected as many values and {TAIL} zeros, found {room}")


def check_room(kept: int, room: int) -> None:
    """Raises SparseGPTError where a kernel would read after the last value."""
    if room < kept + TAIL:
        raise SparseGPTError(f"the mask keeps {kept} weights: expected {kept + TAIL} values, found {room}")


def _check_starts(mask: Tensor, starts: Tensor) -> None:
    expected = functional.pad(count_rows(mask).cumsum(0), (1, 0))
    wrong = starts != expected
    if bool(wrong.any()):
        row = int(wrong.to(torch.uint8).argmax())
        raise SparseGPTError(
            f"the mask keeps {int(expected[row])} weights before row {row}, the offsets say {int(starts[row])}"
        )
