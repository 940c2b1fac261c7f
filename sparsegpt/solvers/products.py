"""Matrix products for the steps of an iteration: in bfloat16 where the machine multiplies that several times as fast.

A product rounded to one part in 256 only bends a step. What the steps lead to is measured in full precision by whoever
takes them. float64 stays float64.

Dimension key: N rows and columns of the repeated factor, K any number.
"""

import functools

import torch
from torch import Tensor

# Below this width the conversions eat what the products save.
QUICK_WIDTH = 256


class Multiplier:
    """A matrix [N, N] for many products with full matrices; results have its dtype.

    quick: round both factors to bfloat16 where that is faster; the sums are never shorter than the result's rounding.
    """

    def __init__(self, matrix: Tensor, *, quick: bool = True) -> None:
        self.dtype = matrix.dtype
        self.rounded = matrix.to(_quick_dtype(matrix)) if quick else matrix

    def times(self, right: Tensor) -> Tensor:
        """matrix @ right for right [N, K]."""
        return self._product(self.rounded, right.to(self.rounded.dtype))

    def after(self, left: Tensor) -> Tensor:
        """left @ matrix for left [K, N]."""
        return self._product(left.to(self.rounded.dtype), self.rounded)

    def after_finely(self, left: Tensor, matrix: Tensor) -> Tensor:
        """left @ matrix with what the matrix lost in rounding added back, at the cost of two products."""
        product = self.after(left)
        if self.rounded.dtype == self.dtype:
            return product
        remainder = (matrix - self.rounded).to(self.rounded.dtype)
        return product.add_(self._product(left.to(remainder.dtype), remainder))

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        if left.is_cuda and left.dtype != self.dtype:
            product: Tensor = torch.mm(left, right, out_dtype=self.dtype)
            return product
        return (left @ right).to(self.dtype)


def _quick_dtype(matrix: Tensor) -> torch.dtype:
    if matrix.dtype != torch.float32 or matrix.shape[0] < QUICK_WIDTH:
        return matrix.dtype
    return torch.bfloat16 if _multiplies_bfloat16(matrix.device.type) else torch.float32


@functools.cache
def _multiplies_bfloat16(device_type: str) -> bool:
    """Whether products of bfloat16 run on units of their own: tensor cores, AMX or AVX-512 bf16."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device_type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return False
