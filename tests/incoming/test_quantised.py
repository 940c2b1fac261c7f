"""Quantised and packed weights are told by the configuration, or by names and types in the headers."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from sparsegpt.incoming.quantised import method_by_tensors, method_of, refusal
from sparsegpt.model.loading import load_config, load_model
from tests.support import refused, tiny_model


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {}}, None),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"bits": 3}}, "an unknown method"),
        ({"quantization_config": {"quant_method": ["x"]}}, "['x']"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "an unknown method"),
    ],
)
def test_a_configuration_says_it(config, method):
    assert method_of(config) == method


@pytest.mark.parametrize(
    ("types", "method"),
    [
        ({"a.weight": "BF16", "a.bias": "F32", "position_ids": "I64", "mask": "U8"}, None),
        ({"a.weight": "torch.float16"}, None),
        ({"a.qweight": "I32", "a.scales": "F16"}, "gptq"),
        ({"a.weight": "U8", "a.weight.absmax": "F32"}, "bitsandbytes"),
        ({"a.weight": "F8_E4M3"}, "fp8"),
        ({"a.weight": "float8_e5m2"}, "fp8"),
        ({"a.weight": "F8_E8M0"}, "fp8"),
        ({"a.weight": "I8"}, "an unknown method"),
        ({"experts.gate_up_proj_blocks": "U8", "experts.gate_up_proj_scales": "U8"}, "mxfp4"),
        ({"a.weight_packed": "I32"}, "compressed-tensors"),
    ],
)
def test_tensors_say_it(types, method):
    assert method_by_tensors(types) == method


def test_the_way_out_fits_the_method():
    assert "unpack 'my model' OUT" in refusal("my model", "sparsegpt")
    assert "Mxfp4Config(dequantize=True)" in refusal("m", "mxfp4")
    assert "model.dequantize()" in refusal("m", "bitsandbytes")
    assert "as it was before" in refusal("m", "gptq")


@pytest.fixture
def folder(llama_folder, tmp_path):
    return shutil.copytree(llama_folder, tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "torchao", "nonsense"])
def test_it_is_refused_before_weights_are_looked_at(folder, method):
    edit_config(folder, quantization_config={"quant_method": method})
    for look in (load_config, load_model):
        with refused(str(folder), "quantised", "plain"):
            look(str(folder), to_prune=True)


def test_it_is_refused_by_its_tensors(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    safetensors.torch.save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path, {"format": "pt"})
    with refused("FP8"):
        load_config(str(folder), to_prune=True)


def test_pickled_ones_are_refused_by_their_tensors(folder):
    (folder / "model.safetensors").unlink()
    state = tiny_model("llama").state_dict()
    torch.save(
        {**state, "model.layers.0.mlp.up_proj.qweight": torch.zeros(2, dtype=torch.int32)}, folder / "pytorch_model.bin"
    )
    with refused("GPTQ"):
        load_config(str(folder), to_prune=True)


def test_plain_ones_load(folder):
    assert load_config(str(folder), to_prune=True).model_type == "llama"
    assert load_model(str(folder), to_prune=True).model.config.model_type == "llama"
