"""The layer Hessian H = sum over tokens of x x^T: accumulation, damping, and its inverse's Cholesky factor.

Dimension key: T tokens, C in_features.

The factor. SparseGPT needs the upper U with U^T U = (H + damping)^-1. With J the reversal of all columns and
J H J = L L^T, the matrix V = J L J is upper and H = V V^T, hence U = V^-1: one factorisation and one triangular
inverse, instead of two factorisations around a full inverse.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError

# Tried in this order, first in the requested precision and then in float64, before giving up.
DAMPING_STEPS = (1, 10, 100)
# Column blocks of the Gram product: only the upper block triangle is multiplied. Narrower layers take one product.
GRAM_BLOCK = 512


class HessianAccumulator:
    """Running H = sum x x^T over the inputs of one layer.

    add(inputs [..., C]) as often as needed; .hessian is the float32 [C, C] sum, .tokens the number of rows seen.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.width, self.device, self.tokens = in_features, self._gram.device, 0

    def add(self, inputs: Tensor) -> None:
        """Add the Gram matrix of inputs [..., C]; any float dtype, moved to the accumulator's device."""
        x_TC = inputs.detach().reshape(-1, inputs.shape[-1]).to(self._gram.device)
        if not x_TC.is_cuda:
            x_TC = x_TC.float()  # once, not for every block of columns
        self.tokens += x_TC.shape[0]
        width = x_TC.shape[1]
        for start in range(0, width, GRAM_BLOCK):
            end = min(start + GRAM_BLOCK, width)
            self._gram[:end, start:end] += exact_product(x_TC[:, :end].T, x_TC[:, start:end])

    @property
    def hessian(self) -> Tensor:
        """The sum so far, [C, C] float32, symmetric to the bit; a copy, so that more may be added."""
        return self.take().clone()

    def take(self) -> Tensor:
        """The sum as `hessian` gives it, in the accumulator's own memory: for whoever adds nothing any more."""
        width = self._gram.shape[0]
        for start in range(0, width, GRAM_BLOCK):
            end = min(start + GRAM_BLOCK, width)
            self._gram[start:end, :start] = self._gram[:start, start:end].T
            corner = self._gram[start:end, start:end].triu()
            self._gram[start:end, start:end] = corner + corner.triu(1).T
        return self._gram


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, for any input dtype: half-precision products are exact, TF32 is never used."""
    with full_precision_matmul():
        product: Tensor
        if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
            # The tensor cores multiply halves exactly and add in float32; an upcast would cost memory and time.
            product = torch.mm(left, right, out_dtype=torch.float32)
        else:
            product = left.float() @ right.float()
        return product


@contextmanager
def full_precision_matmul() -> Iterator[None]:
    """float32 matrix products without TF32 on CUDA, whatever the process has set."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


class DampedHessian:
    """One shared input's Hessian, with everything the solvers derive from it computed at most once.

    hessian: [C, C], symmetric, any positive scale. damping: fraction of mean(diag H) added to the diagonal.
    Inputs that never fired (H_jj = 0, `dead`) get the mean diagonal, so that they neither break nor bend the rest.
    Raises SparseGPTError, naming the layer, when H has NaN or inf, or when no step of damping makes it positive
    definite (steps: 1x, 10x, 100x of `damping`, in `dtype` and then in float64).

    keep_factor: further layers will ask for the inverse factor; otherwise a solver lets it go after its last use.
    """

    def __init__(
        self, hessian: Tensor, damping: float = 0.01, *, dtype: torch.dtype = torch.float32, name: str = "layer"
    ) -> None:
        self.name = name
        self.raw = hessian.to(dtype)
        diagonal = self.raw.diagonal()
        if not torch.isfinite(diagonal).all():
            raise SparseGPTError(
                f"{name}: its inputs contain NaN or infinite activations; try --dtype float32 or bfloat16"
            )
        self.dead = diagonal == 0
        self.mean_diagonal = float(diagonal[~self.dead].mean()) if not self.dead.all() else 1.0
        self.requested_damping = damping
        self.keep_factor = False

    def matrix(self, damping: float) -> Tensor:
        """H with dead diagonals filled and `damping` times the mean diagonal added, [C, C]."""
        return self.raw.diagonal_scatter(self._diagonal(damping))

    def _diagonal(self, damping: float) -> Tensor:
        return self.raw.diagonal().masked_fill(self.dead, self.mean_diagonal) + damping * self.mean_diagonal

    @functools.cached_property
    def damping(self) -> float:
        """The damping that was used: the requested one unless H + damping was not positive definite."""
        return self._factorised[1]

    @property
    def inverse_factor(self) -> Tensor:
        """Upper U [C, C] with U^T U = (H + damping)^-1."""
        return self._factorised[0]

    @functools.cached_property
    def inverse_diagonal(self) -> Tensor:
        """Diagonal of (H + damping)^-1, [C]."""
        lengths_C: Tensor = torch.linalg.vector_norm(self.inverse_factor, dim=0)
        return lengths_C.square()

    def release_factor(self) -> None:
        """Let the inverse factor go, unless it is to be kept; what was derived from it stays known.

        Whoever asks for it again waits for a second factorisation.
        """
        if not self.keep_factor:
            _ = self.damping, self.inverse_diagonal
            self.__dict__.pop("_factorised", None)

    @functools.cached_property
    def damped(self) -> Tensor:
        """H + damping, positive definite, [C, C]."""
        return self.matrix(self.damping)

    @property
    def damped_diagonal(self) -> Tensor:
        """Diagonal of `damped`, [C], without the matrix."""
        return self._diagonal(self.damping)

    def solve(self, right: Tensor) -> Tensor:
        """right @ (H + damping)^-1 for right [R, C]."""
        return right @ self.inverse_factor.T @ self.inverse_factor

    @functools.cached_property
    def _factorised(self) -> tuple[Tensor, float]:
        for dtype in dict.fromkeys((self.raw.dtype, torch.float64)):
            for step in DAMPING_STEPS:
                damping = self.requested_damping * step
                factor = inverse_factor(self.matrix(damping).to(dtype))
                if factor is not None:
                    return factor.to(self.raw.dtype), damping
        raise SparseGPTError(
            f"{self.name}: Hessian is not positive definite at damping={self.requested_damping * DAMPING_STEPS[-1]:g}, "
            "in float64 either; raise --damping or give more calibration samples"
        )


