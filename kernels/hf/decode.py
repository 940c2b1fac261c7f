"""Decoder blocks of packed models for one token: blocks that follow one another are one call of the CPU library.

Transparent: parameters, names, `state_dict` and saving are the model's own. A block is taken when its code and that of
its attention are Llama's or Qwen 3's (references.py), its norms and its MLP have kernels of their own (layers/), and
all its projections are packed. Its forward is the program only for one token without a mask that goes on from a
DynamicCache, without gradients, compilers or autocast, and while nothing watches or has replaced its parts; otherwise,
and for other attention than transformers' own "sdpa", its class's.

The first block works out those after it as well (stretch.py). Each of these gives what was worked out for it when its
turn comes, if nothing has changed and its input has those very numbers. Keys and values are shown then, not before."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsegpt.kernels.cpu.library import NOTHING
from sparsegpt.kernels.hf.growing import Room
from sparsegpt.kernels.hf.references import is_attention, is_block
from sparsegpt.kernels.hf.stretch import BlockCalls, NoCallError, Stretch, norm_names, norms_heads
from sparsegpt.kernels.layers.dense_layers import is_norm, norm_forward
from sparsegpt.kernels.layers.gated import GLOBAL_HOOKS, gated_forward, has_gate
from sparsegpt.kernels.layers.linear import PackedLinear, Plan, Plans
from sparsegpt.kernels.layers.plain import is_plain

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_PARTS = ("self_attn", "mlp", *(f"self_attn.{name}" for name in _PROJECTIONS))
_PARTS += tuple(f"mlp.{name}" for name in (*_MLP, "act_fn"))
# Arguments that say nothing beside the cosines and the cache.
_REDUNDANT = {"position_ids", "use_cache", "cache_position"}
_GIVEN = {"attention_mask", "past_key_values", "position_embeddings"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # without gradients nothing comes back


def step_blocks(model: nn.Module) -> int:
    """Give every block of `model` that is known its program for single tokens; returns how many there are."""
    count = 0
    for parent in model.modules():
        blocks = [(block, is_known(block) and "forward" not in block.__dict__) for block in parent.children()]
        for known, neighbours in groupby(blocks, lambda pair: pair[1]):
            if known:
                chain = Chain()
                for block, _ in neighbours:
                    block.forward = partial(block_forward, block, chain.add())
                count += len(chain.steps)
    return count


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
    if attention is None or mlp is None or not has_gate(mlp):
        return False
    normed = norms_heads(attention)
    if not is_attention(attention, normed):
        return False
    projections = (attention._modules.get(name) for name in _PROJECTIONS)
    norms = (module.get_submodule(name) for name in norm_names(normed))
    return all(isinstance(found, PackedLinear) for found in projections) and all(map(is_norm, norms))


def block_forward(block: nn.Module, step: Step, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """[..., T, K] -> [..., T, K], what the block's class computes, to the rounding of the dtype."""
    output = None if args else step.run(block, hidden_states, kwargs)
    return type(block).forward(block, hidden_states, *args, **kwargs) if output is None else output


