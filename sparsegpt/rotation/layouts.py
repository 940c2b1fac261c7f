"""What of an architecture can be written in another basis: one row of data a model_type.

Two kinds of bases change nothing that a model computes. The stream: a norm without its mean (RMSNorm) returns R^T x
for R^T x, so everything that writes the residual stream may write R^T x, and everything that reads it may read so. A
LayerNorm does the same for rotations that leave the vector of ones where it is. The values: an attention head mixes
values over positions alone, so each key-value head may have a basis of its own, which the output projection undoes.

A gain stands between norm and rotation: it goes into the matrices that read the norm first. Where a norm stands between
a projection and the stream, or anything else works element by element, there is no such basis: the row says why.

After Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456, section 4) and SliceGPT (arXiv:2401.15024, theorem 1).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["own", "fused", "by head", "latent"]


@dataclass(frozen=True)
class Values:
    """Where values are made and where they are used, by names inside a block.

    source: the linear among whose outputs they are. output: the linear that reads all heads side by side. kind: "own":
    they are its only outputs; "fused": queries, keys and values one below the other; "by head": so for each key-value
    head; "latent": for each head what is left of its key, then its value (multi-latent attention).
    """

    source: str
    output: str
    kind: Kind = "own"


@dataclass(frozen=True)
class Layout:
    """How an architecture's stream and values run.

    norms: each norm of a block that reads the stream, with an expression for the names of the matrices that read what
    it returns. writers: expression for the matrices whose outputs are added to the stream. positions: modules outside
    of the blocks, besides the token embedding, that write the stream. final: the norm after the last block, beside the
    list of blocks. centred: the norms subtract the mean. unit: what the norms' weights are where they do nothing.
    values: None where they cannot be told apart. no_stream, no_values: why not, in words; "" where it can.
    unless: (attribute of the configuration, value) -> the changes that hold then; the value ... stands for any but
    None and False.
    """

    norms: Mapping[str, str] = field(default_factory=dict)
    writers: str = ""
    positions: tuple[str, ...] = ()
    final: str = "norm"
    centred: bool = False
    unit: float = 1.0
    values: Values | None = None
    no_stream: str = ""
    no_values: str = ""
    unless: Mapping[tuple[str, Any], Mapping[str, Any]] = field(default_factory=dict)

    def of(self, config: Any) -> "Layout":
        """As it is in a model of this configuration."""
        found = self
        for (attribute, value), changes in self.unless.items():
            has = functools.reduce(lambda part, name: getattr(part, name, None), attribute.split("."), config)
            if has == value or (value is ... and has not in (None, False)):
                found = replace(found, **changes)
        return found


_POST_NORM = "a norm stands between its projections and the residual stream"
_CLIPS = {"no_values": "its values are clipped one by one"}
# Attention, the MLP and a mixture's routers, whatever it keeps its experts in.
_ATTENTION = r"self_attn\.((q|k|v|qkv|q_a)_proj|kv_a_proj_with_mqa)"
_MLP = r"(mlp|feed_forward)\.((experts\.\d+|shared_experts?)\.)?(gate_proj|up_proj|gate_up_proj)"
_ROUTERS = r"(mlp|feed_forward)\.(gate|router|shared_expert_gate)"
_OWN = Values("self_attn.v_proj", "self_attn.o_proj")

_LLAMA = Layout(
    {"input_layernorm": _ATTENTION, "post_attention_layernorm": f"{_MLP}|{_ROUTERS}"},
    r"self_attn\.o_proj|(mlp|feed_forward)\.(.+\.)?down_proj",
    values=_OWN,
)
_GEMMA = replace(_LLAMA, unit=0.0)
_DEEPSEEK = replace(_LLAMA, values=Values("self_attn.kv_b_proj", "self_attn.o_proj", "latent"))
_COHERE = replace(
    _LLAMA,
    norms={"input_layernorm": f"{_ATTENTION}|{_MLP}"},
    centred=True,
)
_VALUES_ALONE = Layout(values=_OWN, no_stream=_POST_NORM)
_NEOX = Layout(
    {"input_layernorm": r"attention\.query_key_value", "post_attention_layernorm": r"mlp\.dense_h_to_4h"},
    r"attention\.dense|mlp\.dense_4h_to_h",
    final="final_layer_norm",
    centred=True,
    values=Values("attention.query_key_value", "attention.dense", "by head"),
)
_FALCON_VALUES = Values("self_attention.query_key_value", "self_attention.dense", "by head")
_FALCON = Layout(
    {"input_layernorm": r"self_attention\.query_key_value|mlp\.dense_h_to_4h"},
    r"self_attention\.dense|mlp\.dense_4h_to_h",
    final="ln_f",
    centred=True,
    values=_FALCON_VALUES,
    unless={
        ("multi_query", True): {"values": replace(_FALCON_VALUES, kind="fused")},
        ("parallel_attn", False): {
            "norms": {
                "input_layernorm": r"self_attention\.query_key_value",
                "post_attention_layernorm": r"mlp\.dense_h_to_4h",
            }
        },
        ("new_decoder_architecture", True): {
            "values": _FALCON_VALUES,
            "norms": {
                "ln_attn": r"self_attention\.query_key_value",
                "ln_mlp": r"mlp\.dense_h_to_4h",
                "input_layernorm": r"self_attention\.query_key_value|mlp\.dense_h_to_4h",  # where one norm serves both
            },
        },
    },
)
_BLOOM = Layout(
    values=_FALCON_VALUES,
    no_stream="a norm stands between its embedding and the residual stream",
)
_OPT = Layout(
    {"self_attn_layer_norm": r"self_attn\.(q|k|v)_proj", "final_layer_norm": "fc1"},
    r"self_attn\.out_proj|fc2",
    ("embed_positions",),
    "final_layer_norm",
    centred=True,
    values=Values("self_attn.v_proj", "self_attn.out_proj"),
    unless={("do_layer_norm_before", False): {"no_stream": "it normalises the stream itself"}},
)
_GPT2 = Layout(
    {"ln_1": r"attn\.c_attn", "ln_2": r"mlp\.c_fc"},
    r"attn\.c_proj|mlp\.c_proj",
    ("wpe",),
    "ln_f",
    centred=True,
    values=Values("attn.c_attn", "attn.c_proj", "fused"),
)
_GPTJ = Layout(
    {"ln_1": r"attn\.(q|k|v)_proj|mlp\.fc_in"},
    r"attn\.out_proj|mlp\.fc_out",
    final="ln_f",
    centred=True,
    values=Values("attn.v_proj", "attn.out_proj"),
)
_MPT = Layout(
    {"norm_1": r"attn\.Wqkv", "norm_2": r"ffn\.up_proj"},
    r"attn\.out_proj|ffn\.down_proj",
    final="norm_f",
    centred=True,
    values=Values("attn.Wqkv", "attn.out_proj", "fused"),
)
_PHI = Layout(
    {"input_layernorm": r"self_attn\.(q|k|v)_proj|mlp\.fc1"},
    r"self_attn\.dense|mlp\.fc2",
    final="final_layernorm",
    centred=True,
    values=Values("self_attn.v_proj", "self_attn.dense"),
)
_STARCODER = Layout(
    {"input_layernorm": r"self_attn\.(q|k|v)_proj", "post_attention_layernorm": r"mlp\.c_fc"},
    r"self_attn\.o_proj|mlp\.c_proj",
    centred=True,
    values=_OWN,
)

LAYOUTS: dict[str, Layout] = {
    "bloom": _BLOOM,
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "falcon": _FALCON,
    "gemma": _GEMMA,
    "gemma2": _VALUES_ALONE,
    "gemma3_text": _VALUES_ALONE,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "gpt_oss": _LLAMA,
    "gptj": _GPTJ,
    "granite": _LLAMA,
    "llama": _LLAMA,
    "llama4_text": _LLAMA,
    "ministral": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "mpt": replace(_MPT, unless={("attn_config.clip_qkv", ...): _CLIPS}),
    "olmo2": _VALUES_ALONE,
    "olmo3": _VALUES_ALONE,
    "olmoe": replace(_LLAMA, unless={("clip_qkv", ...): _CLIPS}),
    "opt": _OPT,
    "phi": _PHI,
    "phi3": replace(_LLAMA, values=Values("self_attn.qkv_proj", "self_attn.o_proj", "fused")),
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen2_vl_text": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "smollm3": _LLAMA,
    "starcoder2": _STARCODER,
}
