"""Tiny random models of architectures without a row in FAMILIES: pruned and proven, or refused in one line.

What is proven is that the blocks compute the same one by one as in the whole model, before and after (see
sparsegpt/driver/verification.py). Sizes are written in each architecture's own words. No width is EXPERTS, so that a
matrix with one row an expert is a router.

    python -m tests.more_architectures     # prints the table of docs/architectures.md
"""

import functools
import re
from dataclasses import dataclass

import torch
from torch import nn

from sparsegpt import SparseGPTError
from sparsegpt.driver.accounting import EXPECTED, Accounting, in_braces
from sparsegpt.driver.reports import PruneReport
from tests.support import VOCABULARY, prune_model, random_windows, tiny_model

EXPERTS = 6
# Sizes of other words than tiny_model's; None takes one of its sizes away.
_OTHER_WORDS = {"intermediate_size": None, "num_key_value_heads": None}
_EXPERTS = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_ROUTED = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_DEEPSEEK = {**_LATENT, **_ROUTED}
_INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
_MIXED = ["sliding_attention", "full_attention"]
_SLIDING = {"layer_types": _MIXED, "sliding_window": 4, "head_dim": 8}
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}

CONFIGS: dict[str, dict[str, object]] = {
    "afmoe": {**_EXPERTS, **_SLIDING, "num_shared_experts": 1, "num_dense_layers": 1},
    "aria_text": {"moe_num_experts": EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1},
    "bamba": {**_MAMBA, "attn_layer_indices": [1], "mamba_expand": 2},
    "bart": {
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "encoder_layers": 2,
        "d_model": 32,
    },
    "bert": {},
    "codegen": {"n_inner": 64, "rotary_dim": 4, **_OTHER_WORDS},
    "dbrx": {
        **dict.fromkeys(
            ("hidden_size", "num_hidden_layers", "num_attention_heads", *_OTHER_WORDS, "max_position_embeddings")
        ),
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": EXPERTS, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    },
    "deepseek_v32": {**_DEEPSEEK, **_INDEXER},
    "deepseek_v4": {**_DEEPSEEK, **_INDEXER, "head_dim": 16, "o_groups": 2, "o_lora_rank": 8, "num_hash_layers": 1},
    "dots1": {**_DEEPSEEK, "head_dim": 8},
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
        "moe_layer_interval": 1,
    },
    "exaone_moe": {**_EXPERTS, **_SLIDING, "mlp_layer_types": ["dense", "sparse"]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    "falcon_mamba": {"state_size": 8, "intermediate_size": 64, "time_step_rank": 4},
    "flex_olmo": {"num_experts": EXPERTS, "num_experts_per_tok": 2},
    "gemma3n_text": {
        **_SLIDING,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "altup_num_inputs": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {  # per-layer inputs, and keys and values that the last two blocks share
        **_SLIDING,
        "layer_types": _MIXED * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "glm4_moe": {**_ROUTED, "head_dim": 8},
    "glm_moe_dsa": {**_DEEPSEEK, **_INDEXER},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 4},
    "granitemoe": _LOCAL,
    "granitemoehybrid": {**_LOCAL, **_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "hrm_text": {},
    "hunyuan_v1_moe": {**_EXPERTS, "head_dim": 8, "moe_topk": 2, "num_shared_expert": 1},
    "hy_v3": {**_EXPERTS, "head_dim": 8, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "inkling_text": {
        **_ROUTED,
        "n_shared_experts": 2,
        "head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "d_rel": 8,
        "rel_extent": 16,
    },
    "jamba": {
        **_EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "jetmoe": {**_LOCAL, "kv_channels": 8},
    "kimi_linear": {
        **_LATENT,
        "num_experts": EXPERTS,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 16,
        "linear_num_heads": 2,
        "linear_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "first_k_dense_replace": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "longcat_flash": {
        **_LATENT,
        "num_hidden_layers": 4,
        "num_layers": 2,
        "head_dim": 8,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 16,
        "n_routed_experts": EXPERTS,
        "zero_expert_num": 3,
        "moe_topk": 2,
        "intermediate_size": None,
    },
    "mamba": {"state_size": 8, "intermediate_size": 64, "time_step_rank": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
    "mimo_v2_flash": {**_ROUTED, "head_dim": 8, "v_head_dim": 8},
    "minimax": {**_LOCAL, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "minimax_m2": {**_LOCAL, "head_dim": 8, "intermediate_size": 16},
    "modernbert-decoder": {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 1},
    "nemotron_h": {
        **_ROUTED,
        "layers_block_type": ["mamba", "attention", "moe"],
        "num_hidden_layers": 3,
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
        "moe_latent_size": 16,
    },
    "olmo_hybrid": {**_LINEAR_ATTENTION, "linear_num_value_heads": 2},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_OTHER_WORDS},
    "phimoe": _LOCAL,
    "qwen3_5_moe_text": {**_EXPERTS, **_LINEAR_ATTENTION, "shared_expert_intermediate_size": 16},
    "qwen3_next": {**_EXPERTS, **_LINEAR_ATTENTION, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "lru_width": 32,
        "attention_window_size": 8,
        "num_key_value_heads": 1,
    },
    "rwkv": {
        **dict.fromkeys(("max_position_embeddings", "num_key_value_heads", "num_attention_heads")),
        "attention_hidden_size": 32,
        "context_length": 64,
    },
    "stablelm": {},
    "xlstm": {"num_heads": 4, "num_blocks": 2},
    "youtu": _LATENT,
    "zaya": {"num_experts": EXPERTS, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "router_hidden_size": 16},
}

# Those that are refused, and words of the line that says why.
REFUSED = {
    "bert": "is an encoder",
    "gemma3n_text": "something passes between the blocks",  # four streams of hidden states in one tensor
    "hrm_text": "its structure leaves doubt",
    "rwkv": "cannot be run on tokens alone, block by block",  # its blocks return three values
    "zaya": "something passes between the blocks",  # what a block returns beside its hidden states
}


@dataclass(frozen=True)
class Outcome:
    """What came of a model: its report, or the line that refuses it."""

    model: nn.Module
    before: dict[str, torch.Tensor]
    report: PruneReport | None
    refusal: str = ""


@functools.cache
def outcome(model_type: str, preset: str) -> Outcome:
    """Prune a tiny model to 2:4, once a process."""
    model = tiny_model(model_type, **CONFIGS[model_type])
    for parameter in model.parameters():
        if not parameter.any():  # some begin with zeros
            parameter.data.normal_(std=0.2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        return Outcome(model, before, prune_model(model, random_windows(8), "2:4", preset=preset))
    except SparseGPTError as error:
        return Outcome(model, before, None, str(error))


def table() -> str:
    """Every architecture with what comes of it, as Markdown."""
    lines = ["| architecture | outcome | left dense, besides norms, biases and routers |", "|---|---|---|"]
    for model_type in CONFIGS:
        found = outcome(model_type, "paper")
        if found.report is None:
            lines.append(f"| {model_type} | refused: {REFUSED[model_type]} | |")
        else:
            lines.append(f"| {model_type} | pruned and proven | {_left(found.report.parameters)} |")
    return "\n".join(lines)


def _left(accounting: Accounting) -> str:
    """What of the blocks nobody asked to leave dense, by its last names."""
    found = []
    for reason, counts in accounting.not_prunable.items():
        if reason not in EXPECTED:
            names = dict.fromkeys(re.sub(r"^.*?\d+\.", "", name.removesuffix(".weight")) for name in counts)
            found.append(f"{', '.join(f'`{name}`' for name in in_braces(names))}: {reason}")
    return "; ".join(found)


if __name__ == "__main__":
    print(table())
