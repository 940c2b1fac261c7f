"""Folders appear whole or not at all, whatever interrupts the writing."""

import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sparsegpt import SparseGPTError
from sparsegpt.files import folders
from sparsegpt.files.checked_json import write_json
from sparsegpt.files.folders import new_folder
from tests.support import refused


@pytest.fixture
def old(tmp_path):
    """A finished result that must survive."""
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "weights").write_text("old")
    (folder / "part").mkdir()
    (folder / "part" / "deep").write_text("old too")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


OLD = {"weights": "old", "part/deep": "old too"}


def write_new(target: Path, *, fail: BaseException | None = None) -> None:
    with new_folder(target) as draft:
        (draft / "weights").write_text("new")
        (draft / "sub").mkdir()
        (draft / "sub" / "file").write_text("new too")
        if fail:
            raise fail


NEW = {"weights": "new", "sub/file": "new too"}


def only_entry(target: Path) -> bool:
    """Nothing lies beside the target: no draft, no retired folder."""
    return [path.name for path in target.parent.iterdir()] in ([target.name], [])


def test_a_new_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "result"
    with new_folder(target) as draft:
        (draft / "weights").write_text("new")
        assert not target.exists()
        assert draft.parent == target.parent
    assert contents(target) == {"weights": "new"}
    assert only_entry(target)


def test_missing_parents_are_made(tmp_path):
    write_new(tmp_path / "a" / "b" / "result")
    assert contents(tmp_path / "a" / "b" / "result") == NEW


def test_relative_targets_are_taken_from_where_the_work_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder(Path("result")) as draft:
        (draft / "weights").write_text("new")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert contents(tmp_path / "result") == {"weights": "new"}


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "result").mkdir()
    write_new(tmp_path / "result")
    assert contents(tmp_path / "result") == NEW


def test_overwriting_replaces_everything(old):
    write_new(old)
    assert contents(old) == NEW
    assert only_entry(old)


@pytest.mark.parametrize("exception", [ValueError("broken"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_inside_leaves_the_old_folder_and_no_draft(old, exception):
    with pytest.raises(type(exception)):
        write_new(old, fail=exception)
    assert contents(old) == OLD
    assert only_entry(old)


# What torch, json and safetensors raise when the disk is full; the last was seen on a full tmpfs.
FULL_DISK = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("failure", FULL_DISK, ids=lambda failure: type(failure).__name__)
def test_a_full_disk_is_one_clear_line_and_leaves_the_old_folder(old, failure):
    with refused("no space left", str(old), "another output folder"):
        write_new(old, fail=failure)
    assert contents(old) == OLD
    assert only_entry(old)


@pytest.mark.parametrize("failure", FULL_DISK, ids=lambda failure: type(failure).__name__)
def test_a_full_disk_leaves_nothing_where_nothing_was(tmp_path, failure):
    with refused("no space left"):
        write_new(tmp_path / "result", fail=failure)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_flushing_leaves_the_old_folder(old, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refused("no space left"):
        write_new(old)
    assert contents(old) == OLD
    assert only_entry(old)


@pytest.fixture(params=["exchange", "renames"])
def way(request, monkeypatch):
    """At one instant where the system can do that, else one rename after the other."""
    if request.param == "renames":
        monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    return request.param


def test_either_way_the_new_folder_is_there_and_the_old_one_is_gone(old, way):
    write_new(old)
    assert contents(old) == NEW
    assert only_entry(old)


@pytest.mark.parametrize("at", range(5))
def test_whichever_flush_fails_the_old_folder_is_there(old, way, monkeypatch, at):
    """Those of the new files, of the new folder, and last, once the names have changed, of what holds both."""
    real, flushed = os.fsync, []

    def fsync(descriptor):
        flushed.append(descriptor)
        if len(flushed) == at + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with refused("no space left", "untouched"):
        write_new(old)
    assert contents(old) == OLD
    assert only_entry(old)


def test_linux_exchanges_the_two_names_at_one_instant(old, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    if not folders._exchange(old, other):
        pytest.skip("this file system cannot exchange names")
    assert contents(other) == OLD
    assert not contents(old)


@pytest.mark.parametrize("interruption", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failing_rename_brings_the_old_folder_back(old, monkeypatch, interruption):
    monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    real = Path.rename

    def rename(self, target):
        if self.name.endswith(".writing"):
            raise interruption
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    expected = SparseGPTError if isinstance(interruption, OSError) else type(interruption)
    with pytest.raises(expected):
        write_new(old)
    assert contents(old) == OLD
    assert only_entry(old)


def test_other_failures_of_the_system_are_not_called_a_full_disk(old):
    with pytest.raises(SparseGPTError, match=r"was not written.*Input/output"):
        write_new(old, fail=OSError(errno.EIO, "Input/output error"))
    assert contents(old) == OLD


def test_every_file_is_flushed_before_the_folder_takes_its_place(tmp_path, monkeypatch):
    flushed = []
    real = folders.flush
    monkeypatch.setattr(folders, "flush", lambda path: (flushed.append(path.name), real(path)))
    target = tmp_path / "result"
    write_new(target)
    assert set(flushed[:-1]) == {"weights", "sub", "file", f".result.{os.getpid()}.writing"}
    assert flushed[-1] == tmp_path.name


def test_what_a_killed_writer_moved_aside_comes_back(old):
    old.rename(old.with_name(".result.123.old"))
    old.with_name(".result.124.writing").mkdir()
    folders.recover(old)
    assert contents(old) == OLD
    assert only_entry(old)


def test_of_two_results_the_one_in_its_place_stays(old):
    retired = old.with_name(".result.123.old")
    retired.mkdir()
    (retired / "weights").write_text("older")
    folders.recover(old)
    assert contents(old) == OLD
    assert only_entry(old)


def test_json_is_valid_and_keeps_numbers_that_json_does_not_know(tmp_path):
    value = {"a": (1, 2.5, None, True), "b": float("inf"), "c": [float("nan")], 4: "\N{SNOWMAN}"}
    write_json(tmp_path / "report.json", value)
    text = (tmp_path / "report.json").read_text("utf-8")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found == {"a": [1, 2.5, None, True], "b": "inf", "c": ["nan"], "4": "\N{SNOWMAN}"}
