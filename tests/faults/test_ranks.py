"""torchrun: ranks that are killed, refused, started anew; one line for all of them, and nothing lost."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch

from tests.faults.jobs import contents, finished_blocks
from tests.support import CHILD_ENVIRONMENT, save_model, write_text

pytestmark = pytest.mark.faults

KILLS = 20
# After a rank is killed, the job may go on for so many seconds.
END = 30


class Torchrun:
    """`torchrun -m sparsegpt run` on a tiny Llama."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = save_model(folder / "model", "llama", num_hidden_layers=6)
        flags = {"model": model, "sparsity": "2:4", "calib": write_text(folder / "calib.txt"), "eval": "none"}
        flags |= {"method": "sparsegpt", "rotate": "off", "samples": 80, "seqlen": 16, "micro-batch": 2, "distill": 1}
        self.words = ["run", "--quiet", *(f"--{name}={value}" for name, value in flags.items())]

    def start(self, out: str, *words: str, ranks: int = 2, options: tuple[str, ...] = ()) -> subprocess.Popen:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *options, "-m", "sparsegpt"]
        command = [sys.executable, *launcher, *self.words, f"--out={self.folder / out}", *words]
        with (self.folder / "err").open("w") as errors:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=CHILD_ENVIRONMENT)

    def run(self, out: str, *words: str, **how: object) -> int:
        return self.start(out, *words, **how).wait(300)

    def said(self) -> list[str]:
        """Our own lines among those of torchrun."""
        lines = (self.folder / "err").read_text().splitlines()
        return [line for line in lines if line.startswith("sparsegpt: ")]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return Torchrun(tmp_path_factory.mktemp("torchrun"))


@pytest.fixture(scope="module")
def undisturbed(job):
    started = time.perf_counter()
    assert job.run("whole") == 0, job.said()
    return contents(job.folder / "whole"), time.perf_counter() - started


def workers(agent: subprocess.Popen) -> list[int]:
    return [int(text) for text in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_rank_ends_the_job_with_one_line_and_resume_gives_the_same_bits(job, undisturbed, number):
    result, seconds = undisturbed
    draw = random.Random(number)
    agent = job.start(f"killed-{number}")
    time.sleep(draw.uniform(0.3, 1.0) * seconds)
    if agent.poll() is None and len(found := workers(agent)) == 2:
        os.kill(draw.choice(found), signal.SIGKILL)
        killed = time.perf_counter()
        code = agent.wait(2 * END)
        assert time.perf_counter() - killed < END
        if code and finished_blocks(job.folder / f"killed-{number}") is not None:  # they had met
            assert len(job.said()) == 1, job.said()
            assert "has ended" in job.said()[0]
    agent.wait(2 * END)
    assert job.run(f"killed-{number}", "--resume") == 0, job.said()
    assert contents(job.folder / f"killed-{number}") == result


def test_torchrun_starts_them_anew_and_they_go_on_by_themselves(job, undisturbed):
    agent = job.start("anew", options=("--max-restarts=1",))
    while not finished_blocks(job.folder / "anew"):
        time.sleep(0.01)
    os.kill(workers(agent)[1], signal.SIGKILL)
    assert agent.wait(300) == 0
    assert contents(job.folder / "anew") == undisturbed[0]


def test_four_ranks_choose_the_masks_of_one(job):
    paper = ("--preset=paper", "--distill=0")
    assert job.run("four", *paper, ranks=4) == 0, job.said()
    assert job.run("one", *paper, ranks=1) == 0, job.said()
    four, one = (safetensors.torch.load_file(job.folder / name / "model.safetensors") for name in ("four", "one"))
    off = sum(int(((four[name] == 0) != (one[name] == 0)).sum()) for name in one)
    assert off <= 0.001 * sum(tensor.numel() for tensor in one.values())


@pytest.mark.parametrize(
    ("words", "fragment"),
    [(("--samples=1", "--distill=0"), "2 ranks"), (("--device=cuda:0",), "cuda"), (("--samples=81",), "equal shares")],
)
def test_what_ranks_are_refused_is_one_line(job, words, fragment):
    assert job.run("refused", *words) == 1
    assert len(job.said()) == 1
    assert fragment in job.said()[0]
