"""What lies between the products of a decoder block for one token, as calls of the library (decode.cpp, norm.cpp).

Tensors are contiguous, on the CPU and all of one of DTYPES; unchecked.
Dimension key: H heads, G heads of keys and values, D size of a head, L tokens before, K hidden size."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsegpt.kernels.cpu.library import NOTHING, Call

_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
DTYPES = tuple(_SUFFIXES)


def attend(
    states: tuple[Tensor, Tensor, Tensor],
    turn: tuple[Tensor, Tensor],
    kept: tuple[Tensor, Tensor],
    outputs: Tensor,
    length: int,
    scaling: float,
) -> Call:
    """Rotary positions and attention: softmax(scaling q K^T) V for outputs [H, D].

    states: q [H, D], k and v [G, D]. turn: cosines and sines [D]. kept: keys and values [G, C, D] for at most C tokens,
    with `length` in them; k and v become the next.
    """
    (heads, size), (shared, capacity, _) = outputs.shape, kept[0].shape
    sizes = (heads, shared, size, length, capacity, scaling)
    return f"sparse24_attend_{_SUFFIXES[outputs.dtype]}", (*states, *turn, *kept, outputs), sizes, 0


def gate(gated: Tensor, up: Tensor, outputs: Tensor) -> Call:
    """[N], [N] -> silu(gated) * up for outputs [N]."""
    return f"sparse24_gate_{_SUFFIXES[outputs.dtype]}", (gated, up, outputs), (outputs.numel(),), 0


def residual(inputs: Tensor, delta: Tensor, total: Tensor, weight: Tensor, epsilon: float, outputs: Tensor) -> Call:
    """total = inputs + delta, all [..., K], and outputs [..., K] its root mean square norm with `weight` [K]."""
    return _residual((inputs, delta, total, weight, outputs), epsilon)


def add(inputs: Tensor, delta: Tensor, total: Tensor) -> Call:
    """total = inputs + delta, all [..., K]."""
    return _residual((inputs, delta, total, NOTHING, NOTHING), 0.0)


def _residual(tensors: tuple[Tensor, ...], epsilon: float) -> Call:
    inputs = tensors[0]
    sizes = (inputs.shape[-1], inputs.numel() // inputs.shape[-1], epsilon)
    return f"sparse24_residual_{_SUFFIXES[inputs.dtype]}", tensors, sizes, 0
