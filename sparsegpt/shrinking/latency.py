"""Latency of shapes on this machine, from a table that is measured first.

A block's time is the sum of what its attention takes with so many key-value heads and of what its MLP takes with so
many channels, so a few whole blocks tell all shapes: those with all heads and fewer channels, and those with all
channels and fewer heads. What stands outside of the blocks is measured with them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsegpt.model.capture import ModelInputs, stand_ins
from sparsegpt.shrinking.shapes import Anatomy, Shape
from sparsegpt.shrinking.speed import median_seconds

# Points of the table for channels; widths between them are read off a straight line.
POINTS = 8
STEP = 64


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one forward pass of `tokens` tokens. outside: without the blocks. full: a block as it is.

    by_channels: a block with so many channels and all heads. by_groups: with so many key-value heads and all channels.
    blocks: of the dense model.
    """

    tokens: int
    outside: float
    full: float
    by_channels: Mapping[int, float]
    by_groups: Mapping[int, float]
    first_key: str

    def seconds(self, shape: Shape) -> float:
        """What a model of a shape takes."""
        block = _between(self.by_channels, shape.channels[self.first_key])
        if shape.groups is not None and self.by_groups:
            block += self.by_groups[shape.groups] - self.full
        return self.outside + len(shape.blocks) * block


def measure_latency(anatomy: Anatomy, batch: Tensor) -> LatencyTable:
    """Time blocks of many shapes, in turns, on one window of a batch [batch, sequence]."""
    tokens, full = batch[:1], anatomy.full.channels[anatomy.first_key]
    widths = sorted({*range(STEP, full, max(STEP, full // POINTS // STEP * STEP)), full})
    shapes: dict[tuple[str, int], Shape] = {
        ("channels", width): anatomy.with_channels(anatomy.full, width) for width in widths
    }
    if anatomy.full.groups is not None:
        shapes |= {("groups", n): replace(anatomy.full, groups=n) for n in range(1, anatomy.full.groups)}
    runs: dict[tuple[str, int], Callable[[], object]] = {key: _runner(anatomy, shapes[key], tokens) for key in shapes}
    runs["outside", 0] = _outside(anatomy, tokens)
    found = median_seconds(runs)
    whole = found["channels", full]
    groups = {number: found[key, number] for key, number in found if key == "groups"}
    return LatencyTable(
        tokens.numel(),
        found["outside", 0],
        whole,
        {number: found[key, number] for key, number in found if key == "channels"},
        {**groups, anatomy.full.groups: whole} if anatomy.full.groups is not None else {},
        anatomy.first_key,
    )


def _runner(anatomy: Anatomy, shape: Shape, tokens: Tensor) -> Callable[[], object]:
    """One block of a shape on the model's own hidden states, its weights drawn: their values cost no time."""
    decoder = anatomy.decoder
    index = len(decoder.blocks) // 2
    blocks = anatomy.blueprint(shape).get_submodule(decoder.family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    first = next(decoder.blocks[index].parameters())
    block = blocks[index].to(first.dtype).to_empty(device=first.device).eval()
    for tensor in (*block.parameters(), *block.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.02)
    inputs = ModelInputs(decoder, [tokens])
    call, hidden = inputs.calls(tokens, "latency")[index], inputs.hidden[0]

    def run() -> object:
        with torch.no_grad():
            return call.run(block, hidden)

    return run


def _outside(anatomy: Anatomy, tokens: Tensor) -> Callable[[], object]:
    """Embedding, final norm and head."""
    decoder = anatomy.decoder

    def run() -> object:
        with torch.no_grad(), stand_ins(decoder.blocks):
            return decoder.model(input_ids=tokens.to(decoder.device), use_cache=False)

    return run


def _between(table: Mapping[int, float], width: int) -> float:
    """The seconds of a width, on the line through its neighbours in the table."""
    known = sorted(table)
    above = min((each for each in known if each >= width), default=known[-1])
    below = max((each for each in known if each <= width), default=known[0])
    if above == below:
        return table[above]
    return table[below] + (table[above] - table[below]) * (width - below) / (above - below)
