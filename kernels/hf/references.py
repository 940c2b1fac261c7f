"""The code of Llama's decoder block in transformers, by which blocks that compute the same are recognised: instruction
for instruction, names of what it calls included (`plain.same_code`). None of it is ever called.

From transformers' models/llama/modeling_llama.py (Apache 2.0)."""

# ruff: noqa: D103
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import nn

from sparsegpt.kernels.layers.plain import same_code


def block(
    self,
    hidden_states,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    use_cache=False,
    position_embeddings=None,
    **kwargs,
):
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states = self.mlp(hidden_states)
    hidden_states = residual + hidden_states
    return hidden_states  # noqa: RET504


def rotate_half(x):
    """Has a docstring, as the original."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """Has a docstring, as the original."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


# Attention of Llama, and what others add to it: a norm of each head's query and key, a window that the mask stands for.
_ATTENTION = """
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # a method of what is imported is called otherwise

def attention(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
    input_shape = hidden_states.shape[:-1]
    hidden_shape = (*input_shape, -1, self.head_dim)

    query_states = {query}.transpose(1, 2)
    key_states = {key}.transpose(1, 2)
    value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

    cos, sin = position_embeddings
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

    if past_key_values is not None:
        key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

    attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, eager_attention_forward
    )

    attn_output, attn_weights = attention_interface(
        self,
        query_states,
        key_states,
        value_states,
        attention_mask,
        dropout=0.0 if not self.training else self.attention_dropout,
        scaling=self.scaling,
        {window}**kwargs,
    )

    attn_output = attn_output.reshape(*input_shape, -1).contiguous()
    attn_output = self.o_proj(attn_output)
    return attn_output, attn_weights
"""
_PLAIN = {
    "query": "self.q_proj(hidden_states).view(hidden_shape)",
    "key": "self.k_proj(hidden_states).view(hidden_shape)",
}
_NORMED = {name: f"self.{name[0]}_norm({text})" for name, text in _PLAIN.items()}
_WINDOWS = ("", "sliding_window=self.sliding_window, ", "sliding_window=getattr(self.config, 'sliding_window', None), ")


@cache
def _attentions(normed: bool) -> list[Any]:
    """The functions that the texts above are."""
    made = []
    for window in _WINDOWS:
        names: dict[str, Any] = {}
        exec(_ATTENTION.format(window=window, **(_NORMED if normed else _PLAIN)), names)
        made.append(names["attention"])
    return made


def is_block(module: nn.Module) -> bool:
    """Whether a module's class computes what Llama's decoder block does, whatever its norms and its MLP are."""
    return same_code(inspect.unwrap(type(module).forward), block)


def is_attention(module: nn.Module, normed: bool) -> bool:
    """Whether a module's class computes what Llama's attention does, rotary positions included.

    normed: with a norm of each head's query and key, as Qwen 3.
    """
    forward = inspect.unwrap(type(module).forward)
    if not any(same_code(forward, reference) for reference in _attentions(normed)):
        return False
    turn = inspect.unwrap(forward.__globals__["apply_rotary_pos_emb"])
    return same_code(turn, apply_rotary_pos_emb) and same_code(turn.__globals__["rotate_half"], rotate_half)
