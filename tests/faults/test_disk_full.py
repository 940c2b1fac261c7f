"""A disk that is full at any write: one line, the old result untouched, and a resume that ends with the same bits."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.jobs import OLD, everything, finished_blocks, put_old_result

PAGE = 4096


@pytest.mark.parametrize(
    ("activations", "step"),
    [
        ("memory", 97),
        ("disk", 193),
        *(pytest.param(place, 1, marks=pytest.mark.faults) for place in ("memory", "disk")),
    ],
)
def test_a_disk_full_at_each_write_is_one_line_and_loses_nothing(tiny_job, tmp_path, step, activations):
    out, calls = tmp_path / "out", tmp_path / "calls"
    fault = {"root": str(tmp_path), "calls": str(calls)}
    options = {"activations": activations}
    put_old_result(out)
    # Counted as a full disk counts: what is removed needs no space.
    outcome = tiny_job.run(out, "--overwrite", fault=fault | {"kind": "full", "at": 10**9}, **options)
    assert outcome.code == 0, outcome.err
    made = calls.read_text().splitlines()
    assert {line.split()[0] for line in made} >= {"open", "write", "fsync", "os.mkdir", "os.rename"}
    if activations == "disk":
        assert any(line.startswith("posix_fallocate") for line in made)
    refused = 0
    for place in range(0, len(made), step):
        put_old_result(out)
        outcome = tiny_job.run(out, "--overwrite", fault=fault | {"kind": "full", "at": place}, **options)
        if outcome.code:  # what is removed at the end needs no space, so late calls may fail unnoticed
            refused += 1
            outcome.refused(str(tmp_path))
            assert "no space left" in outcome.err or "no room for" in outcome.err, (made[place], outcome.err)
            assert everything(out) == OLD, made[place]
            assert "--resume" in outcome.err or not finished_blocks(out), made[place]
        else:
            assert outcome.err == "", made[place]
        tiny_job.resume(out) if outcome.code else tiny_job.check(out)
    assert refused
    print(f"\ndisk full from each of {len(range(0, len(made), step))} writes on ({activations}): {refused} refused")


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs whose size can be set, in pages."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> subprocess.CompletedProcess[str]:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    if os.geteuid() != 0 or shutil.which("mount") is None or mount(f"size={PAGE * 4096}").returncode:
        pytest.skip("no tmpfs can be mounted here")

    def resize(pages: int) -> None:
        assert mount("remount", f"size={pages * PAGE}").returncode == 0

    yield folder, resize
    subprocess.run(["umount", str(folder)], check=True)


def pages_of(folder: Path) -> int:
    """What a folder takes of a tmpfs."""
    return sum(-(-path.stat().st_size // PAGE) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("sizes", [3, pytest.param(30, marks=pytest.mark.faults)])
@pytest.mark.parametrize("activations", ["disk", pytest.param("memory", marks=pytest.mark.faults)])
def test_a_disk_of_any_size_is_one_line_and_loses_nothing(tiny_job, small_disk, sizes, activations):
    folder, resize = small_disk
    out = folder / "out"
    put_old_result(out)
    assert tiny_job.run(out, "--overwrite", activations=activations).code == 0
    # Blocks, distilled blocks and result lie on the disk at the same time, and the training's three tensors a weight:
    # once in scratch, twice while one epoch's follow the other's.
    enough = (3 + 3 + 2 * 3) * pages_of(out) + 64
    refused = 0
    for place in range(sizes):
        resize(4096)
        put_old_result(out)
        shutil.rmtree(out.with_name(".out.unfinished"), ignore_errors=True)
        resize(2 + place * enough // sizes)
        outcome = tiny_job.run(out, "--overwrite", activations=activations)
        if outcome.code:
            refused += 1
            outcome.refused(str(out.parent))
            assert any(text in outcome.err for text in ("no space left", "no room for", "of disk in")), outcome.err
            assert everything(out) == OLD
            resize(4096)
            tiny_job.resume(out)
        else:
            tiny_job.check(out)
    assert 0 < refused < sizes
    print(f"\n{sizes} sizes of a real disk ({activations}): {refused} too small")


def large_model(folder: Path) -> Path:
    """A model with tensors large enough to be moved to files while it is converted."""
    import torch

    from tests.support import save_tokenizer, tiny_model

    tiny_model("llama", vocab_size=2**14).to(torch.float32).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_scratch_without_room_for_a_converted_model_is_refused(tiny_job, small_disk, tmp_path):
    folder, resize = small_disk
    model = large_model(tmp_path / "model")
    resize(64)
    flags = {"model": model, "scratch": folder, "dtype": "bfloat16"}
    tiny_job.run(tmp_path / "out", **flags).refused("no room for", str(folder), "--scratch")
    assert not list(folder.iterdir())
    resize(4096)
    assert tiny_job.run(tmp_path / "out", **flags).code == 0


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("")], ids=["missing", "a file"])
def test_a_scratch_folder_that_is_none_is_refused(tiny_job, tmp_path, make: Callable[[Path], object]):
    make(tmp_path / "scratch")
    outcome = tiny_job.run(tmp_path / "out", scratch=tmp_path / "scratch", activations="disk")
    outcome.refused(str(tmp_path / "scratch"), "--scratch")
    assert not (tmp_path / "out").exists()