class ScaledHessian:
    """S^-1 (H + damping) S^-1 for a diagonal S = `scale` [C]: rows of it are made when asked for, none are kept.

    Like a tensor [C, C] it has shape, dtype, device, diagonal() and rows by slices.
    """

    def __init__(self, hessian: DampedHessian, scale: Tensor) -> None:
        self._raw, self._scale_C = hessian.raw, scale
        self._diagonal_C = hessian.damped_diagonal / scale.square()
        self.shape, self.dtype, self.device = hessian.raw.shape, hessian.raw.dtype, hessian.raw.device

    def diagonal(self) -> Tensor:
        """Its diagonal, [C]."""
        return self._diagonal_C

    def __getitem__(self, rows: slice) -> Tensor:
        """New memory with these rows, [K, C]."""
        part_KC = (self._raw[rows] / self._scale_C).div_(self._scale_C[rows, None])
        part_KC.diagonal(rows.start or 0).copy_(self._diagonal_C[rows])
        return part_KC


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """Upper U with U^T U = matrix^-1 for a symmetric matrix [C, C]; None where it is not positive definite.

    The matrix's own memory is used up: a wide layer's Hessian may be larger than its block's weights. With J the
    reversal of an axis, J A J = L L^T gives U = J L^-1 J.
    """
    lower = cholesky_in_place(_reverse(matrix.contiguous()))
    if lower is None:
        return None
    invert_lower(lower)
    factor = _reverse(lower)
    return factor if all(torch.isfinite(rows).all() for rows in factor.split(GRAM_BLOCK)) else None


def cholesky_in_place(matrix: Tensor) -> Tensor | None:
    """Lower L [C, C], L L^T = matrix, in a contiguous matrix's own memory; None where it is not positive definite."""
    # LAPACK counts by columns: what it calls the upper factor of the transposed view is the lower one here.
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    _, failed = torch.linalg.cholesky_ex(matrix.T, upper=True, out=(matrix.T, info))
    return None if failed else matrix


def _reverse(matrix: Tensor) -> Tensor:
    """Reverse both axes of a contiguous matrix in place."""
    flat = matrix.view(-1)
    half = len(flat) // 2
    for start in range(0, half, GRAM_BLOCK**2):
        end = min(start + GRAM_BLOCK**2, half)
        front = flat[start:end].clone()
        flat[start:end] = flat[len(flat) - end : len(flat) - start].flip(0)
        flat[len(flat) - end : len(flat) - start] = front.flip(0)
    return matrix


def invert_lower(lower: Tensor, base: int = 128) -> None:
    """Invert a lower triangular matrix [C, C] in place, by halves: a third of the work of a general solve."""
    size = lower.shape[0]
    if size <= base:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    top, bottom, corner = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    invert_lower(top, base)
    product = corner @ top
    invert_lower(bottom, base)
    corner.addmm_(bottom, product, beta=0, alpha=-1)
