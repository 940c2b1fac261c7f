"""One-shot pruning of large language models: layer solvers, a block-by-block driver, perplexity.

Importing this loads neither torch nor transformers: what needs them is imported when first used.
"""

from typing import TYPE_CHECKING

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.hf.registration import register_with_transformers
from sparsegpt.lazy import lazy_names
from sparsegpt.sparsity import NM, Unstructured, parse_sparsity

if TYPE_CHECKING:
    from sparsegpt.driver.pipeline import prune_model
    from sparsegpt.driver.reports import PruneReport
    from sparsegpt.driver.rotating import rotate_model
    from sparsegpt.eval.perplexity import perplexity
    from sparsegpt.settings.recipe import read_recipe
    from sparsegpt.shrinking.shrink import shrink_model
    from sparsegpt.solvers import Copies, Method, Pruned, prune_weight
    from sparsegpt.solvers.hessian import DampedHessian, HessianAccumulator
    from sparsegpt.solvers.masks import layer_mask
    from sparsegpt.version import __version__
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Copies": "sparsegpt.solvers.methods",
            "DampedHessian": "sparsegpt.solvers.hessian",
            "HessianAccumulator": "sparsegpt.solvers.hessian",
            "Method": "sparsegpt.solvers.methods",
            "PruneReport": "sparsegpt.driver.reports",
            "Pruned": "sparsegpt.solvers.layer",
            "__version__": "sparsegpt.version",
            "layer_mask": "sparsegpt.solvers.masks",
            "perplexity": "sparsegpt.eval.perplexity",
            "prune_model": "sparsegpt.driver.pipeline",
            "prune_weight": "sparsegpt.solvers.layer",
            "read_recipe": "sparsegpt.settings.recipe",
            "rotate_model": "sparsegpt.driver.rotating",
            "shrink_model": "sparsegpt.shrinking.shrink",
        },
    )

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
