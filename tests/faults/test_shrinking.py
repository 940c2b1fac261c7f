"""A file of the model that shrinks or is written to under a run that reads its pages: one line naming it, no SIGBUS."""

import os
import random
import shutil
from collections import Counter

import pytest

from tests.faults.jobs import finished_blocks, work_folder

WAYS = ("cut", "cut by a byte", "written to")
# A run is met while it loads, and behind its first, second and last block.
MOMENTS = (None, 0, 1, 2, 3)


def change(path, how, chance):
    size = path.stat().st_size
    if how == "written to":
        with path.open("r+b") as file:
            file.seek(chance.randrange(size))
            file.write(b"\xff")
    else:
        os.truncate(path, size - 1 if how == "cut by a byte" else chance.randrange(size))


def has_come_to(out, moment):
    if moment is None:
        return work_folder(out).exists()
    return (finished_blocks(out) or -1) >= moment


@pytest.mark.parametrize("cases", [6, pytest.param(90, marks=pytest.mark.faults)])
def test_a_file_that_changes_under_a_run_is_named_in_one_line(tiny_job, tmp_path, cases, seed):
    """Put back as it was, the run goes on and ends with the bits of an undisturbed one."""
    chance = random.Random(seed)
    seen: Counter[str] = Counter()
    model, out = tmp_path / "model", tmp_path / "out"
    weights = model / "model.safetensors"
    for case in range(cases):
        shutil.copytree(tiny_job.flags["model"], model)
        whole = weights.read_bytes()
        how = WAYS[case % len(WAYS)]
        # Who writes before anything was read makes another model, which may be a fine one.
        moment = chance.choice(MOMENTS[how == "written to" :])
        outcome = tiny_job.run(
            out,
            model=model,
            when=lambda moment=moment: has_come_to(out, moment),
            disturb=lambda how=how: change(weights, how, chance),
        )
        try:
            if outcome.code:
                outcome.refused(str(weights if moment else model))
                weights.write_bytes(whole)
                outcome = tiny_job.run(out, "--resume", model=model)
                seen["named"] += 1
            else:  # it had read everything
                seen["done"] += 1
            assert (outcome.code, outcome.err) == (0, "")
            tiny_job.check(out)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, case {case}: {how} behind {moment}: {outcome}") from error
        for folder in (model, out):
            shutil.rmtree(folder)
    print(f"\n{cases} files changed under a run, seed {seed}: {dict(seen)}")
    assert seen["named"] > cases / 2
