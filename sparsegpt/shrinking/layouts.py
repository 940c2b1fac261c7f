"""What of an architecture can leave as a whole: one row of data a model_type.

A part is a projection whose input columns can leave, together with the rows of the linears that feed them: the heads of
attention, the channels of an MLP. A row says which, and what the configuration calls their number. Where the
configuration has no word for it, plain transformers could not load the smaller model: the row says so.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sparsegpt.errors import SparseGPTError

# What stands among the outputs of a feeder, one below the other. own: a row for each column; keys: a row for each
# column of a single head of every key-value group; pairs: two neighbouring rows for each column.
Section = Literal["own", "keys", "pairs"]


@dataclass(frozen=True)
class Part:
    """Columns that can leave.

    where: expression for the path, inside a block, of the module that holds these linears. writer: the projection that
    reads the columns; feeders: the linears that write them. key: what the configuration calls their number. times: the
    attribute of the configuration that multiplies it, of several shared experts side by side.
    """

    where: str
    writer: str
    feeders: Mapping[str, tuple[Section, ...]] = field(hash=False)
    key: str
    times: str = ""

    def holder(self, linear: str) -> str | None:
        """The path of the module for which a linear of this name is the writer, "" for the block; None if it is not."""
        path, _, last = linear.rpartition(".")
        return path if last == self.writer and re.fullmatch(self.where, path) else None


@dataclass(frozen=True)
class Layout:
    """The parts of an architecture.

    heads: None where they cannot leave: no_heads says why. channels: of its MLPs; the first is what a number of
    channels counts. experts: what the configuration calls their number; "" where there are none.
    """

    channels: tuple[Part, ...]
    heads: Part | None = None
    no_heads: str = ""
    experts: str = ""


_OWN: tuple[Section, ...] = ("own",)
_KEYS: tuple[Section, ...] = ("keys",)
_GATED = {"gate_proj": _OWN, "up_proj": _OWN}
_FUSED: dict[str, tuple[Section, ...]] = {"gate_up_proj": ("own", "own")}
_HEADS = Part("self_attn", "o_proj", {"q_proj": _OWN, "k_proj": _KEYS, "v_proj": _KEYS}, "num_attention_heads")
_MLP = Part("mlp", "down_proj", _GATED, "intermediate_size")
_EXPERTS = Part(r"(mlp|feed_forward)\.experts\.\d+", "down_proj", _FUSED, "intermediate_size")
_OWN_WIDTH = replace(_EXPERTS, key="moe_intermediate_size")
_SHARED = Part(r"mlp\.shared_experts", "down_proj", _GATED, "moe_intermediate_size", "n_shared_experts")
_SHARED_QWEN = Part(r"mlp\.shared_expert", "down_proj", _GATED, "shared_expert_intermediate_size")

_TIED = "its configuration has no width of a head: a head is the hidden width divided by their number"
_NORM_ACROSS = "a norm stands across all heads together"
_LATENT = "its keys and values come from a latent that all heads share"
_SINKS = "every head has a sink of its own"

_LLAMA = Layout((_MLP,), _HEADS)
_OLMO = Layout((_MLP,), no_heads=_NORM_ACROSS)
_DEEPSEEK = Layout((_OWN_WIDTH, _SHARED, _MLP), no_heads=_LATENT, experts="n_routed_experts")
_TWO_LAYERS: dict[str, Layout] = {
    "gpt2": Layout((Part("mlp", "c_proj", {"c_fc": _OWN}, "n_inner"),), no_heads=_TIED),
    "gpt_neox": Layout((Part("mlp", "dense_4h_to_h", {"dense_h_to_4h": _OWN}, "intermediate_size"),), no_heads=_TIED),
    "gptj": Layout((Part("mlp", "fc_out", {"fc_in": _OWN}, "n_inner"),), no_heads=_TIED),
    "opt": Layout((Part("", "fc2", {"fc1": _OWN}, "ffn_dim"),), no_heads=_TIED),
    "phi": Layout((Part("mlp", "fc2", {"fc1": _OWN}, "intermediate_size"),), replace(_HEADS, writer="dense")),
    "starcoder2": Layout((Part("mlp", "c_proj", {"c_fc": _OWN}, "intermediate_size"),), _HEADS),
}

LAYOUTS: dict[str, Layout] = {
    **_TWO_LAYERS,
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt_oss": Layout(
        (replace(_EXPERTS, feeders={"gate_up_proj": ("pairs",)}),), no_heads=_SINKS, experts="num_local_experts"
    ),
    "granite": _LLAMA,
    "llama": _LLAMA,
    "ministral": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Layout((_EXPERTS,), _HEADS, experts="num_local_experts"),
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "olmoe": Layout((_EXPERTS,), no_heads=_NORM_ACROSS, experts="num_experts"),
    "phi3": Layout((replace(_MLP, feeders=_FUSED),), replace(_HEADS, feeders={"qkv_proj": ("own", "keys", "keys")})),
    "qwen2": _LLAMA,
    "qwen2_moe": Layout((_OWN_WIDTH, _SHARED_QWEN, _MLP), _HEADS, experts="num_experts"),
    "qwen3": _LLAMA,
    "qwen3_moe": Layout((_OWN_WIDTH, _MLP), _HEADS, experts="num_experts"),
    "smollm3": _LLAMA,
}


def layout_of(config: Any) -> Layout:
    """The row for a model of this configuration; SparseGPTError, naming the model type, for one that has none."""
    if config.get_text_config() is not config:
        raise SparseGPTError(
            f"model type {config.model_type!r} holds a language model inside another one: it cannot be shrunk; shrink "
            "the language model alone"
        )
    if config.model_type not in LAYOUTS:
        raise SparseGPTError(
            f"model type {config.model_type!r} cannot be shrunk: expected one of {', '.join(LAYOUTS)}; to support it, "
            "add a row to LAYOUTS in sparsegpt/shrinking/layouts.py"
        )
    return LAYOUTS[config.model_type]
