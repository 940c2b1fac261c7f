"""The layer Hessian H = sum over tokens of x x^T: accumulation, damping, and its inverse's Cholesky factor.

It comes as four types. HessianAccumulator sums it up; the sum is a plain tensor, which `prune_weight` takes;
DampedHessian is this tensor with its damping and factor, which a method takes; ScaledHessian is what a DampedHessian is
once columns are scaled.

Dimension key: T tokens, C in_features, R out_features, K some of the columns.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.solvers.factor import inverse_factor
from sparsegpt.strips import strips

# Tried in this order, first in the requested precision and then in float64, before giving up.
DAMPING_STEPS = (1, 10, 100)
# Column blocks of the Gram product: only the upper block triangle is multiplied. Narrower layers take one product.
GRAM_BLOCK = 512


class HessianAccumulator:
    """Running H [C, C] = sum x x^T over the inputs of one layer.

    add(inputs [..., C]) as often as needed; .hessian is the float32 [C, C] sum, .tokens the number of rows seen.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.width, self.device, self.tokens = in_features, self._gram.device, 0

    def add(self, inputs: Tensor) -> None:
        """[..., C]: add the Gram matrix of inputs of any float dtype, moved to the accumulator's device."""
        x_TC = inputs.detach().reshape(-1, inputs.shape[-1]).to(self._gram.device)
        if not x_TC.is_cuda:
            x_TC = x_TC.float()  # once, not for every block of columns
        self.tokens += x_TC.shape[0]
        for block in strips(x_TC.shape[1], GRAM_BLOCK):
            self._gram[: block.stop, block] += exact_product(x_TC[:, : block.stop].T, x_TC[:, block])

    def over(self, total: Callable[[Tensor], Tensor]) -> None:
        """Become the sum of what several have gathered. total: [...] -> the sum of theirs, in the same memory."""
        for block in strips(self.width, GRAM_BLOCK):
            self._gram[: block.stop, block] = total(self._gram[: block.stop, block].contiguous())
        self.tokens = int(total(torch.tensor(self.tokens)))

    @property
    def hessian(self) -> Tensor:
        """[C, C] float32: the sum so far, symmetric to the bit. A copy: more may be added."""
        return self.take().clone()

    def take(self) -> Tensor:
        """[C, C] float32: `hessian` in the accumulator's own memory. Call last: the accumulator is used up."""
        for block in strips(len(self._gram), GRAM_BLOCK):
            self._gram[block, : block.start] = self._gram[: block.start, block].T
            # A block's own product may differ in the last bit across its diagonal: its upper half says both.
            corner = self._gram[block, block].triu()
            self._gram[block, block] = corner + corner.triu(1).T
        return self._gram


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """[K, T], [T, C] -> float32 [K, C]: left @ right of any float dtype.

    Products of halves are exact, TF32 is never used.
    """
    with full_precision_matmul():
        product: Tensor
        if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
            # The tensor cores multiply halves exactly and add in float32; an upcast would cost memory and time.
            product = torch.mm(left, right, out_dtype=torch.float32)
        else:
            product = left.float() @ right.float()
        return product


