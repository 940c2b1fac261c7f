"""A tiny random model of every architecture in the table of blocks.py, and of variants that run other code.

Sizes are written in each family's own words. What a test must know of a family, and may not take from the code under
test, stands here too: which matrices are routers, and which are kept transposed.

    python -m tests.architectures     # prints the table of docs/architectures.md
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsegpt.model.families import FAMILIES, Family
from sparsegpt.solvers.masks import layer_mask
from sparsegpt.sparsity import NM
from tests.support import VOCABULARY, tiny_model, unsettled

# Sizes in other words than tiny_model's; None takes one of its sizes away.
_OTHER_WORDS = {"intermediate_size": None, "num_key_value_heads": None}
_ALIBI = {**_OTHER_WORDS, "max_position_embeddings": None}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
_MIXED = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

CONFIGS: dict[str, dict[str, object]] = {
    "bloom": _ALIBI,
    "cohere": {},
    "cohere2": {"layer_types": _MIXED, "sliding_window": 4},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy", "n_group": None, "topk_group": None},
    "deepseek_v3": _DEEPSEEK,
    "falcon": {"ffn_hidden_size": 64, "intermediate_size": None},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "layer_types": _MIXED, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "layer_types": _MIXED, "sliding_window": 4},
    "gpt2": {"n_inner": 64, **_OTHER_WORDS},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": _MIXED,
        "sliding_window": 4,
        "rope_parameters": _ROPE,
    },
    "gptj": {"n_inner": 64, "rotary_dim": 4, **_OTHER_WORDS},
    "granite": {"residual_multiplier": 0.25, "embedding_multiplier": 4.0, "attention_multiplier": 0.5},
    "llama": {},
    "llama4_text": {
        "intermediate_size_mlp": 64,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "head_dim": 8,
        "attention_chunk_size": 8,
    },
    "ministral": {"head_dim": 8, "layer_types": _MIXED, "sliding_window": 4},
    "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "mpt": {"max_seq_len": 64, "expansion_ratio": 2, **_ALIBI},
    "olmo2": {},
    "olmo3": {"layer_types": _MIXED, "sliding_window": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    "opt": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {},
}

# Variants: name -> (model_type, changes to its configuration).
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {model_type: (model_type, {}) for model_type in CONFIGS} | {
    "bloom-post-norm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "deepseek_v3-all-experts": ("deepseek_v3", {"first_k_dense_replace": 0, "q_lora_rank": None}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm": ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    "falcon-sequential": (
        "falcon",
        {"parallel_attn": False, "alibi": True, "multi_query": False, "bias": True},
    ),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-sliding": ("mistral", {"sliding_window": 4}),
    "opt-untied": ("opt", {"tie_word_embeddings": False}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt-projected": ("opt", {"word_embed_proj_dim": 16, "enable_bias": False}),
    "phi-qk-norm": ("phi", {"qk_layernorm": True}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3_moe-mixed": ("qwen3_moe", {"mlp_only_layers": [0]}),
}

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
# Multimodal models: model_type -> the configurations of its two towers, and what else it needs.
WRAPPERS: dict[str, dict[str, object]] = {
    "gemma3": {
        "text_config": {**_TEXT, "layer_types": _MIXED, "sliding_window": 4},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 90,
    },
    "llama4": {
        "text_config": {
            **_TEXT,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
        },
        "vision_config": {
            **_VISION,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "pixel_shuffle_ratio": 0.5,
        },
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model"},
        "image_token_index": 90,
    },
    "qwen2_vl": {
        "text_config": {**_TEXT, "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    },
}

MIXTURES = ("deepseek_v2", "deepseek_v3", "gpt_oss", "llama4_text", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
# A variant of each layout in the table and of each form of experts, and models inside others: for what is the same in
# all rows of one layout.
COVERING = (
    "llama-tied",
    "bloom",
    "bloom-post-norm",
    "cohere2",
    "deepseek_v3",
    "falcon-new",
    "falcon-sequential",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gpt_neox-sequential",
    "gpt_oss",
    "gptj",
    "granite",
    "llama4_text",
    "mixtral",
    "mpt",
    "opt-post-norm",
    "opt-projected",
    "phi",
    "phi3",
    "qwen2_moe",
    "starcoder2",
    "gemma3",
    "qwen2_vl",
)
_ROUTERS = (".mlp.gate.weight", ".router.weight", ".shared_expert_gate.weight")
_TRANSPOSED = {"gpt2": ("",), "gpt_oss": ("experts.",), "llama4_text": ("experts.",)}


def tiny_variant(variant: str, **overrides: object) -> nn.Module:
    """The tiny random model of a variant."""
    model_type, changes = VARIANTS[variant]
    return tiny_model(model_type, **{**CONFIGS[model_type], **changes, **overrides})


def tiny_wrapper(model_type: str) -> nn.Module:
    """A tiny random multimodal model."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **WRAPPERS[model_type])
    return unsettled(AutoModelForImageTextToText.from_config(config).eval())


def tiny(name: str) -> nn.Module:
    """The tiny random model of a variant or a wrapper."""
    return tiny_wrapper(name) if name in WRAPPERS else tiny_variant(name)


