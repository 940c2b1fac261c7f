"""Arguments of blocks as nested values: kept once where they are alike, apart where streams must not meet.

A model gives its blocks tensors (masks, rotary tables, embeddings of the tokens for one block) and objects through
which blocks talk to later blocks (a mapping of shared keys and values). Tensors never change; such objects do.
"""

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")
# Never changed by a block, and never copied.
_CONSTANT = (Tensor, nn.Module, str, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, type)


class SharedArguments:
    """Keeps one copy of tensors that are the same for every micro-batch, such as rotary tables and masks."""

    def __init__(self) -> None:
        self._first: dict[tuple[object, ...], Tensor] = {}

    def share(self, value: Value) -> Value:
        """The same nested value, its tensors those of an earlier micro-batch where they are equal."""
        found: Value = _rebuilt(value, {}, (), self._known)
        return found

    def _known(self, tensor: Tensor, path: tuple[object, ...]) -> Tensor:
        key = (*path, tensor.shape, tensor.dtype, tensor.device)
        first = self._first.setdefault(key, tensor)
        return first if first is not tensor and torch.equal(first, tensor) else tensor


def with_own_objects(value: Value) -> Value:
    """The same tensors in mappings, lists and objects of its own; what was one object is one object still."""
    found: Value = _rebuilt(value, {}, (), lambda tensor, path: tensor)
    return found


def tensors_within(value: Any) -> int:
    """How many tensors a nested value holds: more than before once a block has put one in."""
    if isinstance(value, Tensor):
        return 1
    if isinstance(value, Mapping):
        return sum(map(tensors_within, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(tensors_within, value))
    return 0 if _is_constant(value) else tensors_within(getattr(value, "__dict__", None) or ())


def to_device(value: Any, device: torch.device) -> Any:
    """The nested value with every tensor on `device`; mappings and lists stay the same objects."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, MutableMapping):
        for key in list(value):
            value[key] = to_device(value[key], device)
        return value
    if isinstance(value, list):
        value[:] = [to_device(item, device) for item in value]
        return value
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return _tuple_of(value, [to_device(item, device) for item in value])
    return value


def _rebuilt(value: Any, memo: dict[int, Any], path: tuple[object, ...], tensor: Any) -> Any:
    """A copy of the nested value with tensor(found, path) for every tensor; each object is copied once."""
    if id(value) in memo:
        return memo[id(value)][1]
    if isinstance(value, Tensor):
        found = tensor(value, path)
    elif _is_constant(value):
        return value
    elif type(value) is dict:
        found = _noted(memo, value, {})
        found.update({key: _rebuilt(item, memo, (*path, key), tensor) for key, item in value.items()})
    elif isinstance(value, list):
        found = _noted(memo, value, [])
        found.extend(_rebuilt(item, memo, (*path, index), tensor) for index, item in enumerate(value))
    elif isinstance(value, tuple):
        found = _tuple_of(value, [_rebuilt(item, memo, (*path, index), tensor) for index, item in enumerate(value)])
    elif hasattr(value, "__dict__"):
        found = _noted(memo, value, copy.copy(value))
        for name, item in vars(value).items():
            object.__setattr__(found, name, _rebuilt(item, memo, (*path, name), tensor))
    else:
        found = value
    memo[id(value)] = (value, found)  # with the value, so that its id stays its own
    return found


def _noted(memo: dict[int, Any], value: Any, found: Any) -> Any:
    """Note a copy before it is filled: what it holds may refer to it."""
    memo[id(value)] = (value, found)
    return found


def _tuple_of(like: tuple[Any, ...], items: list[Any]) -> Any:
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)


def _is_constant(value: Any) -> bool:
    # Configurations are read, never written, by blocks; callables are code.
    return isinstance(value, _CONSTANT) or callable(value) or hasattr(value, "to_diff_dict")
