"""Devices and dtypes by the names that people give them."""

import pytest
import torch

from sparsegpt.settings.machine import DTYPES, parse_dtype, pick_device
from tests.support import refused

NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "half": "float16", "float": "float32"}
NAMES |= {"torch.bfloat16": "bfloat16", "Float16": "float16", "torch.half": "float16"}


@pytest.mark.parametrize("name", [*NAMES, *DTYPES])
def test_a_dtype_has_several_names(name):
    assert parse_dtype(name) == getattr(torch, NAMES.get(name, name))


def test_auto_is_no_dtype():
    assert parse_dtype("auto") is None


@pytest.mark.parametrize(
    ("name", "meant"), [("float61", "float16"), ("f16", "fp16"), ("b16", "bf16"), ("bfloat", "float")]
)
def test_the_nearest_dtype_is_asked_for(name, meant):
    with refused(f"{name!r}", "bfloat16 (bf16)", f"did you mean {meant}", settings=["dtype"]):
        parse_dtype(name)


DEVICES = {"gpu": "cuda", "GPU:1": "cuda:1", "CUDA": "cuda", "cuda0": "cuda:0", "1": "cuda:1", "nvidia": "cuda"}
DEVICES |= {"cpuu": "cpu", "atuo": "auto"}


@pytest.mark.parametrize("name", DEVICES)
def test_the_nearest_device_is_asked_for(name):
    with refused(f"{name!r}", "auto, cpu, cuda or cuda:N", f"did you mean {DEVICES[name]}?", settings=["device"]):
        pick_device(name)


def test_a_device_beyond_those_that_are_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    with refused("'cuda:2'", "cuda:0 to cuda:1", settings=["device"]):
        pick_device("cuda:2")
