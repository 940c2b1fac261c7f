"""Integers of other programs become the plain numbers that they stand for, by the formats' definitions."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsegpt.files.bits import pack_bits
from sparsegpt.incoming.dequantise import can_read
from sparsegpt.model.loading import load_config, load_model
from tests.support import refused, save_model

ROWS, COLUMNS, GROUP = 32, 64, 16
LINEAR = "model.layers.0.mlp.down_proj"


def some_integers(bits, seed=0):
    """Numbers [N, K], zero points and scales [N, G] and what they stand for, in float64."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(2**bits, (ROWS, COLUMNS), generator=generator)
    zeros = torch.randint(1, 2**bits, (ROWS, COLUMNS // GROUP), generator=generator)
    scales = torch.rand(ROWS, COLUMNS // GROUP, generator=generator).half()
    return numbers, zeros, scales


def decoded(numbers, zeros, scales, group_of):
    return (numbers - zeros[:, group_of]).double() * scales.double()[:, group_of]


def in_order():
    return torch.arange(COLUMNS) // GROUP


def shuffled():
    return in_order()[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3))]


def compressed(bits, *, zeros, group_of):
    numbers, points, scales = some_integers(bits)
    points = points if zeros else torch.full_like(points, 2 ** (bits - 1))
    parts = {
        "weight_packed": pack_bits(numbers, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    if zeros:
        parts["weight_zero_point"] = pack_bits(points.T, bits).T.contiguous()
    if group_of is not in_order:
        parts["weight_g_idx"] = group_of().int()
    scheme = {"num_bits": bits, "type": "int", "symmetric": not zeros, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return parts, settings, decoded(numbers, points, scales, group_of())


def gptq(bits, *, version, group_of=in_order):
    numbers, points, scales = some_integers(bits)
    stored = points - 1 if version == "gptq" else points
    parts = {
        "qweight": pack_bits(numbers, bits).T.contiguous(),
        "qzeros": pack_bits(stored.T, bits),
        "scales": scales.T.contiguous(),
        "g_idx": group_of().int(),
    }
    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version}
    return parts, settings, decoded(numbers, points, scales, group_of())


@pytest.fixture
def quantised(tmp_path):
    """A function that gives a tiny model's folder in which one linear is these parts."""

    def make(parts, settings):
        folder = save_model(tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        assert tensors.pop(f"{LINEAR}.weight").shape == (ROWS, COLUMNS)
        tensors |= {f"{LINEAR}.{name}": tensor for name, tensor in parts.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize(
    "content",
    [
        compressed(4, zeros=False, group_of=in_order),
        compressed(3, zeros=True, group_of=in_order),
        compressed(8, zeros=True, group_of=shuffled),
        gptq(4, version="gptq"),
        gptq(3, version="gptq_v2", group_of=shuffled),
        gptq(8, version="gptq"),
    ],
    ids=["compressed-4", "compressed-3-zeros", "compressed-8-order", "gptq-4", "gptq-3-v2-order", "gptq-8"],
)
def test_weights_are_what_the_integers_stand_for(quantised, content):
    parts, settings, expected = content
    folder = quantised(parts, settings)
    plain = load_file(folder / "model.safetensors")
    loaded = load_model(str(folder), to_prune=True)
    weight = loaded.model.get_submodule(LINEAR).weight
    assert torch.equal(weight.double(), expected)
    other = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(loaded.model.get_parameter(other), plain[other])
    assert "1 linears were integers" in loaded.notes[0]
    assert "quantization_config" not in loaded.source.config and loaded.source.name == "model"


def test_a_run_prunes_an_export_as_it_prunes_the_model(run_cli, tmp_path, text_file):
    """The integers of an export stand for the run's very weights, in both formats."""
    calls = ["--calib", text_file, "--eval", "none", "--samples", 2, "--seqlen", 16, "--preset", "paper", "--quiet"]
    first = tmp_path / "first"
    model = save_model(tmp_path / "model")
    result = run_cli("run", "--model", model, "--sparsity", "0", "--quantize", "int4:16", "--out", first, *calls)
    assert result.code == 0, result.err
    folders = {"plain": first}
    for form in ("compressed-tensors", "gptq"):
        folders[form] = tmp_path / form
        assert run_cli("export", first, folders[form], "--format", form).code == 0
    found = {}
    for form, folder in folders.items():
        result = run_cli("run", "--model", folder, "--sparsity", "2:4", "--out", tmp_path / f"{form}-pruned", *calls)
        assert result.code == 0, result.err
        found[form] = load_file(tmp_path / f"{form}-pruned" / "model.safetensors")
        report = json.loads((tmp_path / f"{form}-pruned" / "report.json").read_text())
        assert any("were integers" in warning for warning in report["warnings"]) == (form != "plain")
        assert not list(tmp_path.glob(".*unfinished"))
    for form in ("compressed-tensors", "gptq"):
        assert found[form].keys() == found["plain"].keys()
        for name, tensor in found["plain"].items():
            assert torch.equal(found[form][name], tensor), (form, name)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("weight_scale", None, "no weight_scale"),
        ("weight_packed", lambda tensor: tensor[:, :-1], "of [4] bits"),
        ("weight_scale", lambda tensor: tensor[:-1], "scales [31, 4]"),
        ("weight_shape", lambda tensor: tensor + 1, "33 x 65"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_the_linears_name(quantised, part, change, said):
    parts, settings, _ = compressed(4, zeros=False, group_of=in_order)
    wrong = None if change is None else change(parts[part]).contiguous()
    folder = quantised(
        {name: tensor for name, tensor in {**parts, part: wrong}.items() if tensor is not None}, settings
    )
    with refused(f"{LINEAR} are no integers as compressed-tensors writes them", said):
        load_model(str(folder), to_prune=True)


@pytest.mark.parametrize(
    "change",
    [{"format": "float-quantized"}, {"config_groups": {}}, {"sparsity_config": {"format": "dense"}}],
)
def test_other_formats_are_refused_with_what_to_install(quantised, change):
    parts, settings, _ = compressed(4, zeros=False, group_of=in_order)
    folder = quantised(parts, settings | change)
    with refused("quantised by compressed-tensors", "pip install compressed-tensors"):
        load_config(str(folder), to_prune=True)
    assert not can_read({"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}})
    shutil.rmtree(folder)


def test_a_configuration_that_speaks_of_integers_where_there_are_none_is_refused(quantised):
    _, settings, weight = gptq(4, version="gptq")
    folder = quantised({"weight": weight.float()}, settings)
    with refused("quantised by GPTQ", "no tensor is called *.qweight", "quantization_config"):
        load_model(str(folder), to_prune=True)
