"""Files that change while they are read: seen before the next read, and told where a page is gone already."""

import os
import signal
import sys

import pytest
import torch
from safetensors.torch import save_file

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.tensor_files import OpenTensors
from sparsegpt.files.unchanged import Unchanged, mapped_file


def shorten(path):
    os.truncate(path, path.stat().st_size - 1)


def write_into(path):
    with path.open("r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(0, 1))  # clocks of file systems may stand still for as long as a test takes


def replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shorten, "it had 100 bytes and has 99"),
        (write_into, "somebody wrote into it"),
        (replace, "somebody wrote into it"),
    ],
)
def test_a_changed_file_is_refused_before_it_is_read_and_after(tmp_path, change, said):
    path, still = tmp_path / "weights", tmp_path / "still"
    path.write_bytes(bytes(100))
    still.write_bytes(bytes(100))
    files = Unchanged.since_now([still, path])
    with files.meanwhile():
        path.read_bytes()
    with pytest.raises(SparseGPTError, match=f"{path}.*{said}"), files.meanwhile():
        change(path)
    with pytest.raises(SparseGPTError, match=f"{path}.*{said}"), files.meanwhile():
        pytest.fail("it was read")


def test_the_pages_of_a_file_that_is_gone_are_not(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(100))
    with Unchanged.since_now([path]).meanwhile():
        path.unlink()


def test_whatever_wrong_weights_lead_to_the_file_is_named(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(100))
    with pytest.raises(SparseGPTError, match="weights changed"), Unchanged.since_now([path]).meanwhile():
        shorten(path)
        raise ZeroDivisionError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4000, dtype=torch.bfloat16)}, path)
    return path


def test_tensors_are_read_as_they_are_mapped(file):
    with OpenTensors.of_file(file) as tensors:
        with torch.device("meta"):  # as loaders make models
            assert tensors["a"].device.type == "cpu"
        assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3))
        assert torch.equal(tensors.row("a", 1), torch.tensor([3.0, 4.0, 5.0]))
        assert torch.equal(tensors["b"], torch.ones(4000, dtype=torch.bfloat16))
        assert [tensors.dtype(name) for name in tensors] == [tensors[name].dtype for name in tensors]
        assert mapped_file(tensors["b"].data_ptr()) is None
        assert mapped_file(tensors.mapped("b").data_ptr()) == str(file)
        assert all(torch.equal(tensors.mapped(name), tensors[name]) for name in tensors)


def test_a_file_that_becomes_shorter_after_it_was_opened_is_named(file):
    with OpenTensors.of_file(file) as tensors:
        assert torch.equal(tensors.row("a", 0), torch.tensor([0.0, 1.0, 2.0]))
        shorten(file)
        with pytest.raises(SparseGPTError, match=f"{file} became shorter while it was read, b is cut"):
            tensors["b"]


READS = """
import mmap, os, sys, threading
from sparsegpt.files.unchanged import bus_errors_told

with open(sys.argv[1], "r+b") as file, bus_errors_told(lambda text: print(text, file=sys.stderr)):
    pages = mmap.mmap(file.fileno(), 0)
    os.truncate(sys.argv[1], 1)
    print("before")
    readers = [threading.Thread(target=lambda: pages[mmap.PAGESIZE :]) for _ in range(int(sys.argv[2]))]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    pages[mmap.PAGESIZE :]
print("behind")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="handled on Linux alone")
@pytest.mark.parametrize("threads", [0, 3])
def test_pages_that_are_gone_end_a_process_with_one_line(forked_light, tmp_path, threads):
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    ended = forked_light.run("-c", READS, path, threads)
    assert (ended.returncode, ended.stdout) == (1, "before\n"), ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"{path} became shorter")


ENDS = """
import mmap, os, signal, sys
from sparsegpt.files.unchanged import bus_errors_told

with bus_errors_told(print):
    if sys.argv[1] == "sent":
        os.kill(os.getpid(), signal.SIGBUS)
        print("behind")
with open(sys.argv[2], "r+b") as file:
    pages = mmap.mmap(file.fileno(), 0)
    os.truncate(sys.argv[2], 1)
    pages[mmap.PAGESIZE :]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="handled on Linux alone")
@pytest.mark.parametrize("how", ["sent", "read outside"])
def test_other_bus_errors_end_a_process_as_they_would(forked_light, tmp_path, how):
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    ended = forked_light.run("-c", ENDS, how, path)
    assert (ended.returncode, ended.stdout) == (-signal.SIGBUS, "")
