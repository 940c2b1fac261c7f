"""Decoder blocks of packed models as calls of the CPU library for one token (cpu/program.cpp): one block, or some that
follow one another in one program.

Dimension key: H heads, G heads of keys and values, D size of a head, K hidden size, N size of the MLP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsegpt.kernels.cpu import decode
from sparsegpt.kernels.cpu import norm as cpu_norm
from sparsegpt.kernels.cpu.library import Call
from sparsegpt.kernels.cpu.program import Program
from sparsegpt.kernels.format.pack import WORD_COLUMNS
from sparsegpt.kernels.hf.growing import Room, room_of
from sparsegpt.kernels.layers.linear import Plan

_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def norms_heads(attention: nn.Module) -> bool:
    """Whether an attention has a norm for each head's query, and so one for its key."""
    return "q_norm" in attention._modules


def norm_names(normed: bool) -> tuple[str, ...]:
    """The norms of a block, with those of its heads."""
    return (*_NORMS, *_HEAD_NORMS) if normed else _NORMS


class BlockCalls:
    """The calls of a block on memory of its own, and the tensors in them that come and go with a token.

    plans: of q, k, v, o, gate, up and down. Raises NoCallError where one of its parts is no call of the library.
    """

    def __init__(self, block: Any, plans: list[Plan], dtype: torch.dtype) -> None:
        self.calls, self.attend, inputs, outputs = _calls(block, plans, dtype)
        _, (*_, cos, sin, keys, values, _), *_ = self.attend
        self.moving = (inputs, outputs, cos, sin, keys, values)
        self._dtype, self._shape, (self._shared, _, self._size) = dtype, inputs.shape, keys.shape

    def takes(self, hidden_states: Tensor, turn: tuple[Tensor, Tensor]) -> bool:
        """[..., K], cosines and sines [..., D] -> whether they are of one token, and of the shape and dtype wanted."""
        cos, sin = turn
        return (
            hidden_states.shape == self._shape
            and cos.shape == sin.shape == (1, 1, self._size)
            and cos.dtype == sin.dtype == hidden_states.dtype == self._dtype
        )

    def room(self, layer: Any) -> Room | None:
        """Where the block's next key and value go, or None where its cache is of another shape or dtype."""
        kept = layer.keys
        if kept.shape[:2] != (1, self._shared) or kept.shape[3] != self._size or layer.values.shape != kept.shape:
            return None
        return room_of(layer) if kept.dtype == layer.values.dtype == self._dtype else None


class Stretch:
    """Blocks that follow one another, as one program."""

    def __init__(self, blocks: list[BlockCalls]) -> None:
        self.blocks = blocks
        self._program = program = Program([call for block in blocks for call in block.calls])
        self._places, begin = [], 0
        for block in blocks:
            own = range(begin, begin + len(block.calls))
            begin = own.stop
            places = [
                (number, place) for number, part in enumerate(block.moving) for place in program.places(part, own)
            ]
            attend = own[next(index for index, (_, call) in enumerate(block.calls) if call is block.attend)]
            sizes = [(len(block.moving) + number, program.place_of_size(attend, 3 + number)) for number in range(2)]
            self._places.append(places + sizes)

    def run(self, hidden_states: Tensor, turn: tuple[Tensor, Tensor], rooms: Sequence[Room]) -> Tensor:
        """[..., K] of one token -> [blocks, ..., K], what each gives; keys and values lie in rooms, not yet shown."""
        hidden_states, cos, sin = hidden_states.contiguous(), turn[0].contiguous(), turn[1].contiguous()
        outputs, words = hidden_states.new_empty(len(rooms), *hidden_states.shape), self._program.words
        before, after = hidden_states.data_ptr(), outputs.data_ptr()
        step, turned = hidden_states.nbytes, (cos.data_ptr(), sin.data_ptr())
        for places, room in zip(self._places, rooms, strict=True):
            keys, values = room.whole
            found = (before, after, *turned, keys.data_ptr(), values.data_ptr(), room.length, room.capacity)
            for number, place in places:
                words[place] = found[number]
            before, after = after, after + step
        self._program.run()
        return outputs


