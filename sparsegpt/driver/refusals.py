"""Models whose weights are not what they seem, refused before anything changes, each with what resolves it.

What is reported of a linear must hold in the model afterwards. It cannot where a weight is computed anew in every pass
(parametrisations, masks of torch.nn.utils.prune), where a wrapper adds something to what the linear gives (adapters),
where the numbers are not in memory (offloading), or where they are no plain numbers (quantised weights).
"""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsegpt.errors import SparseGPTError
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.experts import is_conv1d

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# torch's older utilities compute a weight anew in a hook; by the hook's module, the call that ends it.
_HOOKS = {
    "torch.nn.utils.prune": 'torch.nn.utils.prune.remove(module, "{}")',
    "torch.nn.utils.weight_norm": 'torch.nn.utils.remove_weight_norm(module, "{}")',
    "torch.nn.utils.spectral_norm": 'torch.nn.utils.remove_spectral_norm(module, "{}")',
}


def check_weights(decoder: DecoderModel) -> None:
    """Refuse a model of which some weight is no plain parameter in memory; SparseGPTError names the module."""
    if getattr(decoder.model.config, "quantization_config", None) is not None:
        raise SparseGPTError("the model is packed or quantised: expected plain weights; `sparsegpt unpack` it first")
    for path, module in _modules_in_blocks(decoder):
        _check_not_computed(path, module)
    for name, parameter in decoder.model.named_parameters():
        _check_in_memory(name, parameter)
    for path, module in _modules_in_blocks(decoder):
        for name, parameter in module.named_parameters(recurse=False):
            _check_plain(f"{path}.{name}", parameter)


def added_linears(decoder: DecoderModel) -> set[str]:
    """Full names of linears in the blocks that the model's class does not make: of adapters, say.

    Empty where the class cannot be asked, and for a block that lacks something of its class's: it was built anew, and
    its linears are its own. Raises SparseGPTError for one that is wrapped: what the wrapper adds would stay, and may be
    as large as what pruning takes away.
    """
    pristine = _pristine_blocks(decoder)
    if pristine is None:
        return set()
    found: set[str] = set()
    for (prefix, block), original in zip(decoder.by_prefix(), pristine, strict=False):
        expected, here = _linears(original), _linears(block)
        modules = dict(block.named_modules())
        for name in sorted(expected.keys() & modules.keys() - here.keys()):
            _check_replaced(prefix + name, modules[name], name, expected[name], here)
        if expected.keys() <= here.keys():
            found |= {prefix + name for name in here.keys() - expected.keys()}
    return found


def _modules_in_blocks(decoder: DecoderModel) -> Iterator[tuple[str, nn.Module]]:
    for prefix, block in decoder.by_prefix():
        for path, module in block.named_modules():
            yield (prefix + path).rstrip("."), module


def _check_not_computed(path: str, module: nn.Module) -> None:
    """Refuse a module whose weight is no parameter of its own."""
    if parametrize.is_parametrized(module):
        names = list(module.parametrizations)  # type: ignore[arg-type]
        kinds = ", ".join(type(step).__name__ for step in module.parametrizations[names[0]])  # type: ignore[index]
        raise SparseGPTError(
            f"{path}.{names[0]} is computed anew in every pass ({kinds}): call "
            f'torch.nn.utils.parametrize.remove_parametrizations(module, "{names[0]}") before pruning'
        )
    for hook in module._forward_pre_hooks.values():
        call = _HOOKS.get(type(hook).__module__)
        name = getattr(hook, "_tensor_name", getattr(hook, "name", "weight"))
        if call:
            raise SparseGPTError(
                f"{path}.{name} is computed anew in every pass ({type(hook).__name__}): call {call.format(name)} "
                "before pruning"
            )
    if isinstance(module, nn.Linear) and not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise SparseGPTError(
            f"{path}.weight is no parameter of {type(module).__name__}, which computes it from something else: make it "
            "a torch.nn.Parameter before pruning"
        )


def _check_in_memory(name: str, parameter: Tensor) -> None:
    if parameter.device.type == "meta":
        raise SparseGPTError(
            f"{name} is not in memory (a meta tensor, as offloading leaves it): load the model without a device_map or "
            "offloading; `python -m sparsegpt run` reads models larger than memory from their files itself"
        )
    if hasattr(parameter, "ds_id"):
        raise SparseGPTError(f"{name} is partitioned by DeepSpeed: gather its parameters before pruning")


def _check_plain(name: str, parameter: nn.Parameter) -> None:
    kinds = {type(parameter), type(parameter.data)} - {nn.Parameter, Tensor}
    if kinds:
        raise SparseGPTError(
            f"{name} is a {kinds.pop().__name__}: expected plain numbers in a torch.nn.Parameter; load the model "
            "without quantisation and sharding, or dequantise it first"
        )
    if parameter.ndim > 1 and parameter.dtype not in PLAIN_DTYPES:
        raise SparseGPTError(
            f"{name} holds {str(parameter.dtype).removeprefix('torch.')}: expected float32, bfloat16, float16 or "
            "float64; load the model without quantisation, or dequantise it first"
        )


def _check_replaced(
    name: str, module: nn.Module, path: str, shape: tuple[int, int], here: dict[str, tuple[int, int]]
) -> None:
    """Refuse what stands for a linear: it keeps the weight in another form, or holds the linear and weights beside it.

    path: the linear's in its block; shape: what its class gives it; here: the linears that the block has.
    """
    if not list(module.parameters()) and module.state_dict():
        raise SparseGPTError(
            f"{name} is a {type(module).__name__}, which keeps its weight in another form: load the model without "
            "quantisation, or dequantise it first"
        )
    inside = [inner for inner, found in here.items() if inner.startswith(f"{path}.") and found == shape]
    if not inside:
        return  # taken out, or replaced by something else
    base = module.get_submodule(min(inside).removeprefix(f"{path}."))
    own = {id(parameter) for parameter in base.parameters()}
    if any(id(parameter) not in own for parameter in module.parameters()):
        raise SparseGPTError(
            f"{name} is wrapped by {type(module).__name__}, which adds weights of its own to it: merge them first, as "
            "with `model = model.merge_and_unload()` of peft, or take them out"
        )


def _pristine_blocks(decoder: DecoderModel) -> nn.ModuleList | None:
    """The blocks that the model's class makes of its configuration, without weights; None where it makes none."""
    model = decoder.model
    try:
        with torch.device("meta"):
            fresh: PreTrainedModel = type(model)(copy.deepcopy(model.config))
        blocks = fresh.get_submodule(decoder.family.blocks)
    except Exception:  # a class of somebody's own may want anything
        return None
    return blocks if isinstance(blocks, nn.ModuleList) else None


def _linears(block: nn.Module) -> dict[str, tuple[int, int]]:
    """Weight shape, the smaller side first, of every linear by its name in the block, routers and Conv1D included."""
    return {
        name: (min(module.weight.shape), max(module.weight.shape))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    }
