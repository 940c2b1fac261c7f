"""The benchmarks run, compare like with like, and count bytes as the format says."""

from pathlib import Path

import pytest
import torch

from sparsegpt.kernels import pack, unpack
from sparsegpt.kernels.archive import pack_folder
from sparsegpt.kernels.bench import bench_decode, bench_kernels, random_packed, time_in_turns, typical_seconds
from sparsegpt.kernels.hf import register

from .test_hf import pruned_model


def test_random_weights_are_valid() -> None:
    packed = random_packed((33, 100), torch.bfloat16, torch.device("cpu"))
    dense = unpack(packed)
    again = pack(dense)
    assert dense.shape == (33, 100) and torch.equal(unpack(again), dense)
    assert torch.equal(again.meta[:, :3], packed.meta[:, :3])  # normal values: every kept one is non-zero


def test_kernel_rows() -> None:
    bench = bench_kernels(shapes=[(64, 96), (32, 64)], tokens=(1, 40), rounds=2, copy_bytes=1 << 16)
    assert bench.bandwidth > 0 and bench.device == "cpu"
    found = {(row.kernel, row.dtype, row.rows, row.tokens) for row in bench.rows}
    assert {("library", "bfloat16", 64, 1), ("dense", "float32", 32, 40)} <= found
    for row in bench.rows:
        assert row.microseconds > 0 and row.gigabytes_per_second > 0
        if row.kernel == "library":
            assert row.speedup == row.ceiling == 1 and row.speedup_over_best_dense <= 1
        elif "int" in row.kernel:
            kept = {"cpu int8": 8, "cpu int4": 4}[row.kernel] * row.columns / 2
            scales = 16 * -(-row.columns // 128)
            assert row.ceiling == pytest.approx(16 * row.columns / (kept + row.columns + scales))
        else:
            assert row.ceiling == pytest.approx(16 / 9 if row.dtype == "bfloat16" else 32 / 17)
    for case in {(row.dtype, row.rows, row.tokens) for row in bench.rows}:
        assert sum(row.chosen for row in bench.rows if (row.dtype, row.rows, row.tokens) == case) == 1


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
