"""The unfinished run: what is kept, what is refused and how, what a damaged file costs."""

import errno
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sparsegpt import SparseGPTError
from sparsegpt.driver.reports import BlockReport, LayerReport, PruneReport
from sparsegpt.files.checked_json import read_checked, write_checked, write_json
from sparsegpt.files.folders import new_folder, recover
from sparsegpt.files.mapped import is_mapped
from sparsegpt.files.results import MARKER, new_result
from sparsegpt.run.work_folder import WorkFolder, unfinished_blocks
from sparsegpt.settings.prune_settings import resolve_settings
from tests.support import refused

SETTINGS = resolve_settings("2:4", "default", method="sparsegpt")
IDENTITY = {"model": "abc", "settings": {"damping": 0.01, "order": "input"}, "--only": None}


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out"


def opened(target, *, resume=False, overwrite=False):
    return WorkFolder(target, resume=resume, overwrite=overwrite)


def add_block(work, report, index, tensors=None):
    report.layers.append(LayerReport(f"layer{index}", (2, 4), "2:4", "admm", 0.5, 0.1, 0.01, 64, 1.0))
    report.blocks.append(BlockReport(index, 4, 1, 0.1, 1.0))
    return work.keep(index, tensors or {"weight": torch.full((4, 4), float(index))}, report)


def unfinished(target, blocks, identity=IDENTITY, **options):
    """Leave a run behind that has finished so many blocks."""
    report = PruneReport(SETTINGS)
    with opened(target, **options) as work:
        assert not work.begin(identity, report)
        for index in range(blocks):
            add_block(work, report, index)
    return work.folder


# Keeping and going on


def test_a_run_goes_on_behind_its_last_finished_block(target):
    unfinished(target, 3)
    report = PruneReport(SETTINGS)
    with opened(target, resume=True) as work:
        assert not work.begin(IDENTITY, report)
        assert work.finished == 3
        assert [layer.name for layer in report.layers] == ["layer0", "layer1", "layer2"]
        assert report.layers[0].shape == (2, 4)
        assert [block.index for block in report.blocks] == [0, 1, 2]
        for index in range(3):
            [(name, tensor)] = work.load(index).items()
            assert (name, tensor.tolist()) == ("weight", [[float(index)] * 4] * 4)
        add_block(work, report, 3)
    assert unfinished_blocks(target) == 4


def test_a_kept_block_is_a_page_of_its_file_and_holds_no_file_open(target):
    def open_files():
        return sorted(str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())

    report = PruneReport(SETTINGS)
    with opened(target) as work:
        work.begin(IDENTITY, report)
        kept = [add_block(work, report, 0, {"weight": torch.rand(512, 512)})]
        before = len(open_files())
        kept += [add_block(work, report, index, {"weight": torch.rand(512, 512)}) for index in range(1, 20)]
        assert len(open_files()) == before
        assert all(is_mapped(tensors["weight"]) for tensors in kept)


def test_nothing_finished_leaves_nothing(target, tmp_path):
    unfinished(target, 0)
    assert not list(tmp_path.iterdir())


def test_resuming_nothing_starts_anew(target):
    with opened(target, resume=True) as work:
        assert not work.begin(IDENTITY, PruneReport(SETTINGS))
        assert work.finished == 0


def test_a_done_run_holds_the_folder_to_its_end_and_leaves_nothing(target, tmp_path):
    with opened(target) as work:
        report = PruneReport(SETTINGS)
        work.begin(IDENTITY, report)
        add_block(work, report, 0)
        with work.new_result() as draft:
            (draft / "file").write_text("new")
        with refused("another process"):
            opened(target, overwrite=True).__enter__()
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "file", MARKER}


def test_a_result_that_cannot_be_written_leaves_the_blocks_and_says_so(target):
    report = PruneReport(SETTINGS)
    with refused("no space left", str(target), "--resume"), opened(target) as work:
        work.begin(IDENTITY, report)
        add_block(work, report, 0)
        with work.new_result():
            raise OSError(errno.ENOSPC, "No space left on device")
    assert unfinished_blocks(target) == 1


