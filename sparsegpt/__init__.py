"""One-shot pruning of large language models: layer solvers, a block-by-block driver, perplexity.

Research code needs only torch for the solvers; what needs transformers is imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.hf.registration import register_with_transformers
from sparsegpt.solvers import Pruned, prune_weight
from sparsegpt.solvers.hessian import DampedHessian, HessianAccumulator
from sparsegpt.solvers.masks import layer_mask
from sparsegpt.solvers.methods import Copies, Method
from sparsegpt.sparsity import NM, Unstructured, parse_sparsity

if TYPE_CHECKING:
    from sparsegpt.driver.pipeline import prune_model
    from sparsegpt.driver.reports import PruneReport
    from sparsegpt.driver.rotating import rotate_model
    from sparsegpt.eval.perplexity import perplexity
    from sparsegpt.settings.recipe import read_recipe
    from sparsegpt.shrinking.shrink import shrink_model

    __version__: str

__all__ = [
    "NM",
    "Copies",
    "DampedHessian",
    "HessianAccumulator",
    "Method",
    "PruneReport",
    "Pruned",
    "SparseGPTError",
    "Unstructured",
    "__version__",
    "layer_mask",
    "parse_sparsity",
    "perplexity",
    "prune_model",
    "prune_weight",
    "read_recipe",
    "rotate_model",
    "shrink_model",
]

# From here on transformers' from_pretrained knows packed folders, whether it is imported already or later.
register_with_transformers()

_LAZY = {
    "PruneReport": "sparsegpt.driver.reports",
    "perplexity": "sparsegpt.eval.perplexity",
    "prune_model": "sparsegpt.driver.pipeline",
    "read_recipe": "sparsegpt.settings.recipe",
    "rotate_model": "sparsegpt.driver.rotating",
    "shrink_model": "sparsegpt.shrinking.shrink",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("sparsegpt")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
