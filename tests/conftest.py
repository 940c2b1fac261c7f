"""One thread, no network, no chance: the tests run beside other work and give the same bits everywhere."""

import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for processes that a test starts

import pytest
import torch
from hypothesis import settings

from sparsegpt.cli import commands as cli
from sparsegpt.kernels.dispatch import measured
from tests.forked import Forked
from tests.support import (
    CHILD_ENVIRONMENT,
    Outcome,
    look_for_bases_quickly,
    look_for_tasks_quickly,
    make_commands_once,
    save_model,
    write_text,
)

settings.register_profile("long", deadline=None, derandomize=True)
settings.register_profile("short", settings.get_profile("long"), max_examples=30)
settings.load_profile("short")
gc.disable()  # until all tests are collected: libraries and thousands of tests, all here to stay


def pytest_collection_finish():
    """What is here for good need not be looked through for what can go, at every test again."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    """At the end it goes, all of it: some libraries complain of what stays."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    look_for_bases_quickly()
    look_for_tasks_quickly()
    make_commands_once()


@pytest.fixture(autouse=True)
def _no_chance():
    """The same numbers in whatever order and process a test runs."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _nothing_remembered(_cache, monkeypatch):
    """What `sparsegpt tune` has found on this machine, or in another test, is not a test's business."""
    place = _cache / "measured.json"
    place.unlink(missing_ok=True)
    measured.remembered.cache_clear()
    monkeypatch.setattr(measured, "measured_file", lambda: place)
    yield
    measured.remembered.cache_clear()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, as transformers saves them; not to be changed."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Text that the tiny tokenizer knows."""
    return write_text(tmp_path_factory.mktemp("text") / "prose.txt")


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """Python in a process of its own, with the libraries imported that load a model, and nothing of this package."""
    modules = ("torch", "typer", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto")
    with Forked(tmp_path_factory.mktemp("forked"), CHILD_ENVIRONMENT, *modules) as server:
        yield server


@pytest.fixture(scope="session")
def forked_light(tmp_path_factory):
    """The same with torch alone."""
    with Forked(tmp_path_factory.mktemp("forked"), CHILD_ENVIRONMENT, "torch") as server:
        yield server


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Run `sparsegpt ...` in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sparsegpt", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        return Outcome(code, *capsys.readouterr())

    return run
