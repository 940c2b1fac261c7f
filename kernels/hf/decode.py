"""Decoder blocks of packed models for one token: all of a block in one call of the CPU library (cpu/program.cpp).

Transparent: parameters, names, `state_dict` and saving are the model's own. A block is taken when its code and that of
its attention are Llama's (references.py), its norms and its MLP have kernels of their own (layers/), and all its
projections are packed. Its forward is the program only for one token without a mask that goes on from a DynamicCache,
without gradients, compilers or autocast, and while nothing watches or has replaced its parts; otherwise, and for other
attention than transformers' own "sdpa", its class's.

Dimension key: H heads, G heads of keys and values, D size of a head, K hidden size, N size of the MLP."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsegpt.kernels.cpu import decode
from sparsegpt.kernels.cpu import norm as cpu_norm
from sparsegpt.kernels.cpu.library import Call
from sparsegpt.kernels.cpu.program import Program
from sparsegpt.kernels.format.pack import WORD_COLUMNS
from sparsegpt.kernels.hf.growing import room_of
from sparsegpt.kernels.hf.references import is_attention, is_block
from sparsegpt.kernels.layers.dense_layers import is_norm, norm_forward
from sparsegpt.kernels.layers.gated import GLOBAL_HOOKS, gated_forward, has_gate
from sparsegpt.kernels.layers.linear import PackedLinear, Plan
from sparsegpt.kernels.layers.plain import is_plain

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_PARTS = ("self_attn", "mlp", *_NORMS, *(f"self_attn.{name}" for name in _PROJECTIONS))
_PARTS += tuple(f"mlp.{name}" for name in (*_MLP, "act_fn"))
# Arguments that say nothing beside the cosines and the cache.
_REDUNDANT = {"position_ids", "use_cache", "cache_position"}
_GIVEN = {"attention_mask", "past_key_values", "position_embeddings"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def step_blocks(model: nn.Module) -> int:
    """Give every block of `model` that is known its program for single tokens; returns how many there are."""
    blocks = [module for module in model.modules() if is_known(module) and "forward" not in module.__dict__]
    for block in blocks:
        block.forward = partial(block_forward, block, Step())
    return len(blocks)


def unstep_blocks(model: nn.Module) -> None:
    """Undo `step_blocks`."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func is block_forward:
            del module.forward


def is_known(module: nn.Module) -> bool:
    """Whether a module is a block in the sense of this file, whoever may watch it."""
    if not is_block(module):
        return False
    attention, mlp = module._modules.get("self_attn"), module._modules.get("mlp")
    if attention is None or mlp is None or not is_attention(attention) or not has_gate(mlp):
        return False
    projections = (attention._modules.get(name) for name in _PROJECTIONS)
    norms = (module._modules.get(name) for name in _NORMS)
    return all(isinstance(found, PackedLinear) for found in projections) and all(map(is_norm, norms))


