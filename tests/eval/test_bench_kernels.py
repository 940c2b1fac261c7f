"""The benchmarks run, compare like with like, and count bytes as the format says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsegpt.errors import SparseGPTError
from sparsegpt.eval.bench import trial
from sparsegpt.eval.bench.kernels import bench_decode, bench_kernels, time_in_turns, typical_seconds
from sparsegpt.eval.bench.trial import random_packed
from sparsegpt.kernels import unpack
from sparsegpt.kernels.checkpoint.archive import pack_folder
from sparsegpt.kernels.cpu import dense as on_cpu
from sparsegpt.kernels.cpu.library import machine_level
from sparsegpt.kernels.dispatch.measured import OWN_DENSE
from sparsegpt.kernels.dispatch.packed24 import PACKED24
from sparsegpt.kernels.format.pack import pack
from sparsegpt.kernels.hf.quantizer import register
from tests.kernels.hf.test_hf import pruned_model

ROUTES = PACKED24.routes


def test_random_weights_are_valid() -> None:
    packed = random_packed((33, 100), torch.bfloat16, torch.device("cpu"))
    dense = unpack(packed)
    again = pack(dense)
    assert dense.shape == (33, 100) and torch.equal(unpack(again), dense)
    assert torch.equal(again.meta[:, :3], packed.meta[:, :3])  # normal values: every kept one is non-zero


@pytest.mark.parametrize("beside_own_dense", [False, True])
def test_kernel_rows(beside_own_dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own_dense = beside_own_dense and machine_level() is not None
    monkeypatch.setattr(on_cpu, "TOKENS", {machine_level(): 8} if own_dense else {})
    measured = bench_kernels(shapes=[(64, 96), (32, 64)], tokens=(1, 40), rounds=2, copy_bytes=1 << 16)
    assert measured.bandwidth > 0 and measured.device == "cpu" and measured.failed == ()
    found = {(row.kernel, row.dtype, row.rows, row.tokens) for row in measured.rows}
    assert {("library", "bfloat16", 64, 1), ("dense", "float32", 32, 40)} <= found
    assert ((OWN_DENSE, "bfloat16", 64, 40) in found) == own_dense
    for row in measured.rows:
        assert row.microseconds > 0 and row.gigabytes_per_second > 0 and row.read_microseconds > 0
        if row.kernel == "library":
            assert row.speedup == row.ceiling == 1 and row.speedup_over_best_dense <= 1
        elif row.kernel == OWN_DENSE:
            assert row.ceiling == 1 and row.dtype == "bfloat16" and not row.chosen
        elif "bitmask" in row.kernel:
            dense, integer = 2 if row.dtype == "bfloat16" else 4, row.kernel.partition(" int")[2]
            kept = (row.rows * row.columns / 2 + 32) * (int(integer) / 8 if integer else dense)
            mask, offsets = row.rows * row.columns / 8, 8 * (row.rows + 1)
            scales = 2 * row.rows * -(-row.columns // 128) if integer else 0
            expected = dense * row.rows * row.columns / (kept + mask + offsets + scales)
            assert row.ceiling == pytest.approx(expected)
        elif "int" in row.kernel:
            kept = int(row.kernel.partition(" int")[2]) * row.columns / 2
            scales = 16 * -(-row.columns // 128)
            assert row.ceiling == pytest.approx(16 * row.columns / (kept + row.columns + scales))
        else:
            assert row.ceiling == pytest.approx(16 / 9 if row.dtype == "bfloat16" else 32 / 17)
    forms = [(row.kernel.partition(" ")[2], row.dtype, row.rows, row.tokens) for row in measured.rows]
    for form in forms:
        assert sum(row.chosen for row, of in zip(measured.rows, forms, strict=True) if of == form) == 1


def test_what_is_wrong_or_does_not_run_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(weight, inputs, bias):
        return 2 * ROUTES["dense"].run(weight, inputs, bias)

    def broken(weight, inputs, bias):
        raise RuntimeError("no such instruction")

    dense = replace(ROUTES["dense"], prepare=lambda weight: weight)
    for name, run in {"doubled": doubled, "broken": broken, "untried": dense.run}.items():
        monkeypatch.setitem(ROUTES, name, replace(dense, run=run))
    monkeypatch.setattr(trial, "UNTRIED", ("untried", "wgmma_sp"))  # the second refuses a CPU, so nobody tries it
    asked = []
    monkeypatch.setattr(trial, "trial", lambda *given: asked.append(given) or "wrong")
    found = bench_kernels(shapes=[(32, 64)], tokens=(2,), dtypes=[torch.float32], rounds=1, copy_bytes=1 << 16)
    assert asked == [("untried", torch.device("cpu"), ((32, 64),), 180.0)]
    reasons = {failed.kernel: failed.reason for failed in found.failed}
    assert reasons.keys() == {"doubled", "broken", "untried"} and not reasons.keys() & {
        row.kernel for row in found.rows
    }
    assert "relative error 1" in reasons["doubled"] and reasons["broken"] == "RuntimeError: no such instruction"
    assert {"library", "dense"} <= {row.kernel for row in found.rows}


def test_a_trial_is_a_process_of_its_own() -> None:
    """Asked of the small shapes first, and then of those that are given."""
    cpu = torch.device("cpu")
    assert trial.trial("dense", cpu, [(8, 12)]) is None
    assert "in_features divisible by 4" in str(trial.trial("portable", cpu, [(8, 6)]))
    assert trial.trial("dense", cpu, seconds=0.01) == "not done after 0 s"
    with pytest.raises(SparseGPTError, match="missing: no table has such a route"):
        trial.try_route("missing", cpu)


def test_the_error_of_a_process_is_the_exception_and_not_the_advice_after_it() -> None:
    cuda = "Traceback (most recent call last):\n  File x\ntorch.AcceleratorError: CUDA error: misaligned address\n\n"
    cuda += "CUDA kernel errors might be asynchronously reported\nDevice-side assertion tracking was not enabled\n"
    assert trial.last_error(cuda, 1) == "torch.AcceleratorError: CUDA error: misaligned address"
    assert trial.last_error("no such option\n", 2) == "no such option" and trial.last_error("", -11) == "exit code -11"


def test_a_trial_finds_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTES, "ones", replace(ROUTES["dense"], run=lambda w, x, b: x.new_ones(len(x), w.shape[0])))
    with pytest.raises(SparseGPTError, match=r"ones .* 1 tokens: relative error"):
        trial.try_route("ones", torch.device("cpu"))
    assert trial.failure(lambda: torch.full((2, 3), float("nan")), torch.ones(2, 3)) is not None
    assert trial.failure(lambda: torch.ones(2, 2), torch.ones(2, 3)) == "shape (2, 2) instead of (2, 3)"
    late = torch.ones(2, 3, device="meta")  # raises when it is read, as the result of a kernel that faulted
    assert str(trial.failure(lambda: late, torch.ones(2, 3))).startswith(("RuntimeError", "NotImplementedError"))


def test_candidates_take_turns() -> None:
    order: list[str] = []
    time_in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), 2)
    assert order == ["a", "b"] * 3


def test_disturbed_rounds_do_not_count() -> None:
    assert typical_seconds([(5.0, False), (1.0, False), (9.0, True), (3.0, False), (0.5, True)]) == 3.0
    assert typical_seconds([(5.0, True), (4.0, True)]) == 4.0


def test_decode_rows(tmp_path: Path) -> None:
    register()
    pruned_model().save_pretrained(tmp_path / "dense")
    report = pack_folder(tmp_path / "dense", tmp_path / "packed")
    dense, packed = bench_decode(tmp_path / "dense", tmp_path / "packed", new_tokens=3, rounds=1)
    assert (dense.model, packed.model, dense.speedup) == ("dense", "packed", 1.0)
    assert packed.tokens_per_second > 0 and packed.weight_bytes < dense.weight_bytes
    saved = (report.dense_bytes - report.packed_bytes) // 2  # saved in float32, measured in bfloat16
    assert dense.weight_bytes - packed.weight_bytes == pytest.approx(saved, rel=0.2)
