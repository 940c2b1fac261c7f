"""What a smaller model looks like: its shape, its configuration, and how large it is.

Nothing is counted here: transformers itself builds the model of a configuration, without weights, and is asked.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import prunable_linears
from sparsegpt.model.unfuse import unfused
from sparsegpt.shrinking.layouts import Layout, Part, layout_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LAYERS, HEADS, KEY_HEADS, HEAD_WIDTH = "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"


@dataclass(frozen=True)
class Shape:
    """How much of a model is kept.

    blocks: indices of those kept. groups: key-value heads, each with the heads that read it; None where heads stay.
    channels: by the configuration's word for them. experts: None where there are none.
    """

    blocks: tuple[int, ...]
    groups: int | None
    channels: Mapping[str, int]
    experts: int | None = None

    def __str__(self) -> str:
        parts = [f"{len(self.blocks)} blocks", *(f"{key} {width}" for key, width in self.channels.items())]
        parts += [f"{self.groups} key-value heads"] * (self.groups is not None)
        return ", ".join([*parts, *([f"{self.experts} experts"] if self.experts is not None else [])])


@dataclass(frozen=True)
class Size:
    """Weights of the decoder blocks' matrices, and parameters of the whole model."""

    blocks: int
    total: int


@dataclass(frozen=True)
class Site:
    """A projection of a block whose input columns can leave: its part, its name, its width, and columns of a group.

    head: columns of one head; 1 of channels.
    """

    part: Part
    holder: str
    name: str
    width: int
    group: int = 1
    head: int = 1


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What of a model can leave. sites: of every block. full: its shape as it is."""

    decoder: DecoderModel
    layout: Layout
    sites: tuple[tuple[Site, ...], ...]
    full: Shape
    _sizes: dict[str, Size] = field(default_factory=dict)

    @classmethod
    def of(cls, decoder: DecoderModel) -> "Anatomy":
        """Look a model over; SparseGPTError, naming its type, where it cannot be shrunk."""
        config = decoder.model.config
        layout = layout_of(config)
        sites = tuple(_sites(block, layout, config) for block in decoder.blocks)
        parts = {site.part for block in sites for site in block}
        if not parts & set(layout.channels):
            raise SparseGPTError(
                f"{decoder.name}: expected {layout.channels[0].writer} in its blocks, found none: it is built "
                f"otherwise than the models of type {config.model_type!r} that can be shrunk"
            )
        full = Shape(
            tuple(range(len(decoder.blocks))),
            _key_heads(config) if layout.heads in parts else None,
            {
                part.key: int(getattr(config, part.key) or _width(sites, part))
                for part in layout.channels
                if part in parts
            },
            int(getattr(config, layout.experts)) if layout.experts else None,
        )
        return cls(decoder, layout, sites, full)

    @property
    def first_key(self) -> str:
        """What a number of channels counts."""
        return next(iter(self.full.channels))

    def changes(self, shape: Shape) -> dict[str, Any]:
        """What a configuration says otherwise of the model of this shape; nothing of the full one."""
        config = self.decoder.model.config
        found: dict[str, Any] = {}
        if shape.blocks != self.full.blocks:
            count = len(self.full.blocks)
            found = {
                key: [value[index] for index in shape.blocks]
                for key, value in config.to_dict().items()
                if isinstance(value, list) and len(value) == count
            }
            found[LAYERS] = len(shape.blocks)
        if shape.groups is not None and shape.groups != self.full.groups:
            assert self.full.groups is not None
            heads = int(getattr(config, HEADS))
            found[HEADS] = heads // self.full.groups * shape.groups
            found[KEY_HEADS] = shape.groups
            found[HEAD_WIDTH] = next(site.head for block in self.sites for site in block if site.head > 1)
        found |= {key: width for key, width in shape.channels.items() if width != self.full.channels[key]}
        if shape.experts != self.full.experts:
            found[self.layout.experts] = shape.experts
        return found

    def blueprint(self, shape: Shape) -> "PreTrainedModel":
        """The model of a shape, without weights.

        Raises SparseGPTError where the configuration cannot say this shape.
        """
        config = _changed(self.decoder.model.config, self.changes(shape))
        try:
            with torch.device("meta"):
                model: PreTrainedModel = type(self.decoder.model)(config)
        except Exception as error:  # whatever a library's check leads to
            raise SparseGPTError(
                f"{self.decoder.name} cannot be built with {shape}: {first_line(error)}; choose other widths"
            ) from error
        return model

    def size(self, shape: Shape) -> Size:
        """How many parameters the model of a shape has."""
        key = repr(shape)
        if key not in self._sizes:
            model = self.blueprint(shape)
            blocks = model.get_submodule(self.decoder.family.blocks)
            matrices = sum(parameter.numel() for parameter in blocks.parameters() if parameter.ndim > 1)
            self._sizes[key] = Size(matrices, sum(parameter.numel() for parameter in model.parameters()))
        return self._sizes[key]

    def scaled(self, channels: int) -> dict[str, int]:
        """All widths of channels, as wide a share of each as `channels` is of the first."""
        first = self.full.channels[self.first_key]
        return {key: max(1, width * channels // first) for key, width in self.full.channels.items()}

    def with_channels(self, shape: Shape, channels: int) -> Shape:
        """The same shape with so many channels."""
        return replace(shape, channels=self.scaled(channels))


def width_in(site: Site, shape: Shape, config: Any) -> int:
    """How many columns of a site a shape keeps."""
    if site.head > 1:
        return site.width if shape.groups is None else shape.groups * site.group
    return shape.channels[site.part.key] * _times(site.part, config)


def _changed(config: "PretrainedConfig", changes: Mapping[str, Any]) -> "PretrainedConfig":
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(changed, key, value)
    return changed


def _sites(block: nn.Module, layout: Layout, config: Any) -> tuple[Site, ...]:
    with unfused(block):
        linears = prunable_linears(block)
        return tuple(
            _site(part, holder, name, linear, config, linears)
            for name, linear in linears.items()
            for part in (*([layout.heads] if layout.heads else []), *layout.channels)
            if (holder := part.holder(name)) is not None
            and all(_inside(holder, feeder) in linears for feeder in part.feeders)
        )


def _site(part: Part, holder: str, name: str, linear: nn.Linear, config: Any, linears: Mapping[str, nn.Linear]) -> Site:
    width = linear.in_features
    if part.key == HEADS:
        return Site(part, holder, name, width, width // _key_heads(config), width // int(getattr(config, HEADS)))
    return Site(part, holder, name, width)


def _inside(holder: str, name: str) -> str:
    return f"{holder}.{name}".lstrip(".")


def feeders_of(site: Site) -> dict[str, tuple[str, ...]]:
    """The linears that feed a site, by their names in the block, and what stands among their outputs."""
    return {_inside(site.holder, name): sections for name, sections in site.part.feeders.items()}


def _key_heads(config: Any) -> int:
    return int(getattr(config, KEY_HEADS, None) or getattr(config, HEADS))


def _times(part: Part, config: Any) -> int:
    return int(getattr(config, part.times)) if part.times else 1


def _width(sites: tuple[tuple[Site, ...], ...], part: Part) -> int:
    return next(site.width for block in sites for site in block if site.part == part)
