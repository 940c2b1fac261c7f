"""Matrix products for the steps of an iteration: rounded to what the machine multiplies several times as fast.

    bfloat16    GPUs with tensor cores for it, CPUs with AVX-512 bf16 or AMX
    int8        other CPUs with AVX-512 VNNI: a scale for each row and column of the two factors, exact 32-bit sums

A rounded product, to one part in 256 of each number or of the largest of a column, only bends a step. What the steps
lead to is measured in full precision before it is used. float64 stays float64.

Work on rows that do not depend on one another is done in pieces, so that temporaries stay small however large the
layer is.

Dimension key: N rows and columns of the repeated factor, K any number.
"""

import functools

import torch
from torch import Tensor

from sparsegpt.solvers.hessian import ScaledHessian
from sparsegpt.strips import strips

# A symmetric matrix whose rows are there, or are made when asked for.
Symmetric = Tensor | ScaledHessian
# Below this width the conversions eat what the products save.
QUICK_WIDTH = 256
# Above it a sum of products of int8 might not fit into 32 bits.
INT8_WIDTH = (1 << 31) // 127**2
# Elements of a piece. On a CPU small ones stay in the caches, large ones multiply faster (BENCHMARKS.md); a GPU wants
# enough of them to be busy.
PIECE, PIECE_ON_GPU = 1 << 20, 1 << 26


class Multiplier:
    """A symmetric matrix [N, N] for many products with full matrices, in its own dtype."""

    def __init__(self, matrix: Symmetric) -> None:
        self._matrix = matrix[:]

    def add_times(self, total: Tensor, right: Tensor) -> Tensor:
        """[N, K], right [N, K] -> total + matrix @ right, [N, K] in the memory of total."""
        return total.addmm_(self._matrix, right)

    def after(self, left: Tensor) -> Tensor:
        """[K, N] -> left @ matrix, [K, N]."""
        return left @ self._matrix

    def after_finely(self, left: Tensor, matrix: Symmetric) -> Tensor:
        """[K, N], matrix [N, N] -> left @ matrix, [K, N], without what the matrix lost in rounding.

        matrix: the one that this was made of.
        """
        return self.after(left)


class _Bfloat16Multiplier(Multiplier):
    """Both factors rounded to bfloat16; the sums are never shorter than the result's rounding."""

    def __init__(self, matrix: Symmetric) -> None:
        self._dtype = matrix.dtype
        self._matrix = torch.empty(matrix.shape, dtype=torch.bfloat16, device=matrix.device)
        for rows in pieces(matrix):
            self._matrix[rows] = matrix[rows]

    def add_times(self, total: Tensor, right: Tensor) -> Tensor:
        return total.add_(self._product(self._matrix, right.bfloat16()))

    def after(self, left: Tensor) -> Tensor:
        return self._product(left.bfloat16(), self._matrix)

    def after_finely(self, left: Tensor, matrix: Symmetric) -> Tensor:
        """What rounding took from the matrix multiplies too: the cost of two products."""
        product = torch.empty_like(left)
        for piece in pieces(left):
            product[piece] = self.after(left[piece])
        for rows in pieces(matrix):
            # Rounded itself, the remainder of 8 bits leaves an error in the 16th.
            remainder = (matrix[rows] - self._matrix[rows]).bfloat16()
            for piece in pieces(left):
                product[piece] += self._product(left[piece, rows].bfloat16(), remainder)
        return product

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        if left.is_cuda:
            product: Tensor = torch.mm(left, right, out_dtype=self._dtype)
            return product
        return (left @ right).to(self._dtype)


class _Int8Multiplier(Multiplier):
    """Both factors as int8 times a scale for each row of the left and each column of the right.

    The diagonal is multiplied apart, in full precision: it dwarfs the rest of its row, and would leave that rest few of
    the 8 bits.
    """

    def __init__(self, matrix: Symmetric) -> None:
        self._diagonal_N = matrix.diagonal().clone()
        self._matrix = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
        self._scale_N = torch.empty_like(self._diagonal_N)
        for rows in pieces(matrix):
            part = matrix[rows].clone() if isinstance(matrix, Tensor) else matrix[rows]
            part.diagonal(rows.start).zero_()
            self._matrix[rows], scale = _to_int8(part, 1)
            self._scale_N[rows] = scale[:, 0]

    def add_times(self, total: Tensor, right: Tensor) -> Tensor:
        right_NK, scale_K = _to_int8(right, 0)
        product = torch._int_mm(self._matrix, right_NK).to(right.dtype).mul_(scale_K)
        return total.addcmul_(product, self._scale_N[:, None]).addcmul_(right, self._diagonal_N[:, None])

    def after(self, left: Tensor) -> Tensor:
        left_KN, scale_K = _to_int8(left, 1)
        product = torch._int_mm(left_KN, self._matrix.T).to(left.dtype)
        return product.mul_(scale_K).mul_(self._scale_N).addcmul_(left, self._diagonal_N)

    def after_finely(self, left: Tensor, matrix: Symmetric) -> Tensor:
        product = torch.zeros_like(left)
        for rows in pieces(matrix):
            product.addmm_(left[:, rows], matrix[rows])
        return product


def multiplier(matrix: Symmetric, rounded: torch.dtype | None) -> Multiplier:
    """[N, N] -> its multiplier, which rounds to bfloat16 or int8, or not at all (None)."""
    kinds = {None: Multiplier, torch.bfloat16: _Bfloat16Multiplier, torch.int8: _Int8Multiplier}
    return kinds[rounded](matrix)


def quick_dtype(matrix: Symmetric) -> torch.dtype | None:
    """[N, N] -> what products with it are rounded to where that is faster on its device; None where it is not."""
    width = matrix.shape[0]
    if matrix.dtype != torch.float32 or width < QUICK_WIDTH:
        return None
    dtype = _quick_dtype(matrix.device.type)
    return None if dtype == torch.int8 and width > INT8_WIDTH else dtype


def pieces(matrix: Symmetric) -> list[slice]:
    """[K, N] -> its rows in slices of about PIECE elements."""
    elements = PIECE if matrix.device.type == "cpu" else PIECE_ON_GPU
    return strips(matrix.shape[0], max(1, elements // max(1, matrix.shape[1])))


def _to_int8(matrix: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """[K, N] -> (int8 [K, N], scale along `dim`: [K, 1] or [1, N]), whose product is the matrix."""
    scale = torch.maximum(matrix.amax(dim, keepdim=True), -matrix.amin(dim, keepdim=True)).div_(127)
    scale.masked_fill_(scale == 0, 1)
    return (matrix / scale).round_().to(torch.int8), scale


@functools.cache
def _quick_dtype(device_type: str) -> torch.dtype | None:
    """What a device multiplies on units of their own, several times as fast as float32; None where there are none."""
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device_type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        if any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16")):
            return torch.bfloat16
        if capabilities.get("avx512_vnni", False) and hasattr(torch, "_int_mm"):
            return torch.int8
    return None
