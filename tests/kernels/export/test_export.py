"""Folders for other programs: bits by their definition, and models that plain transformers loads to the same scores."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsegpt.files.bits import pack_bits, unpack_bits
from sparsegpt.files.reported import reported_layers
from tests.architectures import CONFIGS
from tests.support import VOCABULARY, save_model

# Loads folders as somebody without this package does, and prints the perplexity of fixed windows for each.
LOADER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
tokens, found = torch.randint({vocabulary}, (8, 32)), []
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    found.append(float(loss.exp()))
assert not any(name.startswith("sparsegpt") for name in sys.modules)
print(json.dumps(found))
"""


def perplexities_of(folders, forked):
    return json.loads(forked.python("-c", LOADER.format(vocabulary=VOCABULARY), *folders))


@pytest.fixture
def quantised(tmp_path, run_cli, text_file):
    """A function that prunes a tiny model of some type to integers, and returns the new folder."""
    count = itertools.count()

    def make(model_type, sparsity="2:4", grid="int4:16", dtype=None, recipe=None, **overrides):
        place = tmp_path / f"run-{next(count)}"
        source = save_model(place / "model", model_type, **overrides)
        if dtype is not None:
            AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(source)
        calls = ["--model", source, "--sparsity", sparsity, "--quantize", grid, "--calib", text_file, "--eval", "none"]
        calls += ["--samples", "4", "--seqlen", "32", "--preset", "fast", "--out", place / "pruned", "--quiet"]
        if recipe is not None:
            (place / "recipe.toml").write_text(recipe)
            calls += ["--recipe", place / "recipe.toml"]
        result = run_cli("run", *calls)
        assert result.code == 0, result.err
        return place / "pruned"

    return make


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


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
MIXED = "[[rule]]\nmodules = 'down_proj$'\nquantize = \"int8:16\"\n[[rule]]\nmodules = 'q_proj$'\nskip = true\n"
CASES = {
    "llama": ("llama", "2:4", "int4:16", {}),
    "halves": ("llama", "0.5", "int3:row", {"dtype": torch.bfloat16}),
    "opt": ("opt", "0", "int8:32", {"dtype": torch.bfloat16}),
    "experts": ("qwen3_moe", "2:4", "int4:16", EXPERTS),
    "mixed": ("llama", "0", "int4:16", {"recipe": MIXED}),
}


def test_plain_transformers_scores_exports_as_the_run_does(quantised, run_cli, forked, tmp_path):
    pytest.importorskip("compressed_tensors")
    runs, exports = [], []
    for name, (model_type, sparsity, grid, options) in CASES.items():
        runs.append(quantised(model_type, sparsity, grid, **options))
        exports.append(tmp_path / f"{name}-export")
        result = run_cli("export", runs[-1], exports[-1])
        assert result.code == 0, result.err
    found = perplexities_of([*runs, *exports], forked)
    assert found[len(runs) :] == found[: len(runs)]
    settings = json.loads((exports[-1] / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["num_bits"] for group in settings["config_groups"].values()} == {4, 8}
    assert "model.layers.0.self_attn.q_proj" in settings["ignore"]
    run_cli("export", runs[-1], tmp_path / "gptq", "--format", "gptq").refused("one grid for all")


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


def test_weights_that_were_changed_since_are_refused(quantised, run_cli, tmp_path):
    folder = quantised("llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 0.001
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    run_cli("export", folder, tmp_path / "out").refused("model.layers.0.mlp.up_proj", "not on a grid int4:16")


def test_experts_in_one_tensor_are_refused(quantised, run_cli, tmp_path):
    folder = quantised("gpt_oss", **CONFIGS["gpt_oss"])
    for name in ("compressed-tensors", "gptq"):
        run_cli("export", folder, tmp_path / "out", "--format", name).refused("one of experts in one tensor", name)


def test_a_tied_head_stays_as_it_is(quantised, run_cli, tmp_path):
    """It is the embedding's weight, which no format keeps in integers."""
    folder = quantised("llama", tie_word_embeddings=True)
    assert run_cli("export", folder, tmp_path / "out").code == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in settings["ignore"]
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_transposed_weights_are_refused(quantised, run_cli, tmp_path):
    folder = quantised("gpt2", n_inner=64, intermediate_size=None, num_key_value_heads=None)
    run_cli("export", str(folder), str(tmp_path / "out")).refused("Conv1D", "linears alone")
