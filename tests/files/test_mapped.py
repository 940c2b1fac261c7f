"""Tensors whose bytes are pages of files: a streamed model has the values of a loaded one and no private memory."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsegpt.files.mapped import SMALL, chunks, is_mapped, mapped_empty, mapped_parameters, to_mapped
from sparsegpt.model.loading import load_model
from tests.support import refused, save_tokenizer, tiny_model

# Embeddings of this many rows, 32 wide, are large enough to be worth a file in every dtype.
ROWS = 2**15


def private_kilobytes(address: int) -> int:
    """Memory of its own that the process holds in the mapping at this address."""
    text = Path("/proc/self/smaps").read_text()
    for span, entry in re.findall(r"^([0-9a-f]+-[0-9a-f]+) (.*?)(?=^[0-9a-f]+-|\Z)", text, re.M | re.S):
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return int(re.search(r"^Anonymous:\s+(\d+) kB", entry, re.M).group(1))
    raise AssertionError("no mapping")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_mapped_and_private_tensors_are_told_apart(tmp_path):
    assert not is_mapped(torch.zeros(SMALL))
    assert is_mapped(to_mapped(torch.zeros(SMALL), tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (1, 2, 3)])
def test_a_tensor_in_a_file_holds_its_values_and_leaves_no_file(tmp_path, dtype, shape):
    tensor = torch.randn(shape).mul(10).to(dtype)
    files = open_files()
    mapped = to_mapped(tensor, tmp_path)
    assert (mapped.dtype, mapped.shape) == (dtype, tensor.shape)
    assert torch.equal(mapped, tensor)
    assert not list(tmp_path.iterdir())
    assert open_files() == files


def test_a_mapped_tensor_is_shared_memory_of_its_file_not_private(tmp_path):
    tensor = to_mapped(torch.ones(4 * SMALL), tmp_path)
    assert private_kilobytes(tensor.data_ptr()) == 0


def test_a_disk_without_room_is_refused_before_anything_is_stored(tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with refused("no room for 2.00 GiB", str(tmp_path), "No space left", settings=["scratch"]):
        mapped_empty([2**29], torch.float32, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with refused(str(tmp_path / "missing"), settings=["scratch"]):
        mapped_empty([4], torch.float32, tmp_path / "missing")


def test_large_parameters_made_inside_move_and_others_stay(tmp_path):
    with mapped_parameters(tmp_path):
        large, small = nn.Linear(1024, 512), nn.Linear(8, 8)
        tied = nn.Linear(1024, 512, bias=False)
        tied.weight = large.weight
        large.register_parameter("none", None)
    outside = nn.Linear(1024, 512)
    assert is_mapped(large.weight)
    assert tied.weight is large.weight
    assert not any(map(is_mapped, (small.weight, large.bias, outside.weight)))


def test_chunks_are_all_of_a_tensor_and_no_copy():
    tensor = torch.arange(23).view(23, 1)
    pieces = list(chunks(tensor, 5))
    assert [len(piece) for piece in pieces] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat(pieces), tensor.flatten())
    assert pieces[0].data_ptr() == tensor.data_ptr()
    assert not list(chunks(torch.zeros(0)))


# Whole models


def save(folder: Path, how: str) -> Path:
    """A model with a large embedding in a folder, stored in one of the ways in which checkpoints come."""
    model = tiny_model("llama", vocab_size=ROWS, tie_word_embeddings="tied" in how)
    if "half" in how:
        model.to(torch.float16)
    if "brain" in how:
        model.to(torch.bfloat16)
    folder.mkdir()
    if "sharded" in how:
        model.save_pretrained(folder, max_shard_size="3MB")
    else:
        model.save_pretrained(folder)
    save_tokenizer(folder)
    if "pickled" in how:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    "how", ["float", "half", "brain", "pickled", "half pickled", "converted", "converted pickled", "tied", "sharded"]
)
def test_a_streamed_model_has_the_same_values_and_no_private_weights(tmp_path, how):
    folder = save(tmp_path / "model", how)
    (tmp_path / "scratch").mkdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    asked = "bfloat16" if "converted" in how else "auto"
    streamed = load_model(str(folder), dtype=asked, device="cpu", stream_through=tmp_path / "scratch")
    plain = load_model(str(folder), dtype=str(streamed.stored_dtype).removeprefix("torch."), device="cpu")
    assert streamed.stored_dtype == plain.stored_dtype
    assert streamed.stored_dtype == {"h": torch.float16, "b": torch.bfloat16, "c": torch.bfloat16}.get(
        how[0], torch.float32
    )
    found, expected = streamed.model.state_dict(), plain.model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    large = {name: tensor for name, tensor in found.items() if tensor.nbytes >= SMALL}
    assert len(large) == 2
    assert all(is_mapped(tensor) for tensor in large.values())
    assert (found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()) == (how == "tied")
    assert not list((tmp_path / "scratch").iterdir())
    # Written to, they become private or change a file without a name; those of the user never.
    for tensor in large.values():
        tensor.zero_()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
