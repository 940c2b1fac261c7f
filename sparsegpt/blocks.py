"""Where a model keeps its decoder blocks: one row of data an architecture.

Which linears share an input is not written here: `capture.shared_inputs` sees it when a block runs. A row says only
what running cannot tell: the path of the block list, and which projection is added to which residual stream.
To support another model_type, add a row to FAMILIES; tests/test_families.py runs over this same table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.selection import compile_regex

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """One architecture's layout.

    blocks: dotted path from the model to its ModuleList of decoder blocks.
    residuals: projection that writes into the residual stream -> submodule of the block whose input is the stream
    before that addition. Both are names inside the block.
    """

    blocks: str
    residuals: Mapping[str, str] = field(default_factory=dict)


LLAMA = Family("model.layers", {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"})
OPT = Family("model.decoder.layers", {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"})
# opt-350m normalises after the addition: the stream enters attention and fc1 themselves.
OPT_POST_NORM = Family("model.decoder.layers", {"self_attn.out_proj": "self_attn", "fc2": "fc1"})

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,  # Llama 1 to 3, TinyLlama, SmolLM and SmolLM2
    "mistral": LLAMA,
    "opt": OPT,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}


def family_of(model: "PreTrainedModel") -> Family:
    """The row for a transformers model; SparseGPTError lists the known model types."""
    config = model.config
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type == "opt" and not config.do_layer_norm_before:
        return OPT_POST_NORM
    if model_type not in FAMILIES:
        raise SparseGPTError(
            f"model type {model_type!r} is not known: expected one of {', '.join(FAMILIES)}; "
            "to support it, add a row to FAMILIES in sparsegpt/blocks.py"
        )
    return FAMILIES[model_type]


def decoder_blocks(model: "PreTrainedModel", family: Family) -> nn.ModuleList:
    """The model's list of decoder blocks."""
    try:
        blocks = model.get_submodule(family.blocks)
    except AttributeError as error:
        raise SparseGPTError(
            f"expected decoder blocks at {family.blocks!r} in {type(model).__name__}, found no such module; "
            "load the model with its language-model head (AutoModelForCausalLM)"
        ) from error
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def prunable_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of a block by its name inside the block."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def name_filter(only: str | None = None, skip: str | None = None) -> Callable[[str], bool]:
    """Which full module names to prune: those where the regex `only` is found, without those where `skip` is."""
    wanted, unwanted = (
        compile_regex(text, flag) if text else None for flag, text in (("--only", only), ("--skip", skip))
    )
    return lambda name: not (wanted and not wanted.search(name)) and not (unwanted and unwanted.search(name))
