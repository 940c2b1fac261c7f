"""The root mean square norm on a CPU: inputs / sqrt(mean(inputs^2) + epsilon) * weight (norm.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsegpt.kernels.cpu import library

_NORM = {torch.bfloat16: "sparse24_norm_bf16", torch.float32: "sparse24_norm_f32"}
DTYPES = tuple(_NORM)


def run(inputs: Tensor, weight: Tensor, epsilon: float, *, level: str | None = None) -> Tensor:
    """inputs [..., K] and weight [K], both contiguous and of one of DTYPES -> [..., K]; unchecked.

    Raises SparseGPTError for a `level` that the machine does not have (`library.call`).
    """
    outputs, columns, elements = inputs.new_empty(*inputs.shape), weight.shape[0], inputs.numel()
    sizes = (columns, elements // columns, epsilon)
    library.call(_NORM[weight.dtype], (inputs, weight, outputs), sizes, elements, level)
    return outputs
