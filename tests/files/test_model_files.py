"""A folder from strangers: what its index names and where its links lead is inside of it, refused, or left behind."""

import json
import os
import shutil

import pytest
import safetensors.torch
import torch

from sparsegpt.files.beside import Beside
from sparsegpt.files.checked_json import read_json, read_object
from sparsegpt.files.inside import check_inside, homes
from sparsegpt.files.model_files import indexed_names, read_config, read_index, weight_files
from sparsegpt.files.reported import reported_layers
from tests.support import refused

TENSORS = {"a": torch.ones(2, 2), "b": torch.zeros(3)}


@pytest.fixture
def folder(tmp_path):
    """A folder with one file of weights, and beside it what nothing in it may reach."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    safetensors.torch.save_file(TENSORS, path / "model.safetensors")
    shutil.copytree(path, tmp_path / "outside")
    (tmp_path / "outside" / "secret.txt").write_text("PRIVATE")
    return path


def sharded(folder, **files):
    """Its index, with a file for each tensor."""
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    named = dict.fromkeys(TENSORS, "shard.safetensors") | files
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    return folder / "model.safetensors.index.json"


def test_one_file_or_an_index_say_where_each_tensor_is(folder):
    assert weight_files(folder) == dict.fromkeys(TENSORS, folder / "model.safetensors")
    index = sharded(folder)
    assert weight_files(folder) == read_index(index) == dict.fromkeys(TENSORS, folder / "shard.safetensors")


@pytest.mark.parametrize(
    "name", ["../outside/model.safetensors", "/etc/passwd", "..", "", ".", "a/b", "a\\b", "two\nlines", "nul\0"]
)
def test_an_index_that_names_anything_but_a_file_beside_it_is_refused(folder, name):
    index = sharded(folder, a=name)
    for read in (weight_files, lambda _: read_index(index), lambda _: indexed_names(index)):
        with refused("index.json", "names", "expected a file beside it"):
            read(folder)


@pytest.mark.parametrize("named", [5, None, ["shard.safetensors"], {"a": "shard.safetensors"}, True, 1.5])
def test_an_index_of_other_types_is_refused(folder, named):
    index = sharded(folder, a=named)
    with refused(str(index), "no weight_map of tensor names to file names"):
        weight_files(folder)


@pytest.mark.parametrize("part", ["model.safetensors", "config.json"])
def test_a_file_that_is_a_link_out_of_the_folder_is_refused(folder, tmp_path, part):
    (folder / part).unlink()
    (folder / part).symlink_to(tmp_path / "outside" / part)
    with refused(str(folder / part), "leads out of"):
        weight_files(folder) if part.endswith("safetensors") else read_config(folder)


def test_a_shard_and_a_report_that_are_links_out_of_the_folder_are_refused(folder, tmp_path):
    index = sharded(folder)
    (folder / "shard.safetensors").unlink()
    (folder / "shard.safetensors").symlink_to("../outside/model.safetensors")
    with refused("shard.safetensors", "leads out of"):
        read_index(index)
    (tmp_path / "outside" / "report.json").write_text('{"layers": []}')
    (folder / "report.json").symlink_to(tmp_path / "outside" / "report.json")
    with refused("report.json", "leads out of"):
        reported_layers(folder)


def test_links_inside_the_folder_and_links_to_the_folder_are_followed(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors").symlink_to("other.safetensors")
    (tmp_path / "way").symlink_to(folder)
    for way in (folder, tmp_path / "way"):
        assert weight_files(way) == dict.fromkeys(TENSORS, way / "model.safetensors")
        assert read_config(way) == {"model_type": "llama"}


def test_links_in_a_circle_are_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    with refused("model.safetensors"):
        check_inside(folder, folder / "model.safetensors")


# The Hub's cache


@pytest.fixture
def snapshot(folder, tmp_path):
    """The same folder as the Hub's client keeps it: links into the blobs beside the snapshots."""
    entry = tmp_path / "hub" / "models--org--name"
    (entry / "blobs").mkdir(parents=True)
    path = entry / "snapshots" / "0123abc"
    path.mkdir(parents=True)
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("notes")
    (path / "sub").mkdir()
    for number, file in enumerate(file for file in sorted(folder.rglob("*")) if file.is_file()):
        shutil.copy(file, entry / "blobs" / str(number))
        link = path / file.relative_to(folder)
        link.symlink_to(os.path.relpath(entry / "blobs" / str(number), link.parent))
    return path


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(snapshot, tmp_path):
    assert weight_files(snapshot) == dict.fromkeys(TENSORS, snapshot / "model.safetensors")
    assert read_config(snapshot) == {"model_type": "llama"}
    beside = Beside.of(snapshot)
    assert (set(map(str, beside.files)), beside.outside) == ({"config.json", "sub/notes.txt"}, ())
    beside.copy_to(tmp_path / "copy")
    assert (tmp_path / "copy" / "sub" / "notes.txt").read_text() == "notes"


