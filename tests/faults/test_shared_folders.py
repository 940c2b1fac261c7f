"""Output folders that belong to somebody else: another process, another user, another model."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from sparsegpt.run.work_folder import WorkFolder
from tests.faults.jobs import NOBODY, OLD, everything, finished_blocks, put_old_result, work_folder
from tests.support import refused, save_model


def test_two_processes_on_one_folder(tiny_job, forker, tmp_path):
    """Whoever comes second is refused, and the first ends as if alone."""
    out = tmp_path / "out"
    process = forker.start(tiny_job.arguments(out))
    limit = time.monotonic() + 60
    while finished_blocks(out) is None and time.monotonic() < limit:
        time.sleep(0.001)
    for options in ({"resume": False, "overwrite": False}, {"resume": True, "overwrite": True}):
        with refused("another process", str(out)):
            WorkFolder(out, **options).__enter__()
    assert forker.finish(process).code == 0
    tiny_job.check(out)
    with WorkFolder(out, resume=False, overwrite=True):
        for flags in ([], ["--resume"], ["--overwrite"]):
            expected = ("another process", "--out") if flags else ("not empty",)
            tiny_job.run(out, *flags).refused(str(out), *expected)
    tiny_job.check(out)


@pytest.fixture
def public():
    """A folder that every user can see."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


as_nobody = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")


@as_nobody
def test_a_folder_of_another_user_is_refused(tiny_job, public):
    tiny_job.run(public / "out", user=NOBODY).refused(str(public), "not writable", "--out")
    assert not list(public.iterdir())


@as_nobody
def test_a_folder_that_may_not_be_seen_is_refused(tiny_job, public):
    (public / "closed").mkdir(mode=0o700)
    tiny_job.run(public / "closed" / "out", user=NOBODY).refused("closed", "--out")
    tiny_job.run(public / "closed" / "a" / "out", user=NOBODY).refused("closed", "--out")


@as_nobody
def test_a_read_only_output_folder_is_refused_and_untouched(tiny_job, public):
    os.chown(public, NOBODY, NOBODY)
    put_old_result(public / "out")
    os.chown(public / "out", NOBODY, NOBODY)
    (public / "out").chmod(0o555)
    tiny_job.run(public / "out", "--overwrite", user=NOBODY).refused("out", "not writable", "--out")
    assert everything(public / "out") == OLD
    assert [path.name for path in public.iterdir()] == ["out"]


@as_nobody
def test_an_unfinished_run_of_another_user_is_refused_and_stays(tiny_job, public):
    public.chmod(0o777)
    work_folder(public / "out").mkdir()
    (work_folder(public / "out") / "lock").touch(mode=0o600)
    tiny_job.run(public / "out", user=NOBODY).refused("cannot be written", "--out")
    assert (work_folder(public / "out") / "lock").exists()


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_a_symbolic_link_as_output_is_refused(tiny_job, tmp_path, flags):
    put_old_result(tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    tiny_job.run(tmp_path / "out", *flags).refused("symbolic link", "--out")
    assert everything(tmp_path / "real") == OLD
    assert {path.name for path in tmp_path.iterdir()} == {"real", "out"}


def test_the_unfinished_run_of_another_model_is_refused_and_kept(tiny_job, tmp_path):
    out, calls = tmp_path / "out", tmp_path / "calls"
    fault = {"root": str(tmp_path), "calls": str(calls)}
    tiny_job.run(out, fault=fault | {"kind": "count", "at": -1})
    shutil.rmtree(out)
    made = calls.read_text().splitlines()
    second = [place for place, call in enumerate(made) if call.startswith("os.mkdir") and "tensors.writing" in call][4]
    assert tiny_job.run(out, fault=fault | {"kind": "kill", "at": second}).code == -9
    other = save_model(tmp_path / "other", num_hidden_layers=3, seed=7)
    tiny_job.run(out, "--resume", model=other).refused("another one", "model: ", "--overwrite")
    assert finished_blocks(out) == 1
    tiny_job.resume(out)
