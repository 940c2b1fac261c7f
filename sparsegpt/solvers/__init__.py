"""Layer solvers: tensors in, `Pruned` out. One file a method, one row a method in METHODS."""

from sparsegpt.solvers.layer import METHODS, Method, Pruned, parse_method, prune_layer, prune_weight

__all__ = ["METHODS", "Method", "Pruned", "parse_method", "prune_layer", "prune_weight"]
