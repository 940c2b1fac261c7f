"""Weights that are no plain numbers: how they are packed, told before they are loaded, and how they become plain again.

A configuration says it, or the names and types of the tensors do.
"""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

# What configurations keep it under; "quantization" is MLX's.
_KEYS = ("quantization_config", "compression_config", "quantization")
OWN = "sparsegpt"
_CALLED = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "mxfp4": "MXFP4", "nvfp4": "NVFP4", "gguf": "GGUF", "hqq": "HQQ"}
# The class of transformers' that turns weights of a method into plain ones when it is given dequantize=True.
_PLAIN_BY = {
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
# Endings of tensors' names that a method alone writes.
_ENDINGS = {
    ".qweight": "gptq",
    ".qzeros": "gptq",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    "_proj_blocks": "mxfp4",
    ".weight_scale_inv": "fp8",
}
_EIGHT_BITS = ("F8", "F6", "F4", "float8", "float4")
_INTEGERS = ("I", "U", "int", "uint")


def method_of(config: Mapping[str, Any]) -> str | None:
    """How the weights of a configuration are quantised, by the name of the method; None where they are plain."""
    for said in _said(config):
        if any(said.get(key) for key in ("load_in_4bit", "load_in_8bit")):
            return "bitsandbytes"
        return str(said.get("quant_method") or said.get("quant_algo") or "an unknown method")
    return None


def method_by_tensors(types: Mapping[str, str]) -> str | None:
    """The same by the tensors of the files, {name: type as safetensors or torch calls it}."""
    for name in types:
        for ending, method in _ENDINGS.items():
            if name.endswith(ending):
                return method
    for name, kind in types.items():
        if kind.startswith(_EIGHT_BITS):
            return "fp8"
        if name.endswith(".weight") and kind.startswith(_INTEGERS):
            return "an unknown method"
    return None


def refusal(model: str, method: str) -> str:
    """Why such a model cannot be pruned, and what to do."""
    if method == OWN:
        return f"model {model} is packed: unpack it first with `python -m sparsegpt unpack {shlex.quote(model)} OUT`"
    called = _CALLED.get(method, method)
    way_out = "give the model as it was before"
    if method.startswith("bitsandbytes"):
        way_out += ", or load it by transformers, call model.dequantize() and save_pretrained"
    elif method in _PLAIN_BY:
        package = " (pip install compressed-tensors)" if method == "compressed-tensors" else ""
        way_out += (
            f", or load it by transformers with quantization_config={_PLAIN_BY[method]}(dequantize=True){package} and "
            "call save_pretrained"
        )
    return f"model {model} is quantised by {called}, and only plain weights can be pruned: {way_out}"


def _said(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a configuration, and those inside it, say of quantised weights."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in _KEYS:
            if isinstance(found := part.get(key), Mapping) and found:
                yield found
