"""One-shot pruning of large language models: layer solvers, a block-by-block driver, perplexity.

Research code needs only torch for the solvers; what needs transformers is imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.hf.registration import register_with_transformers
from sparsegpt.solvers import Pruned, prune_weight
from sparsegpt.solvers.hessian import HessianAccumulator
from sparsegpt.sparsity import NM, Unstructured, parse_sparsity

if TYPE_CHECKING:
    from sparsegpt.driver.pipeline import prune_model
    from sparsegpt.eval.perplexity import perplexity

__all__ = [
    "NM",
    "HessianAccumulator",
    "Pruned",
    "SparseGPTError",
    "Unstructured",
    "parse_sparsity",
    "perplexity",
    "prune_model",
    "prune_weight",
]

# From here on transformers' from_pretrained knows packed folders, whether it is imported already or later.
register_with_transformers()

_LAZY = {"perplexity": "sparsegpt.eval.perplexity", "prune_model": "sparsegpt.driver.pipeline"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
