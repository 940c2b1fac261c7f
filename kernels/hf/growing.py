"""Keys and values of transformers' DynamicCache with room to grow: a token is written behind those before it, where
transformers copies all of them to new memory for each.

A cache layer's tensors stay what they were, [batch, heads, tokens, size], as views of larger ones. They are written
behind only while they are the very views that were made last: whatever else is put there (cropped, reordered, selected,
copied) gets room of its own, so nobody's tensors ever change."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_ROOM = "_sparsegpt_room"
_LEAST = 64  # tokens


class Room:
    """Keys and values [B, G, L, D], copied once to [B, G, C, D]: C half as much again as L, or _LEAST more.

    B is one text.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.length = keys.shape[2]
        self.capacity = self.length + max(_LEAST, self.length // 2)
        self.whole = tuple(kept.new_empty(1, kept.shape[1], self.capacity, kept.shape[3]) for kept in (keys, values))
        for whole, kept in zip(self.whole, (keys, values), strict=True):
            whole[:, :, : self.length] = kept
        self.shown = (keys, values)

    def grow(self, layer: Any) -> None:
        """Show one token more, which somebody has written."""
        self.length += 1
        keys, values = self.whole
        self.shown = layer.keys, layer.values = keys.narrow(2, 0, self.length), values.narrow(2, 0, self.length)


def room_of(layer: Any) -> Room:
    """The room behind what a DynamicLayer holds."""
    room: Room | None = layer.__dict__.get(_ROOM)
    if (
        room is None
        or room.length == room.capacity
        or room.shown[0] is not layer.keys
        or room.shown[1] is not layer.values
    ):
        room = Room(layer.keys, layer.values)
        setattr(layer, _ROOM, room)
    return room