def block_forward(block: nn.Module, step: Step, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """[..., T, K] -> [..., T, K], what the block's class computes, to the rounding of the dtype."""
    output = None if args else step.run(block, hidden_states, kwargs)
    return type(block).forward(block, hidden_states, *args, **kwargs) if output is None else output


class Step:
    """A block's program, made on first use and again when something that it was made of has changed.

    Copies and pickles are empty. Of two threads that want it at a time one gets it.
    """

    def __init__(self) -> None:
        self._made: _Made | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Step, ()

    def run(self, block: nn.Module, hidden_states: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
        """[..., K] -> [..., K] of one token, the cache a token longer; None where the program does not serve."""
        if not _is_one_token(hidden_states, arguments) or not self._lock.acquire(blocking=False):
            return None
        try:
            if self._made is None or not self._made.holds(hidden_states.dtype):
                self._made = _Made(block, hidden_states.dtype)
            made = self._made
            layer = made.cache_layer(arguments["past_key_values"])
            if made.program is None or layer is None or made.watched():
                return None
            return made.program.run(hidden_states, arguments["position_embeddings"], layer)
        finally:
            self._lock.release()


def _is_one_token(hidden_states: Tensor, arguments: Mapping[str, Any]) -> bool:
    return (
        is_plain(hidden_states)
        and hidden_states.shape[:-1] == (1, 1)
        and arguments.get("attention_mask") is None
        and type(arguments.get("past_key_values")) is DynamicCache
        and arguments.get("position_embeddings") is not None
        and arguments.keys() - _GIVEN <= _REDUNDANT
        and hidden_states.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


class _Made:
    """The program of a block for tokens of one dtype, or None where there is none, and what it was made from."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        self.dtype, self.threads = dtype, torch.get_num_threads()
        known = is_known(block)
        found: list[Any] = [block.get_submodule(name) for name in _PARTS] if known else []
        self._modules = found
        self._owners = [_owner(block, name) for name in _PARTS] if known else []
        self._own = [module.__dict__ for module in found]
        self._forwards = [own.get("forward") for own in self._own]
        self._hooks = [*GLOBAL_HOOKS, *(own[name] for own in self._own for name in _HOOKS)]
        self._linears = [module for module in found if isinstance(module, PackedLinear)]
        self._plans = [layer.plan(dtype) for layer in self._linears]
        self._norms = [block.get_submodule(name)._parameters for name in _NORMS] if known else []
        self._addresses = self._weights()
        self.attention: Any = block.get_submodule("self_attn")
        ours = known and all(forward is None or _is_ours(forward) for forward in self._forwards)
        self.program = _BlockProgram.of(block, self._plans, dtype) if ours else None

    def _weights(self) -> list[int]:
        return [parameters["weight"].data_ptr() for parameters in self._norms]  # type: ignore[union-attr]

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether all is as it was."""
        return (
            dtype == self.dtype
            and [owner[name] for owner, name in self._owners] == self._modules
            and [own.get("forward") for own in self._own] == self._forwards
            and [layer.plan(dtype) for layer in self._linears] == self._plans
            and self._weights() == self._addresses
            and self.threads == torch.get_num_threads()
        )

    def watched(self) -> bool:
        """Whether somebody looks at a part, or wants what the program does not give."""
        return (
            any(self._hooks)
            or self.attention.training
            or self.attention.config._attn_implementation != "sdpa"
            or ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
        )

    def cache_layer(self, cache: DynamicCache) -> Any:
        """Where the block's keys and values are, or None where they are not in a plain growing layer."""
        index = self.attention.layer_idx
        layer = cache.layers[index] if index < len(cache.layers) and not cache.offloading else None
        return layer if type(layer) is DynamicLayer and layer.is_initialized else None  # type: ignore[union-attr]


class _BlockProgram:
    """The calls of a block on memory of its own; what comes and goes with a token is put in their places."""

    def __init__(self, calls: list[tuple[bool, Call]], attend: Call, inputs: Tensor, outputs: Tensor) -> None:
        self._program = program = Program(calls)
        _, (*_, cos, sin, keys, values, _), *_ = attend
        self._shared, _, self._size = keys.shape
        index = next(index for index, (_, call) in enumerate(calls) if call is attend)
        moving = (inputs, outputs, cos, sin, keys, values)
        places = [(number, place) for number, tensor in enumerate(moving) for place in program.places(tensor)]
        places += [(len(moving) + number, program.place_of_size(index, 3 + number)) for number in range(2)]
        self._places = places

    @classmethod
    def of(cls, block: nn.Module, plans: list[Plan], dtype: torch.dtype) -> _BlockProgram | None:
        """A block's program, or None where one of its parts is no call of the library.

        plans: of _PROJECTIONS and _MLP.
        """
        try:
            return cls(*_calls(block, plans, dtype))
        except _NoCallError:
            return None

    def run(self, hidden_states: Tensor, turn: tuple[Tensor, Tensor], layer: Any) -> Tensor | None:
        """[1, 1, K] -> [1, 1, K], and the cache's layer one token longer."""
        cos, sin = turn
        dtype, kept = hidden_states.dtype, layer.keys
        if cos.shape != (1, 1, self._size) or cos.dtype != dtype or sin.dtype != dtype or kept.dtype != dtype:
            return None
        if kept.shape[:2] != (1, self._shared) or kept.shape[3] != self._size or layer.values.shape != kept.shape:
            return None
        hidden_states, cos, sin = hidden_states.contiguous(), cos.contiguous(), sin.contiguous()
        room, output, words = room_of(layer), torch.empty_like(hidden_states), self._program.words
        keys, values = room.whole
        moving = (hidden_states, output, cos, sin, keys, values)
        found = (*[tensor.data_ptr() for tensor in moving], room.length, room.capacity)
        for number, place in self._places:
            words[place] = found[number]
        self._program.run()
        room.grow(layer)
        return output


class _NoCallError(Exception):
    """A part of a block is no call of the library."""


def _calls(block: Any, plans: list[Plan], dtype: torch.dtype) -> tuple[list[tuple[bool, Call]], Call, Tensor, Tensor]:
    """The calls of a block, which of them is attention, and the tensors that stand for its input and its output."""
    q, k, v, o, gate, up, down = plans
    first, second = (block.get_submodule(name) for name in _NORMS)
    width, size, inner = len(first.weight), block.self_attn.head_dim, gate.weight.shape[0]
    heads, shared = q.weight.shape[0] // size, k.weight.shape[0] // size
    _check_shapes([plan.weight.shape for plan in plans], (heads, shared), size, width, inner)
    if any(norm.weight.shape != (width,) or norm.weight.dtype != dtype for norm in (first, second)):
        raise _NoCallError
    inputs, outputs, normed, delta, total = (torch.empty(1, 1, width, dtype=dtype) for _ in range(5))
    query, key, value, attended = (torch.empty(n, size, dtype=dtype) for n in (heads, shared, shared, heads))
    turn = (torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype))
    kept = (torch.empty(shared, 1, size, dtype=dtype), torch.empty(shared, 1, size, dtype=dtype))
    attend = decode.attend((query, key, value), turn, kept, attended, 0, block.self_attn.scaling)
    calls = [
        (False, cpu_norm.norm(inputs, first.weight, first.variance_epsilon, normed)),
        (True, _product(q, normed, query)),
        (False, _product(k, normed, key)),
        (False, _product(v, normed, value)),
        (True, attend),
        (True, _product(o, attended.view(1, 1, -1), delta)),
        (True, decode.residual(inputs, delta, total, second.weight, second.variance_epsilon, normed)),
        *_mlp_calls(gate, up, down, normed, delta),
        (True, decode.add(total, delta, outputs)),
    ]
    return calls, attend, inputs, outputs


def _check_shapes(found: list[tuple[int, int]], heads: tuple[int, int], size: int, width: int, inner: int) -> None:
    """Raise _NoCallError unless projections are of whole words and fit one another."""
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
        raise _NoCallError


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
        raise _NoCallError
    return route.call(state, inputs, plan.bias, outputs)


def _owner(block: nn.Module, name: str) -> tuple[dict[str, nn.Module | None], str]:
    """Where a part of a block is kept, and under which name."""
    path, _, last = name.rpartition(".")
    return block.get_submodule(path)._modules, last


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, partial) and forward.func in (norm_forward, gated_forward)
