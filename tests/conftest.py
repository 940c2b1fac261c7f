"""One thread, no network, no chance: the tests run beside other work and give the same bits everywhere."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

from .support import save_model, write_text

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, as transformers saves them; not to be changed."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Text that the tiny tokenizer knows."""
    return write_text(tmp_path_factory.mktemp("text") / "prose.txt")
