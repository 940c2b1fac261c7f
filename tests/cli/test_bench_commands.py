"""`bench` and `tune` driven as a user does."""

import json
import re
from dataclasses import replace

import pytest
import torch

from sparsegpt.kernels.dispatch import measured
from sparsegpt.kernels.dispatch.measured import ANY, machine_name
from sparsegpt.kernels.dispatch.packed24 import PACKED24
from sparsegpt.kernels.dispatch.route import KERNELS
from sparsegpt.kernels.format.pack import pack
from sparsegpt.run.options import KERNEL_NAMES

HERE = torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("bench", "kernels", "--tokens", "1,many"), "--tokens"),
        (("bench", "kernels", "--shapes", "32"), "OUTxIN"),
        (("bench", "memory", "--blocks", "0"), "--blocks"),
        (("tune", "--tokens", ""), "--tokens"),
        (("tune", "--shapes", "axb"), "OUTxIN"),
        (("tune", "--shapes", "0x64"), "OUTxIN"),
        (("tune", "--shapes", "64x-64"), "OUTxIN"),
        (("tune", "--shapes", "64x64,30x30"), "30"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(run_cli, arguments, named):
    run_cli(*arguments).refused(named)


def test_kernels_that_fail_are_named_beside_the_measurements_of_the_others(run_cli, monkeypatch):
    wrong = replace(PACKED24.routes["dense"], run=lambda weight, inputs, bias: inputs.new_zeros(len(inputs), 32))
    monkeypatch.setitem(PACKED24.routes, "wrong", wrong)
    outcome = run_cli("bench", "kernels", "--shapes", "32x64", "--tokens", "3", "--rounds", "1", "--json")
    assert outcome.code == 0
    kernels = [json.loads(line)["kernel"] for line in outcome.out.splitlines()]
    assert {"library", "dense"} <= set(kernels) and "wrong" not in kernels
    for dtype in ("bfloat16", "float32"):
        assert f"sparsegpt: wrong failed at 32 x 64, 3 tokens, {dtype}: relative error 1" in outcome.err


def test_the_help_names_every_kernel():
    assert re.split(r", | or ", KERNEL_NAMES) == list(KERNELS)


def test_tune_measures_and_remembers(run_cli, tmp_path, monkeypatch):
    place = tmp_path / "measured.json"
    monkeypatch.setattr(measured, "measured_file", lambda: place)
    outcome = run_cli("tune", "--shapes", "64x96,32x64", "--tokens", "1,40", "--rounds", "1", "--json")
    assert outcome.code == 0 and f"kept in {place}" in outcome.err
    printed = [json.loads(line) for line in outcome.out.splitlines()]
    assert {(row["machine"], row["dtype"], row["weights"]) for row in printed} >= {
        (machine_name(HERE), dtype, weights) for dtype in ("bfloat16", "float32") for weights in (32 * 64, ANY)
    }
    kept = json.loads(place.read_text())["machines"][machine_name(HERE)]
    assert [{"machine": machine_name(HERE), **row} for row in kept] == printed
    (row,) = (row for row in printed if (row["dtype"], row["weights"], row["values"]) == ("float32", 32 * 64, ""))
    steps = [*row["steps"], *([] if row["steps"] and row["steps"][-1][0] == ANY else [[ANY, "dense"]])]
    assert PACKED24.choose(pack(torch.zeros(32, 64))).steps == tuple(map(tuple, steps))
    assert "weights up to" in run_cli("tune", "--shapes", "32x64", "--tokens", "1", "--rounds", "1").out
