"""The output layer: what it reads, and how it parts from a tied embedding."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsegpt.capture import body_of, stand_ins
from sparsegpt.errors import SparseGPTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lm_head_of(model: "PreTrainedModel") -> nn.Linear:
    """The model's output layer, with a weight of its own.

    Pruning a tied weight would prune the embedding too, so a tied head gets a copy and the config says so; the saved
    model is larger by this one matrix. Raises SparseGPTError when there is no linear output layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise SparseGPTError(f"{type(model).__name__} has no linear lm_head: leave out --include lm_head")
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    return head


@torch.no_grad()
def head_inputs(model: "PreTrainedModel", blocks: nn.ModuleList, tokens: Tensor, hidden: Tensor) -> Tensor:
    """What lm_head reads when the last block returns `hidden` [batch, sequence, features]: the final norm's output.

    Everything around the blocks is the model's own code; the blocks are stand-ins that hand `hidden` on.
    """
    device = model.get_input_embeddings().weight.device
    with stand_ins(blocks) as recorders:
        recorders[-1].replay = hidden.to(device)
        output = body_of(model, blocks)(input_ids=tokens.to(device), use_cache=False)
    hidden_states: Tensor = output.last_hidden_state
    return hidden_states
