"""Where zeros differ: counted element by element in the files, packed or not."""

import json
import shutil

import pytest
import safetensors.torch

from sparsegpt.eval.report.differences import compare_folders
from sparsegpt.kernels.checkpoint.archive import pack_folder
from sparsegpt.run.job import run
from sparsegpt.run.options import RunOptions
from sparsegpt.settings.prune_settings import resolve_settings
from tests.eval.reports import folder
from tests.support import refused, save_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory, llama_folder, text_file):
    """The dense model, it pruned by two methods, and one of them packed."""
    place = tmp_path_factory.mktemp("compared")
    for method in ("magnitude", "wanda"):
        options = RunOptions(
            str(llama_folder), str(text_file), (str(text_file),), place / method, samples=4, sequence_length=16,
            eval_windows=2,
        )  # fmt: skip
        run(options, resolve_settings("2:4", "paper", method=method))
    pack_folder(place / "wanda", place / "packed")
    return {"dense": llama_folder, **{name: place / name for name in ("magnitude", "wanda", "packed")}}


def by_hand(one, other):
    """{weight: share of places where exactly one of both is zero}, one element at a time."""
    first, second = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (one, other))
    found = {}
    for name, weight in first.items():
        pairs = zip(weight.flatten().tolist(), second[name].flatten().tolist(), strict=True)
        if weight.ndim == 2:
            found[name.removesuffix(".weight")] = sum((a == 0) != (b == 0) for a, b in pairs) / weight.numel()
    return found


@pytest.mark.parametrize("second", ["wanda", "packed", "dense"])
def test_masks_differ_by_what_counting_says(folders, second):
    found = compare_folders({name: folders[name] for name in ("magnitude", second)})
    [difference] = found.differences
    expected = by_hand(folders["magnitude"], folders["wanda" if second == "packed" else second])
    assert {layer.name: layer.mask for layer in difference.layers} == pytest.approx(expected)
    assert any(expected.values())
    assert [layer.mask for layer in difference.changed] == sorted(filter(None, expected.values()), reverse=True)


def test_a_packed_model_is_equal_to_what_it_was_packed_from(folders):
    [difference] = compare_folders({name: folders[name] for name in ("wanda", "packed")}).differences
    assert all(layer.equal and layer.mask == 0 for layer in difference.layers)


def test_the_command_prints_scores_settings_and_layers(folders, run_cli):
    names = [folders[name] for name in ("magnitude", "wanda", "dense")]
    outcome = run_cli("compare", *names)
    assert outcome.code == 0, outcome.err
    for said in ("method", "magnitude", "wanda", "zeros differ in", "perplexity: dense -> pruned"):
        assert said in outcome.out
    found = json.loads(run_cli("compare", *names, "--json").out)
    report = json.loads((folders["wanda"] / "report.json").read_text())
    assert found["models"][1]["perplexity"] == report["perplexity"]
    assert found["models"][2]["perplexity"] is None
    assert found["settings"]["method"] == ["magnitude", "wanda"]
    assert len(found["differences"]) == 2


def test_scores_in_tasks_are_compared(tmp_path, run_cli):
    """Read from the reports alone: the folders hold no weights."""
    tasks = {"arc_easy": {"acc": {"dense": {"value": 0.5, "stderr": 0.0158}, "pruned": {"value": 0.25}}}}
    names = [folder(tmp_path / name, tasks=found) for name, found in (("a", tasks), ("b", {}))]
    shown = run_cli("compare", *names, "--no-masks").out
    assert "arc_easy acc" in shown
    assert "0.5000 ± 0.0158 -> 0.2500" in shown
    assert "– -> –" in shown
    found = json.loads(run_cli("compare", *names, "--no-masks", "--json").out)
    assert [model["tasks"] for model in found["models"]] == [tasks, {}]
    assert "tasks:" not in run_cli("compare", names[1], names[1], "--no-masks").out


def test_what_cannot_be_compared_is_refused(folders, run_cli, tmp_path):
    run_cli("compare", folders["wanda"]).refused("two or more")
    other = save_model(tmp_path / "gpt2", "opt")
    with refused("no weight in common"):
        compare_folders({"a": folders["wanda"], "b": other})


def test_a_damaged_report_is_said_and_the_weights_are_compared(folders, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(folders["wanda"], damaged)
    (damaged / "report.json").write_text("{")
    found = compare_folders({"a": folders["wanda"], "b": damaged})
    assert "damaged" in found.notes[0]
    assert all(layer.equal for layer in found.differences[0].layers)


def test_models_of_other_sizes_are_told_by_their_shapes(folders, tmp_path):
    wide = save_model(tmp_path / "wide", "llama", intermediate_size=96)
    [difference] = compare_folders({"a": folders["dense"], "b": wide}).differences
    unlike = {layer.name: layer.shapes for layer in difference.layers if layer.mask is None}
    assert unlike["model.layers.0.mlp.up_proj"] == ((64, 32), (96, 32))


def test_every_run_writes_its_page_and_samples(folders):
    """In the report and on the page."""
    report = json.loads((folders["wanda"] / "report.json").read_text())
    page = (folders["wanda"] / "report.html").read_text()
    assert len(report["samples"]) == 3
    assert all({"opening", "text", "dense", "pruned"} <= sample.keys() for sample in report["samples"])
    assert "What the models write" in page
    assert {"load", "eval", "prune", "save"} <= report["peak_bytes_by_phase"].keys()
    assert max(report["peak_bytes_by_phase"].values()) <= report["peak_private_memory_bytes"]
    assert not (folders["packed"] / "report.html").exists()  # its page can be made anew
