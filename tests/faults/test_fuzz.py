"""Sparsity strings and config.json files that nobody would write: always one line, or what was asked for."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sparsegpt.errors import SparseGPTError
from sparsegpt.sparsity import NM, Unstructured, parse_sparsity
from tests.faults.test_damage import check_pattern

LONG = pytest.mark.faults
NEAR = st.text("0123456789:.,%/-+ eExrownaif_\n\t", max_size=12)
NUMBERS = st.from_regex(r"-?[0-9]{0,30}(\.[0-9]{0,30})?(e-?[0-9]{1,4})?%?(/row|/layer)?", fullmatch=True)
RATIOS = st.from_regex(r"[+-]?[0-9]{1,20} ?: ?[+-]?[0-9]{1,20}", fullmatch=True)
SPARSITIES = st.one_of(NEAR, NUMBERS, RATIOS, st.text(max_size=20))


@settings(max_examples=300)
@given(SPARSITIES)
def test_any_sparsity_string_is_a_pattern_or_one_line(text):
    a_pattern_or_one_line(text)


@LONG
@settings(max_examples=5000, derandomize=False)
@given(SPARSITIES)
def test_many_sparsity_strings_are_patterns_or_one_line(text):
    a_pattern_or_one_line(text)


def a_pattern_or_one_line(text):
    try:
        pattern = parse_sparsity(text)
    except SparseGPTError as error:
        assert "\n" not in str(error)
        return
    if isinstance(pattern, NM):
        assert 0 < pattern.n < pattern.m
    else:
        assert isinstance(pattern, Unstructured)
        assert 0 <= pattern.fraction < 1
    assert parse_sparsity(str(pattern)) == pattern


# A process takes neither a zero byte nor half of a surrogate pair as an argument.
ARGUMENTS = SPARSITIES.filter(lambda text: "\0" not in text and text.isprintable())


def sparsity_through_the_command_line(job, folder, text):
    outcome = job.run(folder / "out", f"--sparsity={text}", sparsity=None, method="magnitude")
    if outcome.refused_or_done():
        shutil.rmtree(folder / "out")
    assert not list(folder.iterdir())


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(text=ARGUMENTS)
def test_a_few_sparsity_strings_through_the_command_line(tiny_job, tmp_path_factory, text):
    sparsity_through_the_command_line(tiny_job, tmp_path_factory.mktemp("fuzz"), text)


@LONG
@settings(max_examples=100, suppress_health_check=list(HealthCheck), derandomize=False)
@given(text=ARGUMENTS)
def test_sparsity_strings_through_the_command_line(tiny_job, tmp_path_factory, text):
    sparsity_through_the_command_line(tiny_job, tmp_path_factory.mktemp("fuzz"), text)


# Numbers of layers and of tokens are bounded: a model of a million layers is built, slowly, before it is refused.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=10),
    st.sampled_from(["llama", "opt", "gpt2", "float16", "bfloat16", "int8", "float8_e4m3fn", "gelu", "2:4", "eager"]),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "type", "quant_method", "x"]), st.integers(), max_size=2),
)
KEYS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"]
KEYS += ["intermediate_size", "model_type", "architectures", "dtype", "torch_dtype", "hidden_act", "rms_norm_eps"]
KEYS += ["rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "tie_word_embeddings"]
KEYS += ["attention_bias", "mlp_bias", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "layer_types"]
KEYS += ["quantization_config", "auto_map", "initializer_range", "attention_dropout", "pretraining_tp", "unknown"]
CHANGES = st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3)


def config_through_the_command_line(job, folder, changes):
    model, out = folder / "model", folder / "out"
    shutil.copytree(job.flags["model"], model)
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if job.run(out, model=model, method="wanda").refused_or_done():
        check_pattern(out)
        layers = json.loads((out / "report.json").read_text())["blocks"]
        assert len(layers) == 3, "blocks of the checkpoint were left out in silence"


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(changes=CHANGES)
@example(changes={"rope_scaling": {"rope_type": 0}})  # transformers ends in a KeyError
def test_a_few_strange_configs(tiny_job, tmp_path_factory, changes):
    config_through_the_command_line(tiny_job, tmp_path_factory.mktemp("fuzz"), changes)


@LONG
@settings(max_examples=200, suppress_health_check=list(HealthCheck), derandomize=False)
@given(changes=CHANGES)
def test_strange_configs(tiny_job, tmp_path_factory, changes):
    config_through_the_command_line(tiny_job, tmp_path_factory.mktemp("fuzz"), changes)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_config_with_fewer_blocks_than_the_checkpoint_is_refused(tiny_job, tmp_path, layers):
    model = shutil.copytree(tiny_job.flags["model"], tmp_path / "model")
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
    tiny_job.run(tmp_path / "out", model=model).refused(f"model.layers.{layers}.", "config")
