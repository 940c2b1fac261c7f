"""The output layer: what it reads, and how it parts from a tied embedding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.model.capture import body_of, stand_ins
from sparsegpt.model.decoder import DecoderModel


def lm_head_of(decoder: DecoderModel) -> nn.Linear:
    """The model's output layer, with a weight of its own.

    Pruning a tied weight would prune the embedding too, so a tied head gets a copy and the config says so; the saved
    model is larger by this one matrix. Raises SparseGPTError when there is no linear output layer.
    """
    model = decoder.model
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise SparseGPTError(f"{decoder.name} has no linear lm_head: it cannot be pruned")
    if head.weight is decoder.embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    return head


@torch.no_grad()
def head_inputs(decoder: DecoderModel, tokens: Tensor, hidden: Tensor) -> Tensor:
    """What lm_head reads when the last block returns `hidden` [batch, sequence, features]: the final norm's output.

    Everything around the blocks is the model's own code; the blocks are stand-ins that hand `hidden` on.
    """
    body = body_of(decoder.model, decoder.blocks)
    hidden_states: Tensor = _replay(decoder, body, tokens, hidden).last_hidden_state
    return hidden_states


def logits_after(decoder: DecoderModel, tokens: Tensor, hidden: Tensor) -> Tensor:
    """What the model says when the last block returns `hidden`: logits [batch, sequence, tokens].

    Gradients flow back to `hidden`.
    """
    logits: Tensor = _replay(decoder, decoder.model, tokens, hidden).logits
    return logits


def _replay(decoder: DecoderModel, part: Callable[..., Any], tokens: Tensor, hidden: Tensor) -> Any:
    """What the model, or a part of it around the blocks, returns when the last block returns `hidden`."""
    with stand_ins(decoder.blocks) as recorders:
        recorders[-1].replay = hidden
        return part(**decoder.inputs(tokens))
