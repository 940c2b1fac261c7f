"""Modules on packed weights, and the operators that stand for them in a compiled graph.

Importing any layer registers the operators with torch.
"""

from sparsegpt.kernels.layers import operators as operators  # registers them
