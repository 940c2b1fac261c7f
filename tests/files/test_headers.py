"""Headers of safetensors files: one line for whatever is wrong; what passes, the format's own library opens."""

import json
import os
import random

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.headers import CODES, meta_tensor, read_header
from sparsegpt.files.tensor_files import OpenTensors
from tests.support import refused

TENSORS = {
    "weight": torch.randn(3, 4),
    "scalar": torch.tensor(2.0, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 7),
    "bits": torch.arange(6, dtype=torch.uint8).view(2, 3),
}


@pytest.fixture
def path(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def edit(path, change):
    """Change the header in place, the data untouched."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def entry(**changes):
    return lambda header: header["weight"].update(changes)


def test_a_sound_file_is_what_was_saved(path):
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {name: tuple(found["shape"]) for name, found in header.entries.items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }
    for name, found in header.entries.items():
        assert meta_tensor(found).dtype == TENSORS[name].dtype


@pytest.mark.parametrize("dtype", CODES)
def test_sizes_of_all_types_are_known(tmp_path, dtype):
    file = tmp_path / "one.safetensors"
    safetensors.torch.save_file({"one": torch.zeros(3, dtype=dtype)}, file)
    assert read_header(file).entries["one"]["dtype"] == CODES[dtype]


LYING = {
    "another size": entry(shape=[3, 5]),
    "a negative size": entry(shape=[-3, -4]),
    "a fraction": entry(shape=[3.0, 4]),
    "a truth": entry(shape=[True, 12]),
    "a text for a shape": entry(shape="34"),
    "no shape": entry(shape=None),
    "an absurd size": entry(shape=[2**70, 0]),
    "absurd together": entry(shape=[0, 2**40, 2**40]),
    "many dimensions": entry(shape=[1] * 100 + [12]),
    "an unknown type": entry(dtype="Q4"),
    "a number for a type": entry(dtype=32),
    "a type of another size": entry(dtype="F64"),
    "offsets past the end": entry(data_offsets=[0, 2**40]),
    "one offset": entry(data_offsets=[0]),
    "offsets backwards": entry(data_offsets=[48, 0]),
    "offsets of text": entry(data_offsets=["0", "48"]),
    "offsets twice": lambda header: header["bits"].update(data_offsets=header["weight"]["data_offsets"]),
    "one more key": entry(stride=[4, 1]),
    "an entry that is a list": lambda header: header.update(weight=[1]),
    "nothing": lambda header: [],
    "a text": lambda header: "weight",
    "one tensor less": lambda header: header.pop("bits") and None,
    "a line break in a name": lambda header: header.update({"two\nlines": header.pop("weight")}),
    "half a letter in a name": lambda header: header.update({"\ud800": header.pop("weight")}),
    "a long name": lambda header: header.update({"n" * 10**5: header.pop("weight")}),
    "metadata of numbers": lambda header: header.update(__metadata__={"format": 5}),
    "metadata of a list": lambda header: header.update(__metadata__=[]),
}


@pytest.mark.parametrize("how", LYING)
def test_a_header_that_lies_is_one_line_with_the_file(path, how):
    edit(path, LYING[how])
    with refused(str(path), "truncated or damaged"):
        read_header(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, "\xff\xfe", '{"a": 1, "a": 2}', "{}{}", "9" * 5000])
def test_a_header_that_is_no_json_is_one_line_with_the_file(path, text):
    raw = text.encode("latin-1")
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with refused(str(path), "truncated or damaged"):
        read_header(path)


def test_a_name_that_stands_twice_is_refused(path):
    one = '"w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}'
    text = f"{{{one}, {one}}}".encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with refused(str(path), "stands twice"):
        read_header(path)


def test_what_is_no_file_is_one_line(tmp_path):
    with refused("nowhere.safetensors", "cannot be read"):
        read_header(tmp_path / "nowhere.safetensors")
    with refused(str(tmp_path), "no regular file"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for ever
    with refused("pipe.safetensors", "no regular file"):
        read_header(tmp_path / "pipe.safetensors")


def test_a_tensor_that_is_not_there_is_one_line(path):
    with OpenTensors({"weight": path, "ghost": path}) as tensors:
        assert torch.equal(tensors["weight"], TENSORS["weight"])
        assert torch.equal(tensors.row("weight", 1), TENSORS["weight"][1])
        with refused(str(path), "ghost"):
            tensors["ghost"]
        with refused(str(path), "ghost"):
            tensors.shapes()


def test_whatever_passes_is_opened_by_the_formats_library(path):
    """Single bits flipped in the header: refused here, or readable there, with the shapes that were read here."""
    chance, content = random.Random(0), path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    passed = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[chance.randrange(length)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            entries = read_header(path).entries
        except SparseGPTError as error:
            assert "\n" not in str(error)
            continue
        passed += 1
        try:
            with safe_open(path, framework="pt") as file:
                assert {name: file.get_slice(name).get_shape() for name in entries} == {
                    name: found["shape"] for name, found in entries.items()
                }
        except SafetensorError as error:
            raise AssertionError(bytes(damaged[:length])) from error
    assert 0 < passed < 200
