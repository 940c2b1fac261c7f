"""Folders for other programs: bits by their definition, and models that plain transformers loads to the same scores."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from sparsegpt.files.reported import reported_layers
from sparsegpt.kernels.export.bits import pack_bits, unpack_bits
from sparsegpt.quantization import recover
from tests.support import CHILD_ENVIRONMENT, VOCABULARY, save_model, write_text

# Loads a folder as somebody without this package does, and prints the perplexity of fixed windows.
LOADER = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
tokens = torch.randint({vocabulary}, (8, 32))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **eval(sys.argv[2]))
with torch.no_grad():
    logits = model.eval()(input_ids=tokens).logits.float()
loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
assert not any(name.startswith("sparsegpt") for name in sys.modules)
print(float(loss.exp()))
"""


def perplexity_of(folder, **options):
    code = LOADER.format(vocabulary=VOCABULARY)
    command = [sys.executable, "-c", code, str(folder), repr(options)]
    result = subprocess.run(command, capture_output=True, text=True, env=CHILD_ENVIRONMENT, check=False, cwd="/")
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


@pytest.fixture
def quantised(tmp_path, run_cli):
    """A function that prunes a tiny model of some type to integers, and returns its folder."""

    def make(model_type, sparsity="2:4", grid="int4:16", dtype=None, **overrides):
        source = save_model(tmp_path / "model", model_type, **overrides)
        if dtype is not None:
            cast(source, dtype)
        text = write_text(tmp_path / "text.txt")
        calls = ["--model", source, "--sparsity", sparsity, "--quantize", grid, "--calib", text, "--eval", "none"]
        options = ["--samples", "4", "--seqlen", "32", "--preset", "fast", "--out", tmp_path / "pruned"]
        result = run_cli("run", *map(str, [*calls, *options]))
        assert result.code == 0, result.err
        return tmp_path / "pruned"

    return make


def cast(folder, dtype):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_numbers_are_one_string_of_bits_a_row(bits):
    numbers = torch.randint(2**bits, (5, 45), generator=torch.Generator().manual_seed(bits))
    words = pack_bits(numbers, bits)
    for row, packed in zip(numbers.tolist(), words.tolist(), strict=True):
        string = sum(number << (bits * place) for place, number in enumerate(row))
        assert [word % 2**32 for word in packed] == [
            string >> (32 * place) & 0xFFFFFFFF for place in range(len(packed))
        ]
    assert torch.equal(unpack_bits(words, bits, 45), numbers.int())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_bits_are_those_of_the_package(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    steps = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 40), dtype=torch.int8)
    assert torch.equal(pack_bits(steps.int() + 2 ** (bits - 1), bits), helpers.pack_to_int32(steps, bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "grid"), [("llama", "int4:16"), ("llama", "int3:row"), ("opt", "int8:32")])
def test_plain_transformers_scores_the_export_as_the_run_does(quantised, run_cli, tmp_path, model_type, grid, dtype):
    pytest.importorskip("compressed_tensors")
    folder = quantised(model_type, grid=grid, dtype=dtype)
    result = run_cli("export", str(folder), str(tmp_path / "out"))
    assert "exported" in result.out, result.err
    assert perplexity_of(tmp_path / "out") == perplexity_of(folder)


def test_mixed_grids_and_layers_without_one(quantised, run_cli, tmp_path):
    pytest.importorskip("compressed_tensors")
    source, text = save_model(tmp_path / "mixed"), write_text(tmp_path / "text.txt")
    recipe = tmp_path / "mix.toml"
    recipe.write_text(
        "[[rule]]\nmodules = 'down_proj$'\nquantize = \"int8:16\"\n[[rule]]\nmodules = 'q_proj$'\nskip = true\n"
    )
    calls = ["--model", source, "--sparsity", "0", "--quantize", "int4:16", "--calib", text, "--eval", "none"]
    more = ["--samples", "4", "--seqlen", "32", "--recipe", recipe, "--preset", "fast", "--out", tmp_path / "pruned"]
    assert run_cli("run", *map(str, [*calls, *more])).code == 0
    assert run_cli("export", str(tmp_path / "pruned"), str(tmp_path / "out")).code == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["num_bits"] for group in settings["config_groups"].values()} == {4, 8}
    assert "model.layers.0.self_attn.q_proj" in settings["ignore"]
    assert perplexity_of(tmp_path / "out") == perplexity_of(tmp_path / "pruned")
    run_cli("export", str(tmp_path / "pruned"), str(tmp_path / "gptq"), "--format", "gptq").refused("one grid for all")


def test_experts_are_dequantised_by_plain_transformers(quantised, run_cli, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder = quantised("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=8)
    assert run_cli("export", str(folder), str(tmp_path / "out")).code == 0
    assert perplexity_of(tmp_path / "out") == pytest.approx(perplexity_of(folder), rel=1e-4)


def test_gptq_tensors_decode_to_the_runs_weights(quantised, run_cli, tmp_path):
    folder = quantised("llama", grid="int4:16", dtype=torch.bfloat16)
    assert run_cli("export", str(folder), str(tmp_path / "out"), "--format", "gptq").code == 0
    ours, theirs = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["group_size"], settings["sym"]) == (4, 16, True)
    for name in reported_layers(folder):
        words, zeros, scales, group_of = (theirs[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
        columns, rows = len(group_of), words.shape[1]
        integers = unpack_bits(words.T.contiguous(), 4, columns)
        offsets = unpack_bits(zeros, 4, rows).T + 1
        group = group_of.long()
        decoded = (integers - offsets[:, group]).float() * scales.T[:, group].float()
        assert torch.equal(decoded.bfloat16(), ours[f"{name}.weight"])


def test_what_does_not_fit_is_refused_in_one_line(quantised, run_cli, tmp_path):
    out = str(tmp_path / "out")
    run_cli("export", str(save_model(tmp_path / "plain")), out).refused("no weights on a grid", "run with quantize")
    folder = quantised("llama", grid="int4:24", sparsity="0")
    run_cli("export", str(folder), out).refused("do not divide into groups of 24", "quantise with int4:16")
    run_cli("export", str(folder), out, "--format", "ggu").refused("format 'ggu' is not known")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.01
    layer = recover  # the very check that the export makes
    with pytest.raises(Exception, match="not on a grid"):
        layer(weights["model.layers.0.mlp.up_proj.weight"], reported_layers(folder)["model.layers.0.mlp.up_proj"].grid)


def test_transposed_weights_are_refused(quantised, run_cli, tmp_path):
    folder = quantised("gpt2", n_inner=64, intermediate_size=None, num_key_value_heads=None)
    run_cli("export", str(folder), str(tmp_path / "out")).refused("Conv1D", "linears alone")