def block_matrices(model: nn.Module) -> dict[str, Tensor]:
    """Every weight matrix inside the decoder blocks, [out_features, in_features], by the linear's full name.

    Found in the state dict, by shape: matrices that are no routers, and each expert's slice of the 3-D ones.
    """
    found = {}
    transposed = _TRANSPOSED.get(model.config.get_text_config().model_type, ())
    for key, tensor in language_state(model).items():
        if tensor.ndim < 2 or key.endswith(_ROUTERS) or not any(part.isdigit() for part in key.split(".")):
            continue
        turned = any(part in key for part in transposed)
        if tensor.ndim == 2:
            found[key.removesuffix(".weight")] = tensor.T if turned else tensor
        elif not key.endswith("_bias"):
            path, _, last = key.rpartition(".")
            for expert, matrix in enumerate(tensor):
                found[f"{path}.{expert}.{last}"] = matrix.T if turned else matrix
    return {name: matrix for name, matrix in found.items() if not name.endswith("_bias")}


@torch.no_grad()
def save_pruned(folder: Path, variant: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A variant's or wrapper's tiny model, pruned to 2:4 by magnitude, in a folder with the report `run` would leave.

    Returned with the weight matrices of its blocks.
    """
    model = tiny(variant)
    matrices = block_matrices(model)
    for matrix in matrices.values():
        matrix.masked_fill_(~layer_mask(matrix.abs(), NM(2, 4)), 0)
    model.save_pretrained(folder)
    layers = [{"name": name, "sparsity": "2:4", "shape": list(matrix.shape)} for name, matrix in matrices.items()]
    (folder / "report.json").write_text(json.dumps({"layers": layers}))
    return model, matrices


def stored_keys(matrices: dict[str, Tensor]) -> set[str]:
    """Keys of the state dict that hold these matrices."""
    return {f"{name}.weight" for name in matrices} | {re.sub(r"\.\d+(\.\w+)$", r"\1", name) for name in matrices}


def language_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what belongs to a vision tower and the way from it."""
    state = model.state_dict()
    return {key: state[key] for key in state if not any(word in key for word in ("vision", "visual", "projector"))}


@torch.no_grad()
def expected_inputs(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """The float64 rows that each weight matrix of the blocks is multiplied with in a run of the whole model.

    Those of experts follow from what the experts' module is given and its definition, written down again here.
    """
    matrices = block_matrices(model)
    linears = {name for name in matrices if ".experts." not in name}
    rows, routed, handles = {}, {}, []

    def note(name):
        def hook(module, args, kwargs, output):
            if name in linears:
                inputs = args[0] if args else kwargs["hidden_states"]
                rows[name] = inputs.double().reshape(-1, inputs.shape[-1])
            else:
                routed[name] = (module, [value.clone() for value in (*args, *kwargs.values())])

        return hook

    for name, module in model.named_modules():
        if name in linears or (name.endswith(".experts") and any(key.startswith(f"{name}.") for key in matrices)):
            handles.append(module.register_forward_hook(note(name), with_kwargs=True))
    model(input_ids=windows)
    for handle in handles:
        handle.remove()
    for name, (module, given) in routed.items():
        for expert in range(len(module.down_proj)):
            inputs = _sent_to(expert, len(module.down_proj), *given).double()
            rows[f"{name}.{expert}.gate_up_proj"] = inputs
            gate_up = inputs @ matrices[f"{name}.{expert}.gate_up_proj"].double().T
            if hasattr(module, "gate_up_proj_bias"):
                gate_up += module.gate_up_proj_bias[expert].double()
            rows[f"{name}.{expert}.down_proj"] = _gated(model.config.model_type, gate_up)
    return rows


def _sent_to(expert: int, experts: int, hidden: Tensor, chosen: Tensor | None = None, *_: Tensor) -> Tensor:
    """The rows of hidden states that reach an expert; Llama 4 sends all, those not meant for it as zeros."""
    if chosen is None:
        part = hidden.view(experts, -1, hidden.shape[-1])[expert]
        return part[part.abs().sum(1) > 0]
    return hidden[(chosen == expert).any(1)]


def _gated(model_type: str, gate_up: Tensor) -> Tensor:
    if model_type == "gpt_oss":  # interleaved, clamped, with a shifted up part
        gate, up = gate_up[:, ::2].clamp(max=7.0), gate_up[:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = gate_up.chunk(2, dim=1)
    return gate * torch.sigmoid(gate) * up


# The table of docs/architectures.md


def architecture_table() -> str:
    """Every row of FAMILIES with the tiny models that test it, as Markdown."""
    lines = ["| architecture | models | tiny models in the tests | residual correction |", "|---|---|---|---|"]
    for model_type, family in FAMILIES.items():
        variants = [variant for variant, (base, _) in VARIANTS.items() if base == model_type]
        variants += [wrapper for wrapper in WRAPPERS if model_type in (f"{wrapper}_text", _text_type(wrapper))]
        lines.append(f"| {model_type} | {family.models} | {', '.join(variants)} | {_corrected(family, model_type)} |")
    return "\n".join(lines)


def _text_type(wrapper: str) -> object:
    text = WRAPPERS[wrapper]["text_config"]
    assert isinstance(text, dict)
    return text.get("model_type")


def _corrected(family: Family, model_type: str) -> str:
    if family.uncorrectable:
        return "off: norms after the projections"
    # Of Qwen 2 MoE and Llama 4 the shared expert counts among the experts.
    if model_type not in MIXTURES:
        return "yes"
    shared = any("shared" in name for name in family.residuals)
    return "all but routed experts" if shared else "all but experts"


if __name__ == "__main__":
    print(architecture_table())
