"""One forking server for all fault tests, and the run that an undisturbed process makes."""

import os
import random

import pytest

from tests.faults.jobs import Forker, Job
from tests.support import save_model, write_text


@pytest.fixture(scope="session")
def forker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forker")
    text = write_text(folder / "calib.txt", words=400)
    flags = ["--sparsity", "2:4", "--samples", 2, "--seqlen", 16, "--eval", "none", "--calib", text]
    models = [save_model(folder / model_type, model_type) for model_type in ("llama", "opt")]
    jobs = [["run", *flags, "--model", model, "--out", folder / f"{model.name}-out"] for model in models]
    with Forker(folder, jobs) as forker:
        yield forker


@pytest.fixture(scope="session")
def tiny_job(forker, tmp_path_factory):
    """A run on a tiny Llama, half a second each, and its undisturbed result."""
    folder = tmp_path_factory.mktemp("tiny")
    model = save_model(folder / "model", "llama", num_hidden_layers=3)
    flags = {"model": model, "calib": write_text(folder / "calib.txt"), "samples": 8, "seqlen": 16, "micro-batch": 4}
    flags |= {"distill": 2, "distill-rate": 3e-4}
    job = Job(forker, {"sparsity": "2:4", "method": "sparsegpt", "eval": "none", **flags}, folder / "reference")
    assert job.report["warnings"] == []  # the distillation was not rolled back: its blocks are in the result
    return job


@pytest.fixture
def seed(request):
    """FAULTS_SEED, else one that is drawn anew in the long form and fixed in the short one."""
    fixed = "0" if request.node.get_closest_marker("faults") is None else str(random.SystemRandom().randrange(10**6))
    return int(os.environ.get("FAULTS_SEED", fixed))