def test_a_snapshot_reaches_no_blobs_of_another_model(snapshot, tmp_path):
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(snapshot / "model.safetensors", other / "0")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "0")
    with refused("leads out of"):
        weight_files(snapshot)


def test_blobs_that_are_a_link_themselves_are_no_home(snapshot):
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(blobs.with_name("elsewhere"))
    blobs.symlink_to("elsewhere")
    assert homes(snapshot) == (snapshot,)
    with refused("leads out of"):
        read_config(snapshot)


# What comes along


def test_files_come_along_and_what_a_link_outside_names_does_not(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "again.json").symlink_to("tokenizer.json")
    (folder / "notes.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    (folder / "documents").symlink_to(tmp_path / "outside")
    (folder / "gone.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    beside = Beside.of(folder)
    assert set(map(str, beside.files)) == {"config.json", "tokenizer.json", "again.json"}
    assert set(map(str, beside.outside)) == {"notes.txt", "documents", "gone.txt", "pipe"}
    assert set(map(str, beside.weights)) == {"model.safetensors"}
    beside.copy_to(tmp_path / "copy", but=frozenset({"config.json"}))
    copied = {path.name: path.read_text() for path in (tmp_path / "copy").iterdir()}
    assert copied == {"tokenizer.json": "{}", "again.json": "{}"}
    assert not (tmp_path / "copy" / "again.json").is_symlink()


# JSON and reports


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, "\0", '{"a": 1', '"\\ud800"', '{"\\udfff": 1}', "9" * 5000])
def test_what_is_no_json_is_one_line_with_the_file(tmp_path, text):
    (tmp_path / "file.json").write_text(text)
    with refused(str(tmp_path / "file.json"), "damaged", "JSON"):
        read_json(tmp_path / "file.json")


def test_json_of_any_depth_that_passes_can_be_walked(tmp_path):
    path = tmp_path / "file.json"
    for levels, sound in ((99, True), (100, True), (101, False), (500, False)):
        path.write_text("[" * levels + "]" * levels)
        if sound:
            read_json(path)
        else:
            with refused(str(path), "more than 100 levels"):
                read_json(path)


@pytest.mark.parametrize("text", ["[]", "5", '"x"', "null", "true"])
def test_an_object_is_expected(tmp_path, text):
    (tmp_path / "file.json").write_text(text)
    with refused(str(tmp_path / "file.json"), "expected a JSON object"):
        read_object(tmp_path / "file.json")


def test_what_is_no_file_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")  # opening it would wait for ever
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(1 << 31)
    for name, said in (("pipe", "regular"), ("large", "2147483648 bytes"), ("none", "cannot be read (No such file")):
        with refused(f"{name}.json", said):
            read_json(tmp_path / f"{name}.json")
    with refused(str(tmp_path), "regular"):
        read_json(tmp_path)


ROW = {"name": "fc1", "sparsity": "2:4", "shape": [8, 64], "zeros": 0.5}


def test_a_report_is_read(tmp_path):
    assert reported_layers(tmp_path) is None
    (tmp_path / "report.json").write_text(json.dumps({"layers": [ROW, {"name": "fc2", "sparsity": "0.5"}]}))
    found = reported_layers(tmp_path)
    assert [(layer.name, layer.sparsity, layer.shape, layer.zeros) for layer in found.values()] == [
        ("fc1", "2:4", (8, 64), 0.5),
        ("fc2", "0.5", (0, 0), 0.0),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 5},
        {"name": None},
        {"name": "two\nlines"},
        {"sparsity": 0.5},
        {"sparsity": "diagonal"},
        {"shape": [8]},
        {"shape": [8, "64"]},
        {"shape": 8},
        {"shape": [8, float("inf")]},
        {"zeros": "half"},
        {"zeros": float("nan")},
        {"zeros": [0.5]},
    ],
)
def test_a_report_of_other_types_is_one_line_with_the_file(tmp_path, changes):
    (tmp_path / "report.json").write_text(json.dumps({"layers": [ROW | changes]}))
    with refused(str(tmp_path / "report.json"), "damaged"):
        reported_layers(tmp_path)