def test_an_interrupt_while_a_block_is_written_keeps_those_before(target, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    for place in ("ShardedWriter.add", "flush", "write_checked"):
        shutil.rmtree(target.parent / ".out.unfinished", ignore_errors=True)
        report = PruneReport(SETTINGS)
        with pytest.raises(KeyboardInterrupt), opened(target) as work, monkeypatch.context() as patch:
            work.begin(IDENTITY, report)
            add_block(work, report, 0)
            patch.setattr(f"sparsegpt.run.work_folder.{place}", interrupt)
            add_block(work, report, 1)
        again = PruneReport(SETTINGS)
        with opened(target, resume=True) as work:
            work.begin(IDENTITY, again)
            assert work.finished == len(again.blocks) == len(again.layers) == 1
            assert add_block(work, again, 1)["weight"].tolist() == [[1.0] * 4] * 4


# Another run


def test_another_run_is_refused_with_what_differs_and_stays(target):
    unfinished(target, 2)
    other = {**IDENTITY, "settings": {"damping": 0.5, "order": "input"}, "--only": "mlp"}
    with refused("damping: 0.01 then, 0.5 now", "--only: None then, mlp now", "--overwrite"):
        unfinished(target, 0, other, resume=True)
    assert unfinished_blocks(target) == 2
    unfinished(target, 0, resume=True)


def test_what_is_equal_is_not_said(target):
    unfinished(target, 1)
    with pytest.raises(SparseGPTError) as caught:
        unfinished(target, 0, {**IDENTITY, "model": "xyz"}, resume=True)
    assert "model: abc then, xyz now" in str(caught.value)
    assert "damping" not in str(caught.value)
    assert "--only" not in str(caught.value)


def test_an_unfinished_run_is_refused_without_resume_or_overwrite(target):
    unfinished(target, 2)
    with refused("2 finished blocks", "--resume", "--overwrite"):
        unfinished(target, 0)
    assert unfinished_blocks(target) == 2


def test_another_run_that_had_finished_nothing_is_in_nobodys_way(target):
    folder = unfinished(target, 1)
    state = read_checked(folder / "state.json")
    write_checked(folder / "state.json", {**state, "blocks": [], "layers": [], "scores": {"text": {}}})
    with opened(target, resume=True) as work:
        assert not work.begin({**IDENTITY, "model": "xyz"}, PruneReport(SETTINGS))
        assert "scores" not in work.state


def test_overwrite_starts_over_once_it_begins_and_not_before(target):
    folder = unfinished(target, 2)
    (folder / "tensors.writing").mkdir()
    with pytest.raises(ZeroDivisionError), opened(target, overwrite=True):
        raise ZeroDivisionError  # such as a model that does not load
    assert unfinished_blocks(target) == 2
    report = PruneReport(SETTINGS)
    with opened(target, overwrite=True) as work:
        assert not work.begin({**IDENTITY, "model": "xyz"}, report)
        assert (work.finished, report.blocks) == (0, [])
        assert {path.name for path in folder.iterdir()} == {"lock", "state.json"}


def test_what_overwrite_allowed_is_still_allowed_when_the_run_goes_on(target):
    with new_result(target, "test", overwrite=False) as draft:
        (draft / "old").write_text("old")
    with refused("not empty", settings=["overwrite"]):
        unfinished(target, 1)
    with refused("not empty", settings=["overwrite"]):
        unfinished(target, 1, resume=True)
    unfinished(target, 1, overwrite=True)
    with opened(target, resume=True) as work:
        assert not work.begin(IDENTITY, PruneReport(SETTINGS))
        assert work.replaces


def test_a_result_that_appeared_meanwhile_is_not_replaced(target):
    unfinished(target, 1)
    target.mkdir()
    (target / "other").write_text("of somebody else")
    with refused("was not written by this program"):
        unfinished(target, 0, resume=True)
    assert unfinished_blocks(target) == 1


def test_what_a_run_did_not_write_into_the_work_folder_stays_there(target):
    folder = unfinished(target, 1)
    (folder / "notes.txt").write_text("mine")
    (folder / "photos").mkdir()
    with opened(target, overwrite=True) as work:
        work.begin(IDENTITY, PruneReport(SETTINGS))
        with work.new_result() as draft:
            (draft / "file").write_text("new")
    assert {path.name for path in folder.iterdir()} >= {"notes.txt", "photos"}
    assert not list(folder.glob("*.safetensors"))


# Damage


def test_a_state_that_is_damaged_is_refused_with_the_way_out(target):
    folder = unfinished(target, 2)
    good = (folder / "state.json").read_bytes()
    damaged = [b"", b"{", b"[]", b"{}", good[:-20], good.replace(b"0.01", b"0.02"), b'{"sha256": 1}', b"[" * 100_000]
    for content in damaged:
        (folder / "state.json").write_bytes(content)
        for resume in (True, False):
            with refused("state.json", "damaged", "--overwrite instead of --resume"):
                unfinished(target, 0, resume=resume)
        assert unfinished_blocks(target) == 0
    unfinished(target, 1, overwrite=True)
    assert unfinished_blocks(target) == 1


def test_a_state_of_another_version_is_refused(target):
    folder = unfinished(target, 2)
    write_checked(folder / "state.json", {**read_checked(folder / "state.json"), "version": 99})
    with refused("not of this version", "--overwrite"):
        unfinished(target, 0, resume=True)
    assert (folder / "block-00001.safetensors").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-3] + b"\1\1\1"),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"')),
        lambda path: safetensors.torch.save_file({"weight": torch.ones(4, 4)}, path),
    ],
)
def test_from_a_damaged_block_on_blocks_are_pruned_again(target, damage):
    folder = unfinished(target, 4)
    damage(folder / "block-00002.safetensors")
    report = PruneReport(SETTINGS)
    with opened(target, resume=True) as work:
        work.begin(IDENTITY, report)
        assert work.finished == 2
        assert [layer.name for layer in report.layers] == ["layer0", "layer1"]
    assert unfinished_blocks(target) == 2


