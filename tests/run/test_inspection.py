"""inspect: every promised pattern is checked in the files themselves, and one broken group is found and named."""

import json

import pytest
import safetensors.torch
import torch

from sparsegpt import prune_model
from sparsegpt.kernels.checkpoint.archive import pack_folder
from sparsegpt.run.inspection import first_bad_group, inspect_folder
from sparsegpt.solvers.masks import layer_mask
from sparsegpt.sparsity import NM, parse_sparsity
from tests.architectures import save_pruned, tiny_variant
from tests.support import random_windows, refused


def sparse(sparsity, rows=8, columns=64, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return weight.masked_fill(~layer_mask(weight.abs(), parse_sparsity(sparsity)), 0)


def write(folder, tensors, promised=None, file="model.safetensors"):
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file({f"{name}.weight": tensor for name, tensor in tensors.items()}, folder / file)
    if promised is not None:
        layers = [{"name": name, "sparsity": sparsity} for name, sparsity in promised.items()]
        (folder / "report.json").write_text(json.dumps({"layers": layers}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_folder_that_keeps_its_promises_is_sound(tmp_path, dtype):
    promised = {"fc1": "2:4", "fc2": "4:8", "q": "0.5", "k": "16:32"}
    tensors = {name: sparse(sparsity).to(dtype) for name, sparsity in promised.items()}
    tensors |= {"embed": torch.randn(4, 4).to(dtype), "norm": torch.ones(4, dtype=dtype)}
    findings = {finding.name: finding for finding in inspect_folder(write(tmp_path / "m", tensors, promised))}
    assert set(findings) == {"fc1", "fc2", "q", "k", "embed"}
    assert all(finding.ok for finding in findings.values())
    assert {name: findings[name].pattern for name in promised} == promised
    assert findings["fc1"].zeros == 0.5
    assert findings["fc1"].shape == (8, 64)
    assert findings["embed"].pattern == "dense"


def test_one_broken_group_is_found_and_named(tmp_path):
    good, bad = sparse("2:4", seed=1), sparse("2:4", seed=2)
    bad[5, 40:44] = torch.tensor([0.0, 1.0, 1e-30, -1.0])
    folder = write(tmp_path / "m", {"good": good, "bad": bad}, {"good": "2:4", "bad": "2:4"})
    findings = {finding.name: finding for finding in inspect_folder(folder)}
    assert findings["good"].ok
    assert not findings["bad"].ok
    for fragment in ("row 5", "columns 40 to 43", "3 non-zeros", "2:4"):
        assert fragment in findings["bad"].problem


def test_too_few_zeros_of_a_fraction_are_found(tmp_path):
    weight = sparse("0.5")
    weight[weight == 0] = torch.cat([torch.ones(8), torch.zeros(248)])
    finding = inspect_folder(write(tmp_path / "m", {"fc1": weight}, {"fc1": "0.5"}))[0]
    assert not finding.ok
    assert "50.00%" in finding.problem


def test_a_fraction_of_each_row_is_checked_row_by_row(tmp_path):
    weight = sparse("0.5/row")
    assert inspect_folder(write(tmp_path / "m", {"fc1": weight}, {"fc1": "0.5/row"}))[0].ok
    weight[2], weight[3] = 0, 1  # the whole layer still has half zeros
    finding = inspect_folder(write(tmp_path / "m", {"fc1": weight}, {"fc1": "0.5/row"}))[0]
    assert not finding.ok
    assert "row 3" in finding.problem


def test_fewer_non_zeros_than_allowed_keep_a_promise(tmp_path):
    weight = sparse("1:4")
    weight[0] = 0
    weight[1, :4] = torch.tensor([-0.0, 0.0, 1.0, -0.0])
    assert inspect_folder(write(tmp_path / "m", {"fc1": weight}, {"fc1": "2:4"}))[0].ok


@pytest.mark.parametrize("sparsity", ["1:4", "2:4", "4:8", "8:16", "16:32", "3:4"])
def test_patterns_are_recognised_without_a_report(tmp_path, sparsity):
    assert inspect_folder(write(tmp_path / "m", {"fc1": sparse(sparsity)}))[0].pattern == sparsity


def test_unstructured_and_dense_are_recognised_without_a_report(tmp_path):
    folder = write(tmp_path / "m", {"a": sparse("0.5"), "b": torch.randn(8, 64), "c": sparse("0.3", columns=33)})
    assert [finding.pattern for finding in inspect_folder(folder)] == ["unstructured", "dense", "unstructured"]


def test_shards_are_read_one_after_another(tmp_path):
    write(tmp_path / "m", {"a": sparse("2:4")}, file="model-00001-of-00002.safetensors")
    promised = {"a": "2:4", "b": "2:4"}
    folder = write(tmp_path / "m", {"b": sparse("2:4")}, promised, "model-00002-of-00002.safetensors")
    assert [finding.name for finding in inspect_folder(folder)] == ["a", "b"]


def test_a_promised_layer_that_no_file_holds_is_refused(tmp_path):
    with refused("fc2", "report.json"):
        inspect_folder(write(tmp_path / "m", {"fc1": sparse("2:4")}, {"fc1": "2:4", "fc2": "2:4"}))


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("file")])
def test_a_path_without_model_files_is_refused(tmp_path, make):
    make(tmp_path / "m")
    with refused(str(tmp_path / "m"), "safetensors"):
        inspect_folder(tmp_path / "m")


def test_a_truncated_file_is_refused(tmp_path):
    folder = write(tmp_path / "m", {"fc1": sparse("2:4")})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with refused(str(path), "truncated or damaged"):
        inspect_folder(folder)


@pytest.mark.parametrize(
    "report",
    [b"{", b"[]", b"{}", b'{"layers": 3}', b'{"layers": [1]}', b'{"layers": [{"name": "fc1"}]}', b"\xff\xfe", b"null"],
)
def test_a_damaged_report_is_refused(tmp_path, report):
    folder = write(tmp_path / "m", {"fc1": sparse("2:4")})
    (folder / "report.json").write_bytes(report)
    with refused("report.json", "damaged"):
        inspect_folder(folder)


def test_a_report_with_an_unknown_pattern_is_refused(tmp_path):
    with refused("diagonal"):
        inspect_folder(write(tmp_path / "m", {"fc1": sparse("2:4")}, {"fc1": "diagonal"}))


def test_the_first_bad_group_is_the_first_of_the_first_row():
    weight = torch.zeros(3, 8)
    assert first_bad_group(weight, NM(2, 4)) is None
    weight[2, :3] = 1
    weight[1, 5:8] = 1
    assert "row 1, columns 4 to 7" in first_bad_group(weight, NM(2, 4))
    assert "do not divide" in first_bad_group(torch.zeros(2, 6), NM(2, 4))


def pruned_folder(folder, variant, sparsity):
    """A tiny model as `run` would leave it: its files, and the report of its layers."""
    model = tiny_variant(variant)
    report = prune_model(model, random_windows(), sparsity, preset="paper")
    model.save_pretrained(folder)
    (folder / "report.json").write_text(json.dumps(report.as_dict()))
    return folder, report


def test_gpt2s_transposed_weights_are_checked_along_their_inputs(tmp_path):
    folder, report = pruned_folder(tmp_path, "gpt2", "2:4")
    findings = {finding.name: finding for finding in inspect_folder(folder)}
    for layer in report.layers:
        assert findings[layer.name].ok
        assert findings[layer.name].shape == layer.shape
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][:4, 9] = 1.0
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    broken = [finding for finding in inspect_folder(folder) if not finding.ok]
    assert [(finding.name, finding.problem.split(":")[0]) for finding in broken] == [
        ("transformer.h.1.mlp.c_fc", "row 9, columns 0 to 3")
    ]


