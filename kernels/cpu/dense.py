"""Dense weights on a CPU that does not multiply bfloat16 itself: outputs = inputs W^T + bias (dense.cpp).

Dimension key: N out_features, K in_features."""

from __future__ import annotations

from torch import Tensor

from sparsegpt.kernels.cpu import library

# Tokens up to which `run` was timed and faster than torch; where a CPU multiplies bfloat16, torch does well.
TOKENS = {"avx2": 1024, "avx512": 1024}


def most_tokens() -> int:
    """Tokens up to which `run` serves dense linears on this machine; 0 where torch does as well."""
    return TOKENS.get(library.machine_level() or "", 0)


def run(weight: Tensor, inputs: Tensor, bias: Tensor | None, *, level: str | None = None) -> Tensor:
    """weight [N, K], inputs [..., K] and bias [N] -> [..., N], all bfloat16 and contiguous; unchecked.

    Raises SparseGPTError for a `level` that the machine does not have (`library.call`).
    """
    outputs = inputs.new_empty(*inputs.shape[:-1], weight.shape[0])
    library.call(*product(weight, inputs, bias, outputs), level)
    return outputs


def product(weight: Tensor, inputs: Tensor, bias: Tensor | None, outputs: Tensor) -> library.Call:
    """The call of `run` for outputs [..., N]."""
    rows, columns = weight.shape
    tensors = (weight, inputs, library.NOTHING if bias is None else bias, outputs)
    return "sparse24_dense_bf16", tensors, (rows, columns, inputs.numel() // columns), rows * columns