class NoCallError(Exception):
    """A part of a block is no call of the library."""


def _calls(block: Any, plans: list[Plan], dtype: torch.dtype) -> tuple[list[tuple[bool, Call]], Call, Tensor, Tensor]:
    """The calls of a block, which of them is attention, and the tensors that stand for its input and its output."""
    q, k, v, o, gate, up, down = plans
    first, second, *of_heads = (block.get_submodule(name) for name in norm_names(norms_heads(block.self_attn)))
    width, size, inner = len(first.weight), block.self_attn.head_dim, gate.weight.shape[0]
    heads, shared = q.weight.shape[0] // size, k.weight.shape[0] // size
    _check_shapes([plan.weight.shape for plan in plans], (heads, shared), size, width, inner)
    _check_norms((first, second), width, dtype)
    _check_norms(of_heads, size, dtype)
    empty = partial(torch.empty, dtype=dtype, device="cpu")  # whatever the default device is
    inputs, outputs, normed, delta, total = (empty(1, 1, width) for _ in range(5))
    query, key, value, attended = (empty(n, size) for n in (heads, shared, shared, heads))
    turn, kept = (empty(size), empty(size)), (empty(shared, 1, size), empty(shared, 1, size))
    attend = decode.attend((query, key, value), turn, kept, attended, 0, block.self_attn.scaling)
    calls = [
        (True, cpu_norm.norm(inputs, first.weight, first.variance_epsilon, normed)),
        (True, _product(q, normed, query)),
        (False, _product(k, normed, key)),
        (False, _product(v, normed, value)),
        *_head_norms(of_heads, (query, key)),
        (True, attend),
        (True, _product(o, attended.view(1, 1, -1), delta)),
        (True, decode.residual(inputs, delta, total, second.weight, second.variance_epsilon, normed)),
        *_mlp_calls(gate, up, down, normed, delta),
        (True, decode.add(total, delta, outputs)),
    ]
    return calls, attend, inputs, outputs


def _check_norms(norms: Iterable[Any], width: int, dtype: torch.dtype) -> None:
    """Raise NoCallError unless norms are of this width and dtype."""
    if any(norm.weight.shape != (width,) or norm.weight.dtype != dtype for norm in norms):
        raise NoCallError


def _head_norms(norms: list[Any], heads: tuple[Tensor, Tensor]) -> Iterator[tuple[bool, Call]]:
    """Queries and keys, [heads, D] each, replaced by what their norms make of them."""
    for number, (norm, found) in enumerate(zip(norms, heads, strict=False)):
        yield number == 0, cpu_norm.norm(found, norm.weight, norm.variance_epsilon, found)


def _check_shapes(found: list[tuple[int, int]], heads: tuple[int, int], size: int, width: int, inner: int) -> None:
    """Raise NoCallError unless projections are of whole words and fit one another."""
    query, key = (count * size for count in heads)
    expected = [
        (query, width),
        (key, width),
        (key, width),
        (width, query),
        (inner, width),
        (inner, width),
        (width, inner),
    ]
    if found != expected or heads[0] % heads[1] or any(columns % WORD_COLUMNS for _, columns in found):
        raise NoCallError


def _mlp_calls(gate: Plan, up: Plan, down: Plan, inputs: Tensor, outputs: Tensor) -> Iterator[tuple[bool, Call]]:
    hidden = inputs.new_empty(1, 1, gate.weight.shape[0])
    (route, gate_state), (up_route, up_state) = gate.route(1), up.route(1)
    if route is up_route and route.gated_call is not None:
        yield True, route.gated_call(gate_state, up_state, inputs, hidden)
    else:
        gated, ungated = torch.empty_like(hidden), torch.empty_like(hidden)
        yield True, _product(gate, inputs, gated)
        yield False, _product(up, inputs, ungated)
        yield True, decode.gate(gated, ungated, hidden)
    yield True, _product(down, hidden, outputs)


def _product(plan: Plan, inputs: Tensor, outputs: Tensor) -> Call:
    route, state = plan.route(1)
    if route.call is None:
        raise NoCallError
    return route.call(state, inputs, plan.bias, outputs)
