"""kill -9 at any moment: a run goes on behind its last finished block and ends with the bits of an undisturbed one."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from sparsegpt.kernels.cpu.build import cache_folder, load_library
from tests.faults.jobs import OLD, Forker, Job, everything, finished_blocks, leftovers, put_old_result, work_folder
from tests.support import write_text

ACTIVATIONS = ("memory", "disk")


def in_both_places(forker: Forker, flags: dict[str, object], folder: Path) -> list[Job]:
    """A run with activations in memory and on disk; both end with the same bits."""
    jobs = [Job(forker, {**flags, "activations": kind}, folder / kind) for kind in ACTIVATIONS]
    assert jobs[0].result == jobs[1].result
    return jobs


@pytest.fixture(scope="module")
def tiny_jobs(tiny_job, tmp_path_factory):
    return in_both_places(tiny_job.forker, tiny_job.flags, tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def demo_jobs(forker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    flags = {"model": "demo", "sparsity": "2:4", "method": "sparsegpt", "eval": "none", "samples": 4, "seqlen": 32}
    flags |= {"micro-batch": 2, "calib": write_text(folder / "calib.txt", words=500), "distill": 2}
    return in_both_places(forker, flags, folder)


def stages_of(job: Job) -> tuple[str, ...]:
    """Where its run may be killed, in their order."""
    return ("loading", *(f"{done} blocks" for done in range(len(job.report["blocks"]) + 1)), "distilling", "saving")


def stage(out: Path) -> str:
    """How far a run has come: one of its stages, or "saved"."""
    blocks = finished_blocks(out)
    if any(name.endswith((".writing", ".old")) for name in leftovers(out)):
        return "saving"
    if list(work_folder(out).glob("training-*")):
        return "distilling"
    if blocks is None:
        return "saved" if (out / "report.json").exists() else "loading"
    return f"{blocks} blocks"


def killed(job: Job, out: Path, first: str, wait: float, *extra: str) -> bool:
    """Run until `wait`, a share of an undisturbed run's time, behind the beginning of a stage.

    False when the run had ended before.
    """
    outcome = job.run(out, *extra, kill_after=wait * job.seconds, when=lambda: first in ("loading", stage(out)))
    if outcome.code != -9:
        assert (outcome.code, outcome.err) == (0, ""), outcome.err
        return False
    return True


@pytest.mark.parametrize(("model", "kills"), [("tiny", 7), pytest.param("demo", 100, marks=pytest.mark.faults)])
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bits(request, tmp_path, model, kills, seed):
    """Moments are drawn behind the beginning of every stage, so that a machine of any pace is killed in all of them."""
    jobs, chance = request.getfixturevalue(f"{model}_jobs"), random.Random(seed)
    planned = stages_of(jobs[0])
    shares = {"loading": 0.1, planned[-3]: 0.05, "distilling": 0.05, "saving": 0.05}
    stages: Counter[str] = Counter()
    again = 0
    for place in range(kills):
        job, out = chance.choice(jobs), tmp_path / f"out-{place}"
        old = chance.random() < 0.3
        first = planned[place % len(planned)]
        share = shares.get(first, 0.12)
        while True:  # a run that ended before it was killed tells nothing
            if old:
                put_old_result(out)
            wait = share * chance.random()
            if killed(job, out, first, wait, *(["--overwrite"] if old else [])):
                break
            shutil.rmtree(out)
        stages[stage(out)] += 1
        where = f"seed {seed}, case {place}, killed {wait:.3f} of the time behind {first!r}, at {stage(out)!r}"
        try:
            assert job.untouched(out)
            while chance.random() < 1 / 3 and killed(job, out, "loading", chance.random(), "--resume", "--overwrite"):
                again += 1
            job.resume(out)
        except AssertionError as error:
            raise AssertionError(where) from error
        shutil.rmtree(out)
    print(f"\n{kills} kills, {kills} bit-identical, seed {seed}")
    print(
        f"{again} more kills of resumed runs; killed at: " + ", ".join(f"{k}: {n}" for k, n in sorted(stages.items()))
    )
    if model == "demo":  # its stages are long enough to be killed in the one that was meant
        assert stages.keys() >= {*planned[:-2], "saving"}


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.faults)])
def test_a_run_killed_before_each_of_its_writes_resumes_to_the_same_bits(tiny_job, tmp_path, step):
    out, calls = tmp_path / "out", tmp_path / "calls"
    fault = {"root": str(tmp_path), "calls": str(calls)}
    put_old_result(out)
    outcome = tiny_job.run(out, "--overwrite", fault=fault | {"kind": "count", "at": -1})
    assert outcome.code == 0, outcome.err
    made = calls.read_text().splitlines()
    assert {line.split()[0] for line in made} >= {"open", "write", "fsync", "os.mkdir", "os.rename", "os.remove"}
    for place in range(0, len(made), step):
        put_old_result(out)
        outcome = tiny_job.run(out, "--overwrite", fault=fault | {"kind": "kill", "at": place})
        assert outcome.code == -9
        assert tiny_job.untouched(out), made[place]
        tiny_job.resume(out)
    print(f"\nkilled before {len(range(0, len(made), step))} of {len(made)} writes: all bit-identical")


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.faults)])
@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_packing_and_unpacking_killed_before_each_of_their_writes(tiny_job, forker, tmp_path, command, step):
    """The old result or the new one at every moment, whole; the same command again clears up."""
    source, packed, out, calls = (tmp_path / name for name in ("pruned", "packed", "out", "calls"))
    outcome = tiny_job.run(source)
    assert outcome.code == 0, outcome.err
    assert forker.run(["pack", source, packed]).code == 0
    arguments = [command, source if command == "pack" else packed, out, "--overwrite"]
    fault = {"root": str(tmp_path), "calls": str(calls)}
    put_old_result(out)
    outcome = forker.run(arguments, fault=fault | {"kind": "count", "at": -1})
    assert outcome.code == 0, outcome.err
    expected, made = everything(out), calls.read_text().splitlines()
    for at in range(0, len(made), step):
        put_old_result(out)
        assert forker.run(arguments, fault=fault | {"kind": "kill", "at": at}).code == -9
        assert not out.exists() or everything(out) in (OLD, expected), made[at]
        outcome = forker.run(arguments)
        assert outcome.code == 0, outcome.err
        assert everything(out) == expected
        assert not leftovers(out)
    print(f"\n{command} killed before {len(range(0, len(made), step))} of {len(made)} writes: all bit-identical")


@pytest.mark.parametrize(("built", "step"), [(True, 3), pytest.param(False, 1, marks=pytest.mark.faults)])
def test_tuning_killed_before_each_of_its_writes_keeps_what_it_knew(forker, tmp_path, built, step):
    """Its file is as it was, or new, and never half of either. built: the CPU's kernels are compiled already."""
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    file, calls = tmp_path / "sparsegpt" / "measured.json", tmp_path / "calls"
    if built and load_library() is not None:
        shutil.copytree(cache_folder(), file.parent / "kernels")
    arguments = ["tune", "--shapes", "32x64", "--tokens", "1", "--rounds", "1"]
    fault = {"root": str(file.parent), "calls": str(calls)}
    outcome = forker.run(arguments, fault=fault | {"kind": "count", "at": -1}, environment=environment)
    assert outcome.code == 0, outcome.err
    old = file.read_text()
    for at in range(0, len(calls.read_text().splitlines()), step):
        file.write_text(old)
        forker.run(arguments, fault=fault | {"kind": "kill", "at": at}, environment=environment)
        assert file.read_text() == old or json.loads(file.read_text())["machines"]
