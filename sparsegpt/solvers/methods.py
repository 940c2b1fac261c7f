"""Ways to prune one layer: what a `Method` is, and METHODS, the table behind `--method`: one row a method.

A method says which weights matter (`saliency`), or it does everything itself (`solve`). It also says how much memory it
takes, so that a run can be planned. Research code makes its own and gives it to `prune_weight`, `prune_model` or, as
`module:name`, to the command line.
Dimension key: R out_features, C in_features.
"""

import difflib
import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
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
    """A way to prune one layer. Give either `saliency` or `solve`.

    name: as reports call it.
    saliency(weight, hessian): [R, C] -> [R, C]. The least salient weights go, to the exact count of the pattern.
    solve(weight, hessian, pattern, *, block_size): [R, C] -> (weight [R, C], zero where pruned; mask bool [R, C],
    True = kept). weight is float32 or float64, and is what the kept weights should imitate. hessian is a
    `DampedHessian`, pattern an `NM` or an `Unstructured`; block_size: columns that share one threshold.
    updates_weights: the kept weights move, so the method can take corrections.
    per_row: saliencies of a fraction are compared within a row.
    refit: the kept weights are fitted anew on the mask.
    copies: memory at its worst moments.
    Raises SparseGPTError unless exactly one of the two is given.
    """

    name: str
    saliency: Saliency | None = None
    solve: Solver | None = None
    updates_weights: bool = False
    per_row: bool = False
    refit: bool = False
    copies: tuple[Copies, ...] = (Copies(2.3, 5.0),)

    def __post_init__(self) -> None:
        if (self.saliency is None) == (self.solve is None):
            raise SparseGPTError(f"method {self.name!r}: expected either a saliency or a solve function, and not both")

    def prune(
        self, weight: Tensor, hessian: DampedHessian, pattern: Sparsity, *, block_size: int
    ) -> tuple[Tensor, Tensor]:
        """Weight [R, C] -> (weight [R, C], zero where pruned; mask bool [R, C], True = kept), before any refit.

        Raises SparseGPTError for what a method outside of METHODS returns, unless it fits the pattern.
        """
        if self.solve is not None:
            found, mask = self.solve(weight, hessian, pattern, block_size=block_size)
        else:
            assert self.saliency is not None
            saliency = self.saliency(weight, hessian)
            if not self.is_known:
                self._check_saliency(hessian.name, saliency, weight)
            by_row = self.per_row and not isinstance(pattern, NM)
            mask = layer_mask(saliency, replace(pattern, per_row=True) if by_row else pattern)
            found = weight.masked_fill(~mask, 0)
        if not self.is_known:
            self._check(hessian.name, found, mask, weight, pattern)
        return found, mask

    def refitted(self) -> "Method":
        """The same mask, its kept weights fitted anew (solvers/refit.py)."""
        return replace(
            self,
            name=f"{self.name}{REFITTED}",
            updates_weights=True,
            refit=True,
            copies=(*self.copies, REFIT_COPIES),
        )

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
        if not isinstance(saliency, Tensor) or saliency.shape != weight.shape:
            raise self._refusal(layer, f"a saliency {list(weight.shape)}", _shown(saliency))
        if saliency.isnan().any():
            raise self._refusal(layer, "saliencies that can be compared", "NaN among them")

    def _check(self, layer: str, found: Tensor, mask: Tensor, weight: Tensor, pattern: Sparsity) -> None:
        expected = f"a weight {list(weight.shape)} in {weight.dtype}"
        if not isinstance(found, Tensor) or found.shape != weight.shape or found.dtype != weight.dtype:
            raise self._refusal(layer, expected, _shown(found))
        if not isinstance(mask, Tensor) or mask.shape != weight.shape or mask.dtype != torch.bool:
            raise self._refusal(layer, f"a mask {list(weight.shape)} in torch.bool", _shown(mask))
        if found.masked_fill(mask, 0).count_nonzero():
            raise self._refusal(layer, "zeros where the mask is False", "other weights there")
        if not keeps_counts(mask, pattern):
            raise self._refusal(layer, f"a mask of the pattern {pattern}", f"{int(mask.sum())} of {mask.numel()} kept")

    def _refusal(self, layer: str, expected: str, found: str) -> SparseGPTError:
        return SparseGPTError(f"{layer}: method {self.name!r} returned {found}: expected {expected}")


_ROWS = (
    Method("magnitude", saliency=magnitude, copies=(Copies(1.0, 3.0),)),
    Method("wanda", saliency=wanda, per_row=True, copies=(Copies(1.0, 3.0),)),
    Method("sparsegpt", solve=sparsegpt, updates_weights=True, copies=(Copies(2.3, 4.0),)),
    # The two moments are the resolvent and the refit.
    Method("admm", solve=admm, updates_weights=True, copies=(Copies(2.5, 2.0, 2), Copies(2.0, 5.0, 5))),
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
    if method in METHODS:
        return METHODS[method]
    if isinstance(method, str) and ":" in method:
        plain = method.removesuffix(REFITTED)
        found = _load(plain)
        return found if plain == method else _refitted(found)
    raise SparseGPTError(
        f"method {method!r} is not known: choose one of {', '.join(METHODS)}, or module:name of your own"
    )


@functools.cache
def _refitted(method: Method) -> Method:
    return method.refitted()


@functools.cache
def _load(text: str) -> Method:
    """The Method called `module:name`; modules of the current folder are found too."""
    module, _, name = text.partition(":")
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # whatever the module does
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SparseGPTError(f"method {text!r}: module {module!r} cannot be imported: {reason}") from error
    finally:
        sys.path.remove(here)
    if not hasattr(loaded, name):
        nearest = difflib.get_close_matches(name, vars(loaded), n=1)
        hint = f": did you mean {module}:{nearest[0]}?" if nearest else ""
        raise SparseGPTError(f"method {text!r}: module {module!r} has no {name!r}{hint}")
    found = getattr(loaded, name)
    if not isinstance(found, Method):
        raise SparseGPTError(f"method {text!r}: expected a sparsegpt.Method, found {type(found).__name__}")
    return found


def _shown(value: object) -> str:
    return f"{list(value.shape)} in {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
