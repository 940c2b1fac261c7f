"""Where a model keeps its decoder blocks: one row of data an architecture, by its text configuration's model_type.

Which linears share an input is not written here: `capture.Course` sees it when a block runs. A row says only
what running cannot tell: the path of the block list, and which projection is added to which residual stream. To
support another model_type, add a row to FAMILIES and its tiny configuration to tests/architectures.py:
tests/model/test_families.py runs over this same table, and the table of docs/architectures.md is printed from both.

Residual correction aims a projection at what the stream should be after the addition that it writes into (see
solvers/correction.py), so what it undoes is the drift of everything added before it. Attention is added to the stream
that entered the block; the MLP to what attention left. In a parallel block both branches read the stream that entered
and one sum adds all three; as sums may be taken in any order, attention counts as added first there too. The MLP then
undoes what the corrected attention has left over, and no drift is undone twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.model.routers import mixture_of
from sparsegpt.model.unfuse import is_plain_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Residual:
    """What the output of a projection is added to.

    source: submodule of the block whose input is the stream, "" for the block itself. plus: submodule whose output
    is added to the stream before the projection's. multiplier: attribute of the block by which the projection's
    output is multiplied before the addition; the drift is divided by it.
    """

    source: str
    plus: str = ""
    multiplier: str = ""


@dataclass(frozen=True)
class Family:
    """One architecture's layout.

    blocks: dotted path from the model to its ModuleList of decoder blocks.
    models: what users know it by.
    residuals: projection -> what it is added to, by names inside the block. A block that lacks the name (some blocks
    of a model are dense, others mixtures of experts) does without; a projection not listed is not corrected for it.
    instead: (attribute of the configuration, value) -> the row that holds then.
    uncorrectable: why residual correction cannot be had; "" where it can.
    note: told to the user with every run.
    """

    blocks: str
    models: str = ""
    residuals: Mapping[str, Residual] = field(default_factory=dict)
    instead: Mapping[tuple[str, Any], "Family"] = field(default_factory=dict)
    uncorrectable: str = ""
    note: str = ""


def _sequential(attention: str, attention_norm: str, mlp: str, mlp_norm: str) -> dict[str, Residual]:
    """Attention is added first, then the MLP; each branch reads the stream through a norm of its own."""
    return {attention: Residual(attention_norm), mlp: Residual(mlp_norm)}


def _parallel(attention: str, mlp: str) -> dict[str, Residual]:
    """Both branches read the stream that enters the block, and are added to it together: see the head of the file."""
    return {attention: Residual(""), mlp: Residual("", plus=attention.partition(".")[0])}


_LLAMA = _sequential("self_attn.o_proj", "input_layernorm", "mlp.down_proj", "post_attention_layernorm")
_NEOX = _sequential("attention.dense", "input_layernorm", "mlp.dense_4h_to_h", "post_attention_layernorm")
_BLOOM = _sequential("self_attention.dense", "input_layernorm", "mlp.dense_4h_to_h", "post_attention_layernorm")
# Each projection is added to what has left the norm, which is what enters attention and MLP themselves.
_BLOOM_POST = _sequential("self_attention.dense", "self_attention", "mlp.dense_4h_to_h", "mlp")
_OPT = _sequential("self_attn.out_proj", "self_attn_layer_norm", "fc2", "final_layer_norm")
_OPT_POST = _sequential("self_attn.out_proj", "self_attn", "fc2", "fc1")  # opt-350m normalises after the addition
# Shared experts are added to the output of the routed ones, which run first. Routed experts are not corrected: the
# pruned model sends them other tokens than the dense one.
_DEEPSEEK = {**_LLAMA, "mlp.shared_experts.down_proj": Residual("post_attention_layernorm", plus="mlp.experts")}
# residual + output * residual_multiplier
_GRANITE = {name: Residual(stream.source, multiplier="residual_multiplier") for name, stream in _LLAMA.items()}
_LLAMA4 = _sequential("self_attn.o_proj", "input_layernorm", "feed_forward.down_proj", "post_attention_layernorm")
_STARCODER = _sequential("self_attn.o_proj", "input_layernorm", "mlp.c_proj", "post_attention_layernorm")
_POST_NORM = "a norm stands between its projections and the residual stream"


def _llama(models: str, residuals: Mapping[str, Residual] | None = None) -> Family:
    return Family("model.layers", models, _LLAMA if residuals is None else residuals)


def _post_norm(models: str) -> Family:
    return Family("model.layers", models, uncorrectable=_POST_NORM)


FAMILIES: dict[str, Family] = {
    "bloom": Family(
        "transformer.h",
        "BLOOM, BLOOMZ",
        _BLOOM,
        {("apply_residual_connection_post_layernorm", True): Family("transformer.h", residuals=_BLOOM_POST)},
    ),
    "cohere": _llama("Command R", _parallel("self_attn.o_proj", "mlp.down_proj")),
    "cohere2": _llama("Command R7B, Command A", _parallel("self_attn.o_proj", "mlp.down_proj")),
    "deepseek_v2": _llama("DeepSeek-V2", _DEEPSEEK),
    "deepseek_v3": _llama("DeepSeek-V3, R1", _DEEPSEEK),
    "falcon": Family(
        "transformer.h",
        "Falcon 7B to 180B, Falcon-RW",
        _parallel("self_attention.dense", "mlp.dense_4h_to_h"),
        {("parallel_attn", False): Family("transformer.h", residuals=_BLOOM)},  # Falcon-RW, with alibi
    ),
    "gemma": _llama("Gemma 1"),
    "gemma2": _post_norm("Gemma 2"),
    "gemma3_text": _post_norm("Gemma 3, alone and inside its multimodal form"),
    "gpt2": Family("transformer.h", "GPT-2", _sequential("attn.c_proj", "ln_1", "mlp.c_proj", "ln_2")),
    "gpt_neox": Family(
        "gpt_neox.layers",
        "GPT-NeoX, Pythia",
        _parallel("attention.dense", "mlp.dense_4h_to_h"),
        {("use_parallel_residual", False): Family("gpt_neox.layers", residuals=_NEOX)},
    ),
    "gpt_oss": _llama("GPT-OSS, unquantised"),
    "gptj": Family("transformer.h", "GPT-J", _parallel("attn.out_proj", "mlp.fc_out")),
    "granite": _llama("Granite 3", _GRANITE),
    "llama": _llama("Llama 1 to 3, TinyLlama, SmolLM 1 and 2"),
    # Routed and shared experts are added in one sum, the routed ones expert by expert: the shared one is not listed.
    "llama4_text": _llama("Llama 4, text", _LLAMA4),
    "ministral": _llama("Ministral"),
    "mistral": _llama("Mistral"),
    "mixtral": _llama("Mixtral"),
    "mpt": Family("transformer.blocks", "MPT", _sequential("attn.out_proj", "norm_1", "ffn.down_proj", "norm_2")),
    "olmo2": _post_norm("OLMo 2"),
    "olmo3": _post_norm("OLMo 3"),
    "olmoe": _llama("OLMoE"),
    "opt": Family(
        "model.decoder.layers",
        "OPT",
        _OPT,
        {("do_layer_norm_before", False): Family("model.decoder.layers", residuals=_OPT_POST)},
    ),
    "phi": _llama("Phi 1 to 2", _parallel("self_attn.dense", "mlp.fc2")),
    "phi3": _llama("Phi 3, Phi 4"),
    "qwen2": _llama("Qwen 2, Qwen 2.5"),
    # A gate of its own multiplies the shared expert's output, token by token: not listed.
    "qwen2_moe": _llama("Qwen 1.5 MoE, Qwen 2 MoE"),
    "qwen2_vl_text": _llama("Qwen 2-VL, text"),
    "qwen3": _llama("Qwen 3"),
    "qwen3_moe": _llama("Qwen 3 MoE"),
    "smollm3": _llama("SmolLM 3"),
    "starcoder2": _llama("StarCoder 2", _STARCODER),
}


def family_of(model: "PreTrainedModel") -> Family:
    """The row for a transformers model, or one made up for a model whose structure leaves no doubt.

    Of a multimodal model it is the row of its language tower, with the path to the tower. SparseGPTError lists the
    known model types.
    """
    if not hasattr(model, "config"):
        raise SparseGPTError(
            f"expected a causal language model of transformers, found {type(model).__name__}, which has no config"
        )
    if hasattr(model, "merge_and_unload"):
        raise SparseGPTError(
            f"{type(model).__name__} holds adapters: call `model = model.merge_and_unload()` first, and prune what it "
            "returns"
        )
    config = model.config
    refuse_encoder(config)
    text = _text_config(config)
    model_type = getattr(text, "model_type", type(model).__name__)
    if model_type not in FAMILIES:
        return _by_structure(model, model_type)
    family = FAMILIES[model_type]
    for (attribute, value), other in family.instead.items():
        if getattr(text, attribute, None) == value:
            family = other
    return family if text is config else replace(family, blocks=_inside_tower(model, family.blocks))


def _text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model; SparseGPTError where it describes several."""
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError as error:
        raise SparseGPTError(
            f"{type(config).__name__} describes more than one language model: expected a decoder alone"
        ) from error


