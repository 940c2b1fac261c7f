"""Layer solvers: tensors in, `Pruned` out. One file a method, one row a method in METHODS."""

from sparsegpt.solvers.layer import Pruned, prune_layer, prune_weight
from sparsegpt.solvers.methods import METHODS, Copies, Method, parse_method

__all__ = ["METHODS", "Copies", "Method", "Pruned", "parse_method", "prune_layer", "prune_weight"]
