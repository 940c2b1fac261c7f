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
    outputs = inputs.new_empty(*inputs.shape)
    library.call(*norm(inputs, weight, epsilon, outputs), level)
    return outputs


def norm(inputs: Tensor, weight: Tensor, epsilon: float, outputs: Tensor) -> library.Call:
    """The call of `run` for outputs [..., K]."""
    columns, elements = weight.shape[0], inputs.numel()
    sizes = (columns, elements // columns, epsilon)
    return _NORM[weight.dtype], (inputs, weight, outputs), sizes, elements