def _inside_tower(model: "PreTrainedModel", path: str) -> str:
    """The path of the block list of a language tower that stands inside a larger model."""
    tower = _name_of(model, model.get_decoder())
    tail = path.partition(".")[2]  # a row's path starts with the tower's name in a model of text alone
    names = {name for name, _ in model.named_modules()}
    return next((name for name in (f"{tower}.{tail}", f"{tower}.{path}") if name in names), path)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def refuse_encoder(config: Any) -> None:
    """SparseGPTError for the configuration of a model that encodes; one that only its attention tells is found later.

    BERT and its kin are decoders too, where their configuration says so.
    """
    from transformers import AutoModelForMaskedLM

    model_type = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise SparseGPTError(f"model type {model_type!r} has an encoder: expected a decoder alone")
    if type(config) in AutoModelForMaskedLM._model_mapping and getattr(config, "is_decoder", None) is False:
        raise SparseGPTError(
            f"model type {model_type!r} is an encoder (is_decoder is false): expected a causal language model"
        )


def _by_structure(model: "PreTrainedModel", model_type: str) -> Family:
    """A row for a model whose language tower has one list of blocks with weight matrices that is as long as it should.

    Blocks may be of several classes from one file, as in hybrids of attention and Mamba.
    """
    refusal = f"model type {model_type!r} is not known"
    advice = f"known are {', '.join(FAMILIES)}; to support it, add a row to FAMILIES in sparsegpt/model/families.py"
    tower = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not _block_lists(tower):
        tower = model  # some call their output layer `decoder`
    prefix = _name_of(model, tower)
    found = [f"{prefix}.{name}".strip(".") for name in _block_lists(tower)]
    layers = getattr(_text_config(model.config), "num_hidden_layers", None)
    if len(found) > 1:
        as_long = [name for name in found if len(_list_at(model, name)) == layers]
        found = as_long if len(as_long) == 1 else found
    if len(found) != 1:
        lists = f"{len(found)} ({', '.join(found)})" if found else "none"
        raise SparseGPTError(
            f"{refusal} and its structure leaves doubt: expected one list of at least two blocks, found {lists}; "
            f"{advice}"
        )
    blocks = _list_at(model, found[0])
    classes = ", ".join(dict.fromkeys(type(block).__name__ for block in blocks))
    return Family(
        found[0],
        uncorrectable="it is not known what its projections are added to",
        note=f"{refusal}: its {len(blocks)} blocks were found by structure at {found[0]} ({classes}); compare the "
        "perplexities with care",
    )


def _list_at(model: nn.Module, path: str) -> nn.ModuleList:
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _block_lists(tower: nn.Module) -> list[str]:
    """Names of the outermost lists of two or more modules, from one file, that hold weight matrices."""
    found: list[str] = []
    for name, module in tower.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        files = {type(block).__module__ for block in module}
        matrices = all(any(p.ndim > 1 for p in block.parameters()) for block in module)
        if len(module) > 1 and matrices:
            found.append(name if len(files) == 1 else "")
    return found if "" not in found else []


def prunable_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of a block by its name inside the block; no router, and nothing that computes otherwise.

    Inside `unfuse.unfused` this includes what the model keeps in another form.
    """
    routers = mixture_of(block).routers
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name not in routers and is_plain_linear(module)
    }