def check_finite(diagonal: Tensor, name: str) -> None:
    """[C], sums of squares of a layer's inputs. Raises SparseGPTError, with its name, unless all are finite."""
    if not torch.isfinite(diagonal).all():
        raise SparseGPTError(
            f"{name}: its inputs contain NaN or infinite activations; run the model in float32 or bfloat16",
            settings=("dtype",),
        )


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
    """One shared input's Hessian [C, C], with everything the solvers derive from it computed at most once.

    hessian: symmetric, any positive scale; `raw` is the same in `dtype`. damping: fraction of mean(diag H) added to the
    diagonal. Inputs that never fired (H_jj = 0, `dead`, bool [C]) get the mean diagonal, so that they neither break nor
    bend the rest.
    Raises SparseGPTError, naming the layer, when H has NaN or inf, or when no step of damping makes it positive
    definite (steps: 1x, 10x, 100x of `damping`, in `dtype` and then in float64).

    keep_factor: further layers will ask for the inverse factor; otherwise a solver frees it after its last use.
    """

    def __init__(
        self, hessian: Tensor, damping: float = 0.01, *, dtype: torch.dtype = torch.float32, name: str = "layer"
    ) -> None:
        self.name = name
        self.raw = hessian.to(dtype)
        diagonal = self.raw.diagonal()
        check_finite(diagonal, name)
        self.dead = diagonal == 0
        self.mean_diagonal = float(diagonal[~self.dead].mean()) if not self.dead.all() else 1.0
        self.requested_damping = damping
        self.keep_factor = False
        self._ordered: tuple[Tensor, DampedHessian] | None = None

    def matrix(self, damping: float) -> Tensor:
        """[C, C], new: H with dead diagonals filled and `damping` times the mean diagonal added."""
        return self.raw.diagonal_scatter(self._diagonal(damping))

    def _diagonal(self, damping: float) -> Tensor:
        return self.raw.diagonal().masked_fill(self.dead, self.mean_diagonal) + damping * self.mean_diagonal

    @functools.cached_property
    def damping(self) -> float:
        """The damping that was used: the requested one unless H + damping was not positive definite."""
        return self._factorised[1]

    @property
    def inverse_factor(self) -> Tensor:
        """[C, C]: the upper U with U^T U = (H + damping)^-1.

        Raises SparseGPTError, naming the layer, where no step of damping makes H positive definite.
        """
        return self._factorised[0]

    @functools.cached_property
    def inverse_diagonal(self) -> Tensor:
        """[C]: the diagonal of (H + damping)^-1. Raises SparseGPTError as `inverse_factor` does."""
        squares_C = torch.zeros_like(self.raw.diagonal())  # of U's columns, as (U^T U)_jj = |U_:j|^2
        for rows in self.inverse_factor.split(GRAM_BLOCK):
            squares_C += rows.square().sum(0)
        return squares_C

    def ordered(self, order: Tensor) -> "DampedHessian":
        """[C] -> the same of inputs in this order. Made once for all layers that ask for the same order in turn."""
        known = self._ordered
        if known is None or not torch.equal(known[0], order):
            other = DampedHessian(
                self.raw[order][:, order], self.requested_damping, dtype=self.raw.dtype, name=self.name
            )
            self._ordered = known = order, other
        known[1].keep_factor = self.keep_factor
        return known[1]

    def release_factor(self) -> None:
        """Free the inverse factor, unless it is to be kept; what was derived from it stays known.

        Asked for again, it is computed again.
        """
        if not self.keep_factor:
            _ = self.damping, self.inverse_diagonal
            self.__dict__.pop("_factorised", None)

    @contextmanager
    def keeping_factor(self) -> Iterator[None]:
        """What is done meanwhile leaves the inverse factor for what follows."""
        before, self.keep_factor = self.keep_factor, True
        try:
            yield
        finally:
            self.keep_factor = before

    @functools.cached_property
    def damped(self) -> Tensor:
        """[C, C]: H + damping, positive definite. Raises SparseGPTError as `inverse_factor` does."""
        return self.matrix(self.damping)

    @property
    def damped_diagonal(self) -> Tensor:
        """[C]: the diagonal of `damped`, without the matrix."""
        return self._diagonal(self.damping)

    def solve(self, right: Tensor) -> Tensor:
        """[R, C] -> [R, C]: right @ (H + damping)^-1. Raises SparseGPTError as `inverse_factor` does."""
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
            "in float64 either; raise the damping or give more calibration samples",
            settings=("damping", "samples"),
        )


class ScaledHessian:
    """S^-1 (H + damping) S^-1, [C, C], for a diagonal S = `scale` [C]: rows are made when asked for, none are kept.

    Like a tensor it has shape, dtype, device, diagonal() and rows by slices.
    """

    def __init__(self, hessian: DampedHessian, scale: Tensor) -> None:
        self._raw, self._scale_C = hessian.raw, scale
        self._diagonal_C = hessian.damped_diagonal / scale.square()
        self.shape, self.dtype, self.device = hessian.raw.shape, hessian.raw.dtype, hessian.raw.device

    def diagonal(self) -> Tensor:
        """[C]: its diagonal."""
        return self._diagonal_C

    def __getitem__(self, rows: slice) -> Tensor:
        """[K, C], new: these rows."""
        part_KC = (self._raw[rows] / self._scale_C).div_(self._scale_C[rows, None])
        part_KC.diagonal(rows.start or 0).copy_(self._diagonal_C[rows])
        return part_KC