def test_numbers_that_json_does_not_know_come_back(tmp_path):
    value = {"a": [float("inf"), -float("inf")], "b": {"c": "text", "d": None}}
    write_checked(tmp_path / "x.json", value)
    assert read_checked(tmp_path / "x.json") == value
    write_checked(tmp_path / "x.json", {"a": float("nan")})
    assert read_checked(tmp_path / "x.json")["a"] != read_checked(tmp_path / "x.json")["a"]
    json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_json_without_a_checksum_is_not_taken_for_checked(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with refused("x.json", "damaged"):
        read_checked(tmp_path / "x.json")


# Others at work, and folders in the way


def hold(target, ready, end):
    with opened(Path(target)) as work:
        work.begin(IDENTITY, PruneReport(SETTINGS))
        ready.set()
        end.wait(60)


def test_a_second_process_on_one_folder_is_refused(target):
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(str(target), ready, end))
    process.start()
    try:
        assert ready.wait(60)
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with refused("another process", str(target)):
                opened(target, **options).__enter__()
    finally:
        end.set()
        process.join()
    unfinished(target, 1)


def test_a_folder_that_vanishes_under_the_lock_is_made_again(target, monkeypatch):
    """The former user removes its folder between our mkdir and our lock."""
    real, calls = Path.mkdir, []

    def mkdir(self, *arguments, **options):
        real(self, *arguments, **options)
        calls.append(self)
        if len(calls) == 1:
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with opened(target):
        assert len(calls) == 2


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_symbolic_link_as_output_is_refused(target, tmp_path, options):
    (tmp_path / "real").mkdir()
    target.symlink_to(tmp_path / "real")
    with refused("symbolic link"):
        unfinished(target, 1, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"real", "out"}


@pytest.mark.parametrize("name", ["x" * 300, "..", "/"])
def test_a_name_that_no_folder_can_have_is_refused(tmp_path, name):
    with refused("output", settings=["out"]):
        opened(tmp_path / name).__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the fault tests drop that right")
def test_a_read_only_folder_is_refused(target, tmp_path):
    tmp_path.chmod(0o500)
    with refused("not writable"):
        opened(target).__enter__()


def test_what_a_killed_writer_left_is_cleared_and_what_it_moved_aside_comes_back(target, tmp_path):
    (tmp_path / ".out.123.old").mkdir()
    (tmp_path / ".out.123.old" / "file").write_text("old")
    (tmp_path / ".out.123.writing").mkdir()
    others = [".out.2.77.old", ".out.2.77.writing", ".outer.1.old", ".out.x.writing"]  # of targets out.2 and outer
    for name in others:
        (tmp_path / name).mkdir()
    recover(target)
    assert (target / "file").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}


def test_the_leftovers_of_a_killed_process_with_the_same_id_are_no_obstacle(target, tmp_path):
    target.mkdir()
    for kind in ("old", "writing"):
        (tmp_path / f".out.{os.getpid()}.{kind}" / "part").mkdir(parents=True)
    with new_folder(target) as draft:
        (draft / "file").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]
