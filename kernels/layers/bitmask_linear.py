"""Linear layers whose weight stays packed as a bitmask: any pattern (format/bitmask.py, format/bitmask_integers.py)."""

from __future__ import annotations

from sparsegpt.kernels.dispatch.bitmask import BITMASK, BITMASK_INTEGERS
from sparsegpt.kernels.format.bitmask import Bitmask, BitmaskValues
from sparsegpt.kernels.format.bitmask_integers import BitmaskIntegers, QuantizedBitmask
from sparsegpt.kernels.layers.linear import PackedLinear
from sparsegpt.kernels.layers.quantized_linear import IntegerLinear


class BitmaskLinear(PackedLinear):
    """[..., K] -> [..., N], `torch.nn.Linear` on a packed weight; made by `from_packed`.

    Buffers: values [V + 32] floating point, mask [out, Kp / 32] int32, offsets [out + 1] or [1] int32, bias [out] or
    None. Inputs, outputs and bias have the dtype of `values`; under autocast inputs are cast to it.
    """

    table = BITMASK

    @staticmethod
    def form_of(packed: Bitmask) -> BitmaskValues:
        """Packed [N, K] -> the one form there is."""
        return BitmaskValues()


class QuantizedBitmaskLinear(IntegerLinear):
    """[..., K] -> [..., N], `torch.nn.Linear` on a packed weight with integer values; made by `from_packed`.

    Buffers: integers [bytes] uint8, scales [out, ceil(Kp / group_size)] int16 (float16 bits), mask, offsets and bias as
    in BitmaskLinear.
    """

    table = BITMASK_INTEGERS

    @staticmethod
    def form_of(packed: QuantizedBitmask) -> BitmaskIntegers:
        """Packed [N, K] -> its bits, group size and dtype."""
        return BitmaskIntegers(packed.bits, packed.group_size, packed.dtype)
