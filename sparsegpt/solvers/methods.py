"""Ways to prune one layer: what a `Method` is, and METHODS, the table of those that have a name: one row a method.

A method says which weights matter (`saliency`), or it does everything itself (`solve`). It also says how much memory it
takes, so that a run can be planned. Research code makes its own and gives it to `prune_weight`, `prune_model` or, as
`module:name`, to the command line and to recipes.
Dimension key: R out_features, C in_features.
"""

import difflib
import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError, did_you_mean
from sparsegpt.solvers.admm import admm
from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.solvers.magnitude import magnitude
from sparsegpt.solvers.masks import keeps_counts, layer_mask
from sparsegpt.solvers.sparsegpt import sparsegpt
from sparsegpt.solvers.wanda import wanda
from sparsegpt.sparsity import NM, Sparsity

# (weight [R, C], Hessian) -> saliency [R, C]
Saliency = Callable[[Tensor, DampedHessian], Tensor]
# (weight [R, C], Hessian, pattern, block_size=...) -> (weight [R, C], mask bool [R, C])
Solver = Callable[..., tuple[Tensor, Tensor]]
REFITTED = "+refit"


class Copies(NamedTuple):
    """What a method holds at one of its worst moments, in float32, the Hessian and its factor included.

    squares: matrices [C, C]. layers: matrices [R, C]. pieces: pieces of rows (`products.pieces`).
    """

    squares: float
    layers: float
    pieces: int = 0


REFIT_COPIES = Copies(3.0, 6.0, 5)


@dataclass(frozen=True)
class Method:
    """A way to prune one layer: weight [R, C] -> weight [R, C] and mask bool [R, C]. Give either `saliency` or `solve`.

    name: as reports call it.
    saliency(weight, hessian): [R, C] -> [R, C]. The least salient weights go, to the exact count of the pattern.
    solve(weight, hessian, pattern, *, block_size): [R, C] -> (weight [R, C], zero where pruned; mask bool [R, C],
    True = kept). weight is float32 or float64, and is what the kept weights should imitate. hessian is a
    `DampedHessian`, which other layers may share: it must stay as it is. pattern is an `NM` or an `Unstructured`;
    block_size: columns that share one threshold.
    updates_weights: the kept weights move, so the method can take corrections.
    per_row: saliencies of a fraction are compared within a row.
    refit: the kept weights are fitted anew on the mask.
    joint: on a grid of integers its sweep can choose mask and integers together (solvers/rounding.py).
    whole: inputs leave as a whole, also in an expert that too few tokens reached: its Hessian is the identity then.
    by_rows: a row is solved without a look at the others, wherever the pattern is of groups or rows: several processes
    may then solve parts of a layer.
    copies: memory at its worst moments.
    Raises SparseGPTError unless exactly one of the two functions is given.
    """

    name: str
    saliency: Saliency | None = None
    solve: Solver | None = None
    updates_weights: bool = False
    per_row: bool = False
    refit: bool = False
    joint: bool = False
    whole: bool = False
    by_rows: bool = False
    copies: tuple[Copies, ...] = (Copies(2.3, 5.0),)

    def __post_init__(self) -> None:
        given = [function for function in (self.saliency, self.solve) if function is not None]
        if len(given) != 1:
            raise SparseGPTError(
                f"method {self.name!r}: expected a saliency or a solve function, found {'both' if given else 'neither'}"
            )
        if not callable(given[0]):
            raise SparseGPTError(f"method {self.name!r}: expected a function, found {_shown(given[0])}")

    def prune(
        self, weight: Tensor, hessian: DampedHessian, pattern: Sparsity, *, block_size: int
    ) -> tuple[Tensor, Tensor]:
        """Weight [R, C], Hessian [C, C] -> (weight [R, C], zero where pruned; mask bool [R, C], True = kept).

        This is before any refit. Raises SparseGPTError, naming the layer, for what a method outside of METHODS returns,
        unless it fits weight and pattern.
        """
        if not self.is_known:
            # A copy: research code may work in place, and the loss is compared with what the weight was.
            found, mask = self._solved(weight.clone(), hessian, pattern, block_size)
            self._check(hessian.name, found, mask, weight, pattern)
            return found.masked_fill(~mask, 0), mask  # a product with the mask leaves zeros of both signs
        return self._solved(weight, hessian, pattern, block_size)

    def _solved(
        self, weight: Tensor, hessian: DampedHessian, pattern: Sparsity, block_size: int
    ) -> tuple[Tensor, Tensor]:
        if self.solve is not None:
            result = self.solve(weight, hessian, pattern, block_size=block_size)
            if not isinstance(result, tuple) or len(result) != 2:
                raise self._refusal(hessian.name, "(weight, mask)", _shown(result))
            return result
        assert self.saliency is not None
        saliency = self.saliency(weight, hessian)
        if not self.is_known:
            self._check_saliency(hessian.name, saliency, weight)
        if self.per_row and not isinstance(pattern, NM):
            pattern = replace(pattern, per_row=True)
        mask = layer_mask(saliency, pattern)
        return weight.masked_fill(~mask, 0), mask

    def refitted(self) -> "Method":
        """The same mask, its kept weights fitted anew (solvers/refit.py); itself, if they are already."""
        if self.refit:
            return self
        return replace(
            self,
            name=f"{self.name}{REFITTED}",
            updates_weights=True,
            refit=True,
            joint=False,
            copies=(*self.copies, REFIT_COPIES),
        )

    def parts_rows(self, pattern: Sparsity) -> bool:
        """Whether each row of a layer can be solved without the others."""
        row_by_row = isinstance(pattern, NM) or pattern.per_row or self.per_row or not pattern.zeros
        return self.by_rows and row_by_row

    @property
    def is_known(self) -> bool:
        """Whether it is a row of METHODS."""
        return METHODS.get(self.name) is self

    @property
    def source_digest(self) -> str:
        """sha256 of the file that its function comes from: another file may prune otherwise. "" without a file."""
        function = self.solve or self.saliency
        assert function is not None
        try:
            return hashlib.sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()
        except (OSError, TypeError):
            return ""

    def _check_saliency(self, layer: str, saliency: Tensor, weight: Tensor) -> None:
        fits = isinstance(saliency, Tensor) and (saliency.shape, saliency.device) == (weight.shape, weight.device)
        if not fits or saliency.is_complex() or saliency.dtype == torch.bool:
            expected = f"a saliency {list(weight.shape)} of real numbers on {weight.device}"
            raise self._refusal(layer, expected, _shown(saliency))
        if saliency.isnan().any():
            raise self._refusal(layer, "saliencies that can be compared", "NaN among them")

    def _check(self, layer: str, found: Tensor, mask: Tensor, weight: Tensor, pattern: Sparsity) -> None:
        for name, tensor, dtype in (("weight", found, weight.dtype), ("mask", mask, torch.bool)):
            wanted = (weight.shape, dtype, weight.device)
            if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype, tensor.device) != wanted:
                expected = f"a {name} {list(weight.shape)} in {dtype} on {weight.device}"
                raise self._refusal(layer, expected, _shown(tensor))
        if not torch.isfinite(found).all():
            raise self._refusal(layer, "finite weights", "NaN or infinite ones")
        if found.masked_fill(mask, 0).count_nonzero():
            raise self._refusal(layer, "zeros where the mask is False", "other weights there")
        if not keeps_counts(mask, pattern):
            raise self._refusal(layer, f"a mask of the pattern {pattern}", f"{int(mask.sum())} of {mask.numel()} kept")

    def _refusal(self, layer: str, expected: str, found: str) -> SparseGPTError:
        return SparseGPTError(f"{layer}: method {self.name!r} returned {found}: expected {expected}")


