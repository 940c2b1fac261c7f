"""Where the stream and the values of a model run: its layout, looked up in its modules.

Dimension key: D width of the stream, G key-value heads, H heads, F values of a head, R out_features, C in_features.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.head import lm_head_of
from sparsegpt.rotation.layouts import LAYOUTS, Layout


class Outside(NamedTuple):
    """What stands around the blocks: who writes the stream before them, the norm after them, who reads that."""

    entries: list[nn.Module]
    norm: nn.Module | None
    exit: nn.Module

    @property
    def modules(self) -> list[nn.Module]:
        """All of them."""
        return [*self.entries, *([] if self.norm is None else [self.norm]), self.exit]


class ValueHeads(NamedTuple):
    """The linears that make and use a block's values. groups: G, width: F."""

    source: nn.Module
    output: nn.Linear
    groups: int
    width: int
    in_slabs: bool

    def rows(self, parameter: Tensor) -> Tensor:
        """Of the source's weight [R, C] or bias [R], the rows of values: a view [G, F, C] or [G, F]."""
        shape = (self.groups, -1)
        found: Tensor = parameter.data if self.in_slabs else parameter.data[-self.groups * self.width :]
        return found.unflatten(0, shape)[:, -self.width :]  # type: ignore[no-any-return]

    def columns(self) -> Tensor:
        """Of the output's weight, the columns that read each key-value head: a view [R, G, H / G, F]."""
        columns: Tensor = self.output.weight.data.unflatten(1, (self.groups, -1, self.width))
        return columns


class Rotatable:
    """A model, and what of it can be written in another basis.

    no_stream, no_values: why not, in words; "" where it can.
    """

    def __init__(self, decoder: DecoderModel) -> None:
        self.decoder = decoder
        config = decoder.model.config
        text = config.get_text_config()
        model_type = getattr(text, "model_type", "")
        unknown = f"it is not known where models of type {model_type!r} read and write them"
        self.layout = LAYOUTS.get(model_type, Layout(no_stream=unknown, no_values=unknown)).of(text)
        self.no_values = self.layout.no_values
        self.no_stream = self.layout.no_stream
        if text is not config and not self.no_stream:
            self.no_stream = "what its vision tower writes into the stream is not rotated"
        self._heads = int(getattr(text, "num_attention_heads", 0))

    @property
    def width(self) -> int:
        """Of the stream."""
        return int(self.decoder.model.config.get_text_config().hidden_size)

    @property
    def unties(self) -> bool:
        """Whether the stream's basis costs a head of its own: the final norm's gain stands between it and embedding."""
        head = self.decoder.model.get_output_embeddings()
        tied = head is not None and head.weight is self.decoder.embedding.weight
        return tied and self._way("project_out") is None

    @property
    def head_parameters(self) -> int:
        """Of the head's weight."""
        head = self.decoder.model.get_output_embeddings()
        return 0 if head is None else int(head.weight.numel())

    @property
    def untied_share(self) -> float:
        """By which share the stream's basis makes the model larger."""
        if not self.unties:
            return 0.0
        whole: int = sum(parameter.numel() for parameter in self.decoder.model.parameters())
        return self.head_parameters / whole

    def outside(self) -> Outside:
        """What stands around the blocks. A tied head that reads the stream parts from the embedding."""
        into, out = self._way("project_in"), self._way("project_out")
        entries = [self.decoder.embedding if into is None else into]
        entries += [module for name in self.layout.positions if (module := self._way(name)) is not None]
        return Outside(entries, self._way(self.layout.final), lm_head_of(self.decoder) if out is None else out)

    def _way(self, name: str) -> nn.Module | None:
        """A module beside the list of blocks; None where the model has none of this name."""
        beside = self.decoder.model.get_submodule(self.decoder.family.blocks.rpartition(".")[0])
        found = getattr(beside, name, None)
        return found if isinstance(found, nn.Module) else None

    def readers(self, block: nn.Module) -> Iterator[tuple[str, dict[str, nn.Module]]]:
        """Inside `unfused`: each norm of a block that reads the stream, and the matrices that read what it returns."""
        for norm, expression in self.layout.norms.items():
            readers = _matching(block, expression)
            if readers and _matching(block, re.escape(norm)):
                yield norm, readers

    def writers(self, block: nn.Module) -> dict[str, nn.Module]:
        """Inside `unfused`: the matrices of a block that write the stream."""
        return _matching(block, self.layout.writers)

    def value_heads(self, block: nn.Module) -> ValueHeads | None:
        """Inside `unfused`: the values of a block; None for a block without attention, as hybrids have."""
        values = self.layout.values
        if values is None:
            return None
        if not all(_matching(block, re.escape(name)) for name in (values.source, values.output)):
            return None
        source, output = block.get_submodule(values.source), block.get_submodule(values.output)
        assert isinstance(output, nn.Linear)
        width = output.in_features // self._heads
        heads = int(source.out_features) // width  # type: ignore[arg-type]
        groups = {"own": heads, "latent": self._heads}.get(values.kind, (heads - self._heads) // 2)
        return ValueHeads(source, output, groups, width, in_slabs=values.kind in ("by head", "latent"))

    def check(self, *, stream: bool, values: bool) -> None:
        """Raise SparseGPTError for bases that this model does not have."""
        for wanted, what, reason in ((stream, "stream", self.no_stream), (values, "values", self.no_values)):
            if wanted and reason:
                raise SparseGPTError(f"the {what} of {self.decoder.name} cannot be rotated: {reason}")


def _matching(block: nn.Module, expression: str) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_modules() if expression and re.fullmatch(expression, name)}
