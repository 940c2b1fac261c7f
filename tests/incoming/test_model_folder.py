"""What an index or a damaged file of a stranger's model folder may not do."""

import json
import os
import shutil

import pytest

from sparsegpt.incoming.model_folder import check_folder
from tests.support import refused, tiny_model


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    check_folder(folder)
    return folder


@pytest.fixture
def folder(sharded, tmp_path):
    """A copy to break, with a file beside it that no index may reach."""
    copy = shutil.copytree(sharded, tmp_path / "model")
    shutil.copy(copy / "model-00001-of-00007.safetensors", tmp_path / "secret.safetensors")
    return copy


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


def renamed(place):
    def change(content):
        content["weight_map"][next(iter(content["weight_map"]))] = place
        return content

    return change


@pytest.mark.parametrize("place", ["../secret.safetensors", "sub/../../secret.safetensors", "..", "", "a\\b", "./x"])
def test_an_index_that_leads_out_of_the_folder_is_refused(folder, place):
    edit_index(folder, renamed(place))
    with refused("index.json", repr(place), "do not use"):
        check_folder(folder)


def test_an_absolute_path_in_an_index_is_refused(folder, tmp_path):
    place = str(tmp_path / "secret.safetensors")
    edit_index(folder, renamed(place))
    with refused("index.json", place, "do not use"):
        check_folder(folder)


def test_a_shard_that_is_not_there_is_named(folder):
    edit_index(folder, renamed("model-00009-of-00007.safetensors"))
    with refused("index.json", "model-00009-of-00007.safetensors", "not there"):
        check_folder(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: [content],
        lambda content: {},
        lambda content: None,
        lambda content: {"weight_map": list(content["weight_map"].items())},
        lambda content: {"weight_map": dict.fromkeys(content["weight_map"], 1)},
        lambda content: {"weight_map": dict.fromkeys(content["weight_map"])},
        lambda content: {"weight_map": "model.safetensors"},
    ],
)
def test_an_index_of_another_form_is_refused(folder, change):
    edit_index(folder, change)
    with refused("index.json", "weight_map"):
        check_folder(folder)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\0", '{"a": 1'])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_file_that_is_no_json_is_named(folder, name, text):
    (folder / name).write_text(text)
    with refused(name, "JSON"):
        check_folder(folder)


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_a_truncated_shard_is_named(folder, size):
    path = folder / "model-00002-of-00007.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with refused(path.name, "truncated or damaged"):
        check_folder(folder)


def test_a_shard_that_is_a_folder_is_named(folder):
    path = folder / "model-00002-of-00007.safetensors"
    path.unlink()
    path.mkdir()
    with refused(path.name):
        check_folder(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00007.safetensors"])
def test_a_file_that_may_not_be_read_is_named(folder, name):
    (folder / name).chmod(0)
    with refused(name):
        check_folder(folder)