_ROWS = (
    Method("magnitude", saliency=magnitude, by_rows=True, copies=(Copies(1.0, 3.0),)),
    Method("wanda", saliency=wanda, per_row=True, by_rows=True, copies=(Copies(1.0, 3.0),)),
    Method("sparsegpt", solve=sparsegpt, updates_weights=True, joint=True, by_rows=True, copies=(Copies(2.3, 4.0),)),
    # The two moments are the resolvent and the refit.
    Method("admm", solve=admm, updates_weights=True, by_rows=True, copies=(Copies(2.5, 2.0, 2), Copies(2.0, 5.0, 5))),
)
# admm refits already.
METHODS: dict[str, Method] = {
    **{method.name: method for method in _ROWS},
    **{f"{method.name}{REFITTED}": method.refitted() for method in _ROWS if method.name != "admm"},
}


def parse_method(method: str | Method) -> Method:
    """A method itself, a row of METHODS by its name, or `module:name` (+refit) of research code.

    Raises SparseGPTError with the known names, or with what went wrong in the module.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    if isinstance(method, str) and ":" in method:
        plain = method.removesuffix(REFITTED)
        found = _load(plain)
        return found if plain == method else _refitted(found)
    plain = str(method).removesuffix(REFITTED)
    hint = f"; {plain} refits by itself" if plain in METHODS else did_you_mean(str(method), METHODS)
    raise SparseGPTError(
        f"method {method!r} is not known: expected one of {', '.join(METHODS)}, or module:name of your own{hint}"
    )


@functools.cache
def _refitted(method: Method) -> Method:
    return method.refitted()


@functools.cache
def _load(text: str) -> Method:
    """The Method called `module:name`; modules of the current folder are found too."""
    module, _, name = text.partition(":")
    try:
        with _current_folder():
            loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the module does
        reason = " ".join([f"{type(error).__name__}:", *str(error).split()])
        raise SparseGPTError(f"method {text!r}: module {module!r} cannot be imported: {reason}") from error
    if not hasattr(loaded, name):
        known = [key for key, value in vars(loaded).items() if isinstance(value, Method)]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
        hint = f"did you mean {module}:{nearest[0]}?" if nearest else "nor any other Method"
        raise SparseGPTError(f"method {text!r}: module {module!r} has no {name!r}: {hint}")
    found = getattr(loaded, name)
    if not isinstance(found, Method):
        raise SparseGPTError(f"method {text!r}: expected a sparsegpt.Method, found {_shown(found)}")
    return found


@contextmanager
def _current_folder() -> Iterator[None]:
    """Modules of the current folder are found, after all others, for this long."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} in {value.dtype} on {value.device}"
    return f"a {type(value).__name__}"