class Step:
    """A block's calls, made on first use and again when something that they were made of has changed.

    sure: whether its input was, the last time, what the block before it gave. Copies and pickles start anew.
    """

    def __init__(self, chain: Chain, index: int) -> None:
        self._chain, self._index = chain, index
        self.sure, self.made = False, None  # type: tuple[bool, _Made | None]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sure": False, "made": None}

    def run(self, block: nn.Module, hidden_states: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
        """[..., K] -> [..., K] of one token, the cache a token longer; None where the program does not serve."""
        if not _is_one_token(hidden_states, arguments) or not self._chain.lock.acquire(blocking=False):
            return None
        try:
            self.sure = False
            if self.made is None or not self.made.holds(hidden_states.dtype):
                self.made = _Made(block, hidden_states.dtype)
            if self.made.watched():
                return None
            token = _Token(hidden_states, arguments["position_embeddings"], arguments["past_key_values"])
            return self._chain.run(self._index, self.made, token)
        finally:
            self._chain.lock.release()


class Chain:
    """Steps of blocks that follow one another, and what was worked out ahead. Copies and pickles start anew.

    Of two threads that want it at a time one gets it, by the lock.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._forget()

    def _forget(self) -> None:
        self.lock = threading.Lock()
        self._given = (-1, NOTHING)  # by which block, and what
        self._ahead: dict[int, _Ahead] = {}
        self._stretches: dict[int, Stretch] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def add(self) -> Step:
        """The step of one block more."""
        self.steps.append(Step(self, len(self.steps)))
        return self.steps[-1]

    def run(self, index: int, made: _Made, token: _Token) -> Tensor | None:
        """[..., K] of one token -> [..., K] by a block, its cache a token longer; None where it cannot."""
        room = made.room(token)
        if room is None or made.calls is None:
            return None
        last, given = self._given
        follows = index == last + 1 and _same(token.hidden_states, given)
        ahead = self._ahead.pop(index, None)
        if ahead is None or not follows or ahead.inputs is not given or not ahead.holds(made, token, room):
            ahead = self._work_out(index, token, [made.calls], [room])
        self.steps[index].sure = follows
        self._given = index, ahead.output
        room.grow(made.cache_layer(token.cache))
        return ahead.output.clone()  # whoever gets it may write to it

    def _work_out(self, index: int, token: _Token, calls: list[BlockCalls], rooms: list[Room]) -> _Ahead:
        """What block `index` gives; of those after it, as far as they are sure, it is kept until they ask."""
        for left in self._ahead:  # asked for by nobody
            self.steps[left].sure = False
        for step in self.steps[index + 1 :]:
            room = step.made.room(token) if step.sure and step.made is not None else None
            if room is None or step.made is None or step.made.calls is None:
                break
            calls.append(step.made.calls)
            rooms.append(room)
        outputs = self._stretch(index, calls).run(token.hidden_states, token.turn, rooms).unbind()
        inputs = (token.hidden_states, *outputs)
        found = [
            _Ahead(each, before, after, token.turn, ref(room), room.length)
            for each, before, after, room in zip(calls, inputs, outputs, rooms, strict=False)
        ]
        self._ahead = {index + number: ahead for number, ahead in enumerate(found) if number}
        return found[0]

    def _stretch(self, index: int, calls: list[BlockCalls]) -> Stretch:
        stretch = self._stretches.get(index)
        if stretch is None or stretch.blocks != calls:
            if stretch is not None:
                self._stretches.clear()  # others may hold weights that are no longer the model's
            stretch = self._stretches[index] = Stretch(calls)
        return stretch


@dataclass(slots=True)
class _Token:
    """What a block is given: its input [1, 1, K], cosines and sines [1, 1, D], and the cache."""

    hidden_states: Tensor
    turn: tuple[Tensor, Tensor]
    cache: DynamicCache


@dataclass(slots=True)
class _Ahead:
    """What was worked out for a block, and from what."""

    calls: BlockCalls
    inputs: Tensor
    output: Tensor
    turn: tuple[Tensor, Tensor]
    room: ref[Room]
    length: int

    def holds(self, made: _Made, token: _Token, room: Room) -> bool:
        """Whether the block still has these calls, and the same keys and values behind it."""
        return (
            self.calls is made.calls and self.turn is token.turn and self.room() is room and self.length == room.length
        )


def _same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


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
    """The calls of a block for tokens of one dtype, or None where there are none, and what they were made from."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        self.dtype, self.threads = dtype, torch.get_num_threads()
        known = is_known(block)
        self.attention: Any = block.get_submodule("self_attn")
        norms = norm_names(norms_heads(self.attention)) if known else ()
        names = (*_PARTS, *norms) if known else ()
        found: list[Any] = [block.get_submodule(name) for name in names]
        self._modules = found
        self._owners = [_owner(block, name) for name in names]
        self._own = [module.__dict__ for module in found]
        self._forwards = [own.get("forward") for own in self._own]
        self._hooks = [*GLOBAL_HOOKS, *(own[name] for own in self._own for name in _HOOKS)]
        self._plans = Plans([module for module in found if isinstance(module, PackedLinear)], dtype)
        self._norms = [block.get_submodule(name)._parameters for name in norms]
        self._addresses = self._weights()
        ours = known and all(forward is None or _is_ours(forward) for forward in self._forwards)
        self.calls = _calls(block, self._plans.found, dtype) if ours else None
        if self.calls is not None:
            self._plans.read_by(tensor for _, (_, tensors, *_) in self.calls.calls for tensor in tensors)

    def _weights(self) -> list[int]:
        return [parameters["weight"].data_ptr() for parameters in self._norms]  # type: ignore[union-attr]

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether all is as it was."""
        return (
            dtype == self.dtype
            and [owner[name] for owner, name in self._owners] == self._modules
            and [own.get("forward") for own in self._own] == self._forwards
            and self._plans.hold()
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

    def room(self, token: _Token) -> Room | None:
        """Where the next key and value go; None without calls, or with a token or a cache that they do not take."""
        layer = self.cache_layer(token.cache)
        if layer is None or self.calls is None or not self.calls.takes(token.hidden_states, token.turn):
            return None
        return self.calls.room(layer)

    def cache_layer(self, cache: DynamicCache) -> Any:
        """Where the block's keys and values are, or None where they are not in a plain growing layer."""
        index = self.attention.layer_idx
        layer = cache.layers[index] if index < len(cache.layers) and not cache.offloading else None
        return layer if type(layer) is DynamicLayer and layer.is_initialized else None  # type: ignore[union-attr]


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, partial) and forward.func in (norm_forward, gated_forward)


def _calls(block: nn.Module, plans: list[Plan], dtype: torch.dtype) -> BlockCalls | None:
    try:
        return BlockCalls(block, plans, dtype)
    except NoCallError:
        return None


def _owner(block: nn.Module, name: str) -> tuple[dict[str, nn.Module | None], str]:
    """Where a part of a block is kept, and under which name."""
    path, _, last = name.rpartition(".")
    return block.get_submodule(path)._modules, last
