"""A causal language model, asked once what it is: its family, its decoder blocks, its head."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.model.families import Family, family_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


# What configurations call the longest sequence of a model.
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "n_ctx",
    "context_length",
    "max_target_positions",
    "model_max_length",
)


def position_limit(config: "PretrainedConfig") -> int | None:
    """The longest sequence that a model of this configuration has positions for; None where it does not say."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _POSITIONS)
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


@dataclass(frozen=True, eq=False)
class DecoderModel:
    """What everybody who works on a model's blocks needs; made once, by `of`, and passed on.

    model: the whole model. family: its row, see `families`. blocks: its list of decoder blocks. boundary: the token
    with which a document begins, where windows hold several: attention does not cross it, and positions start anew.
    """

    model: "PreTrainedModel"
    family: Family
    blocks: nn.ModuleList
    boundary: int | None = None

    @classmethod
    def of(cls, model: "PreTrainedModel", boundary: int | None = None) -> "DecoderModel":
        """Look a model up; SparseGPTError for one that is not known, or has no blocks where its family keeps them."""
        family = family_of(model)
        try:
            blocks = model.get_submodule(family.blocks)
        except AttributeError as error:
            raise SparseGPTError(
                f"expected decoder blocks at {family.blocks!r} in {type(model).__name__}, found no such module; "
                "load the model with its language-model head (AutoModelForCausalLM)"
            ) from error
        assert isinstance(blocks, nn.ModuleList)
        return cls(model, family, blocks, boundary)

    def inputs(self, tokens: torch.Tensor) -> dict[str, torch.Tensor | bool]:
        """Tokens [batch, sequence] -> how the model is called for them."""
        found: dict[str, torch.Tensor | bool] = {"input_ids": tokens.to(self.device), "use_cache": False}
        if self.boundary is not None:
            # transformers takes positions that do not go on by one for the beginning of another sequence.
            found["position_ids"] = positions_within(tokens.to(self.device), self.boundary)
        return found

    def prefix(self, index: int) -> str:
        """What the full names of everything in a block begin with."""
        return f"{self.family.blocks}.{index}."

    def by_prefix(self) -> Iterator[tuple[str, nn.Module]]:
        """Every block with its prefix, in order."""
        return ((self.prefix(index), block) for index, block in enumerate(self.blocks))

    @property
    def name(self) -> str:
        """Of the model's class, for messages."""
        return type(self.model).__name__

    @property
    def embedding(self) -> nn.Module:
        """What turns token ids into hidden states."""
        embedding: nn.Module = self.model.get_input_embeddings()
        return embedding

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        weight = self.embedding.weight
        assert isinstance(weight, torch.Tensor)
        return len(weight)

    @property
    def positions(self) -> int | None:
        """The longest sequence it has positions for; None where its configuration does not say."""
        return position_limit(self.model.config)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        weight = self.embedding.weight
        assert isinstance(weight, torch.Tensor)
        return weight.device


def positions_within(tokens: torch.Tensor, boundary: int) -> torch.Tensor:
    """Tokens [batch, sequence] -> how far each is from the last boundary token, or from the window's beginning."""
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return places - places.where(tokens == boundary, 0).cummax(dim=1).values


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and its kin for this long."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
