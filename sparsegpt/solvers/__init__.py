"""Layer solvers: tensors in, `Pruned` out. One file a method, one row a method in METHODS."""

from typing import TYPE_CHECKING

from sparsegpt.lazy import lazy_names

if TYPE_CHECKING:
    from sparsegpt.solvers.layer import Pruned, Rounding, prune_layer, prune_weight
    from sparsegpt.solvers.methods import METHODS, Copies, Method, parse_method
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "METHODS": "sparsegpt.solvers.methods",
            "Copies": "sparsegpt.solvers.methods",
            "Method": "sparsegpt.solvers.methods",
            "Pruned": "sparsegpt.solvers.layer",
            "Rounding": "sparsegpt.solvers.layer",
            "parse_method": "sparsegpt.solvers.methods",
            "prune_layer": "sparsegpt.solvers.layer",
            "prune_weight": "sparsegpt.solvers.layer",
        },
    )

__all__ = ["METHODS", "Copies", "Method", "Pruned", "Rounding", "parse_method", "prune_layer", "prune_weight"]
