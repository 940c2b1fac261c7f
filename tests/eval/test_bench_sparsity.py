"""`bench sparsity`: each pattern against the dense library, on layers so small that times say nothing."""

import json
from pathlib import Path

import pytest

from sparsegpt.eval.bench import sparsity
from sparsegpt.eval.bench.sparsity import CLAIMED, CSR, LIBRARY, SparsityRow, bench_sparsity, draw_sparsity
from tests.support import refused


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns, told = ("2:4", "0.5", "4:8", "0.99"), []
    rows = list(bench_sparsity(shape=(32, 64), patterns=patterns, tokens=(1, 3), rounds=1, tell=told.append))
    assert [(row.pattern, row.tokens) for row in rows] == [(pattern, count) for pattern in patterns for count in (1, 3)]
    assert told == list(patterns)
    for row in rows:
        assert row.microseconds > 0 and row.huge_pages_microseconds and row.best_dense <= row.library_microseconds
        assert row.route in ("dense", "cpu") and row.claimed == CLAIMED.get({"0.99": 0.99}.get(row.pattern, 0.5))
    with refused("groups of 8"):
        list(bench_sparsity(shape=(32, 36), patterns=["4:8"], tokens=(1,), rounds=1))


def test_weights_have_the_pattern_and_wrong_products_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def candidates(pattern, dense):
        seen[pattern] = dense
        right = {LIBRARY: lambda inputs: inputs @ dense.T, "dense": lambda inputs: inputs @ dense.T}
        return {**right, "cpu": lambda inputs: 2 * inputs @ dense.T, CSR: lambda inputs: 1 / 0}

    monkeypatch.setattr(sparsity, "_candidates", candidates)
    rows = list(bench_sparsity(shape=(64, 256), patterns=["2:4", "1:4", "0.9"], tokens=(2,), rounds=1))
    assert [(row.route, row.csr_microseconds, row.huge_pages_microseconds) for row in rows] == [
        ("dense", None, None)
    ] * 3
    assert (seen["2:4"].unflatten(1, (-1, 4)) != 0).sum(-1).max() == 2
    assert (seen["1:4"].unflatten(1, (-1, 4)) != 0).sum(-1).eq(1).all()
    assert float((seen["0.9"] == 0).float().mean()) == pytest.approx(0.9, abs=0.02)


def test_speed_is_against_the_faster_dense_product() -> None:
    row = SparsityRow("0.9", 1, 300.0, 200.0, 400.0, "cpu", 100.0, (1.5, 2.0))
    assert (row.best_dense, row.speedup, row.csr_speedup) == (200.0, 2.0, 0.5)
    other = SparsityRow("0.9", 1, 300.0, None, None, "cpu", 100.0, None)
    assert (other.best_dense, other.speedup, other.csr_speedup) == (300.0, 3.0, None)


def test_figure(tmp_path: Path) -> None:
    rows = [
        SparsityRow(pattern, count, 300.0, 200.0, None if count == 2 else 400.0, "cpu", 100.0, CLAIMED.get(0.5))
        for pattern in ("2:4", "0.5", "0.9")
        for count in (1, 2)
    ]
    drawn = draw_sparsity(rows, "a layer", tmp_path / "speed.png")
    assert [path.name for path in drawn] == ["speed.png", "speed.svg"] and all(path.stat().st_size for path in drawn)


def test_command(tmp_path: Path, run_cli) -> None:
    small = ("--shape", "32x64", "--patterns", "0.5", "--tokens", "1", "--rounds", "1", "--device", "cpu")
    figure = ("--out", tmp_path / "speed.png")
    (row,) = map(json.loads, run_cli("bench", "sparsity", *small, *figure, "--json").out.splitlines())
    assert row["pattern"] == "0.5" and row["claimed"] == [1.0, 1.2]
    outcome = run_cli("bench", "sparsity", *small, *figure)
    assert "1.0x to 1.2x" in outcome.out and (tmp_path / "speed.svg").is_file()
    assert "expected one layer" in run_cli("bench", "sparsity", "--shape", "32x64,64x64").err
