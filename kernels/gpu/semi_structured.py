"""torch's own kernels for 2:4 weights: CUTLASS and cuSPARSELt, for many tokens (prefill, perplexity).

    out [T, N] = inputs [T, K] weight^T + bias

cuSPARSELt offers several algorithms for a shape; the search runs once for each power of two of tokens and the winner is
kept. torch's CUTLASS kernels are for compute capability 8.x alone. Source of the calls: torch
`torch/sparse/semi_structured.py` and `test/test_sparse_semi_structured.py`. Chosen by themselves only where `tune` has
measured them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.kernels.format.interop import to_semi_structured
from sparsegpt.kernels.format.pack import Packed24, unpack

_DTYPES = (torch.float16, torch.bfloat16)


@dataclass
class Compressed:
    """cuSPARSELt's form of a weight [N, K], and what was found best for each power of two of tokens."""

    weight: Tensor
    found: dict[int, dict[str, Any]] = field(default_factory=dict)


def refuse_cutlass(weight: Packed24) -> str | None:
    """[N, K] -> why torch's CUTLASS kernels cannot serve the weight, or None."""
    reason = _refuse("CUTLASS", weight, (32, 64))
    if reason is None and torch.cuda.get_device_capability(weight.device)[0] != 8:
        return "torch's CUTLASS 2:4 kernels need compute capability 8.x (Ampere, Ada), no newer one; try cusparselt"
    return reason


def refuse_cusparselt(weight: Packed24) -> str | None:
    """[N, K] -> why cuSPARSELt cannot serve the weight, or None."""
    reason = _refuse("cuSPARSELt", weight, (16, 16))
    if reason is None and not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    return reason


def prepare_cutlass(weight: Packed24) -> Tensor:
    """[N, K] packed -> torch's CUTLASS tensor subclass [N, K]."""
    return to_semi_structured(weight)


def run_cutlass(weight: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """inputs [T, K] -> [T, N], through the tensor subclass, which pads the tokens to its tile itself."""
    return functional.linear(inputs, weight, bias)


def prepare_cusparselt(weight: Packed24) -> Compressed:
    """[N, K] packed -> cuSPARSELt's form, compressed from the dense weight."""
    return Compressed(torch._cslt_compress(unpack(weight)))


def run_cusparselt(state: Compressed, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """inputs [T, K] -> [T, N], with the algorithm that the search found; tokens are padded to a multiple of eight."""
    tokens = inputs.shape[0]
    columns_KT = functional.pad(inputs, (0, 0, 0, -tokens % 8)).t()
    size = (tokens - 1).bit_length()
    if size not in state.found:
        state.found[size] = _search(state.weight, columns_KT)
    outputs: Tensor = torch._cslt_sparse_mm(
        state.weight, columns_KT, bias=bias, transpose_result=True, **state.found[size]
    )
    return outputs[:tokens]


def _search(weight: Tensor, columns_KT: Tensor) -> dict[str, Any]:
    """What `torch._cslt_sparse_mm` is to be given to be fastest."""
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of torch call this one deprecated
            return {"alg_id": int(torch._cslt_sparse_mm_search(weight, columns_KT, transpose_result=True))}
    algorithm, split_k, split_k_mode, _ = search(weight, columns_KT, None, None, None, True)
    return {"alg_id": int(algorithm), "split_k": int(split_k), "split_k_mode": int(split_k_mode)}


def _refuse(library: str, weight: Packed24, divisors: tuple[int, int]) -> str | None:
    device, dtype = weight.device, weight.dtype
    if device.type != "cuda":
        return f"torch's {library} 2:4 kernels need a CUDA device; the weight is on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"torch's {library} 2:4 kernels need compute capability 8.0 (Ampere) or newer"
    if dtype not in _DTYPES:
        return f"torch's {library} 2:4 kernels hold float16 or bfloat16; the weight is {dtype}"
    if weight.shape[0] % divisors[0] or weight.shape[1] % divisors[1]:
        return f"torch's {library} 2:4 kernels need a shape divisible by {divisors}; found {weight.shape}"
    return None