# Packed or not, and whatever the files call them: gate and up apart (OLMoE), w1 and w3 (Mixtral), all experts in one
# tensor, transposed (GPT-OSS, Llama 4), under a tower's other name (Gemma 3).
@pytest.mark.parametrize("variant", ["gpt2", "olmoe", "mixtral", "gpt_oss", "llama4_text", "gemma3", "llava"])
def test_every_pruned_layer_is_checked_under_the_name_that_the_report_gives_it(variant, tmp_path):
    _, matrices = save_pruned(tmp_path / "m", variant)
    pack_folder(tmp_path / "m", tmp_path / "packed")
    for folder, stored in (("m", "float32"), ("packed", "packed float32")):
        findings = {finding.name: finding for finding in inspect_folder(tmp_path / folder)}
        for name, matrix in matrices.items():
            found = findings[name]
            assert (found.ok, found.problem, found.pattern, found.stored) == (True, "", "2:4", stored)
            assert (found.shape, found.zeros) == (matrix.shape, 0.5)
    assert not any(finding.ok for finding in _broken_copies(tmp_path / "m", matrices))


def _broken_copies(folder, matrices):
    """What is found for each layer when every tensor of the folder is full of ones."""
    path = folder / "model.safetensors"
    tensors = {name: torch.ones_like(tensor) for name, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return [finding for finding in inspect_folder(folder) if finding.name in matrices]


def test_an_experts_fraction_counts_over_gate_and_up_together(tmp_path):
    """Zeros are counted over the layer that was pruned, though files keep its halves apart."""
    folder, report = pruned_folder(tmp_path, "olmoe", "0.5")
    findings = {finding.name: finding for finding in inspect_folder(folder)}
    assert all(findings[layer.name].ok and findings[layer.name].shape == layer.shape for layer in report.layers)


def test_experts_of_an_unknown_model_are_shown_as_not_checked(tmp_path):
    folder, report = pruned_folder(tmp_path, "olmoe", "2:4")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mystery"}))
    findings = {finding.name: finding for finding in inspect_folder(folder)}
    for layer in report.layers:
        assert findings[layer.name].ok
        assert findings[layer.name].pattern == "2:4"
        assert findings[layer.name].problem == ("not checked" if layer.name.endswith("gate_up_proj") else "")
