"""The benchmarks run, measure what they name, and agree with one another; tiny, for the machinery alone."""

import json
from dataclasses import replace

import pytest
import torch

from sparsegpt.checkpoint import write_checked
from sparsegpt.eval import bench_gpu, bench_pipeline, bench_solver
from sparsegpt.eval.bench_quality import LADDER, QualityBench, QualityRow, draw
from sparsegpt.settings import resolve_settings
from sparsegpt.sparsity import parse_sparsity

from .support import refused


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_solver_bench_compares_equal_losses(pattern):
    (row,) = bench_solver.bench_solver(torch.device("cpu"), ((64, 128),), (pattern,), repeats=1)
    assert row.loss_ratio == pytest.approx(1, rel=1e-3)
    assert row.admm_loss_ratio < 1
    assert min(row.textbook_factor, row.textbook_solve, row.factor, row.solve, row.admm) > 0


def test_textbook_factor_is_the_inverse_factor():
    _, hessian = bench_solver.random_layer(4, 32, torch.device("cpu"))
    factor = bench_solver.textbook_inverse_factor(hessian.double())
    damped = hessian.double() + bench_solver.DAMPING * hessian.double().diagonal().mean() * torch.eye(32)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(32, dtype=torch.float64))
    assert torch.equal(factor, factor.triu())


def test_pipeline_bench_measures_both_orders(llama_folder, text_file):
    rows = bench_pipeline.bench_pipeline(str(llama_folder), str(text_file), 2, 32, "cpu")
    assert [row.order for row in rows] == ["block", "linear"]
    assert all(row.seconds > 0 and row.peak_memory_bytes > 2**20 for row in rows)


def test_every_rung_of_the_ladder_resolves():
    for pattern in ("2:4", "0.6"):
        for options in LADDER.values():
            assert resolve_settings(pattern, **options).sparsity == parse_sparsity(pattern)


def test_rows_measured_before_are_kept_and_not_measured_again(llama_folder, text_file, tmp_path, monkeypatch):
    job = QualityBench(str(llama_folder), str(text_file), str(text_file), 2, 16)
    path = tmp_path / "new" / "rows.json"
    assert job.read(path) == []
    first = list(job.run(("magnitude",), ("2:4",)))
    assert [(row.method, row.pattern) for row in first] == [("dense", "-"), ("magnitude", "2:4")]
    job.write(path, first)
    assert job.read(path) == first
    assert list(job.run(("magnitude",), ("2:4",), first)) == []
    more = list(job.run(("magnitude", "wanda"), ("2:4",), first))
    assert [(row.method, row.pattern) for row in more] == [("wanda", "2:4")]
    with refused("rows.json", "seed", "--out"):
        replace(job, seed=1).read(path)
    write_checked(path, {"perplexity": 1.0})  # as in another command's report
    with refused("rows.json", "--out"):
        job.read(path)


def test_figure_has_a_line_a_method(tmp_path):
    rows = [QualityRow("dense", "-", 4.0, 0.0)]
    rows += [QualityRow(m, p, 5.0 + i, 1.0) for i, m in enumerate(("wanda", "admm")) for p in ("2:4", "0.5", "0.6")]
    written = draw(rows, "title", tmp_path / "quality.png")
    assert [path.suffix for path in written] == [".png", ".svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in written[1].read_text()


def test_gpu_bench_rehearsal_writes_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu.GpuBench, "_correctness", lambda self: {"exit_code": 0, "summary": "not run here"})
    job = bench_gpu.GpuBench(torch.device("cpu"), tmp_path, small=True)
    with monkeypatch.context() as patch:
        patch.setattr(bench_gpu, "BUDGET_SECONDS", 1e9)
        results = job.run(lambda part: None)
    assert (tmp_path / "bench-gpu.json").read_text() == json.dumps(results, indent=2) + "\n"
    assert set(results["prune"]) == {"paper", "default"}
    assert results["solver"][0]["loss_ratio"] == pytest.approx(1, rel=1e-3)
    assert {row["kernel"] for row in results["kernels"]["rows"]} >= {"library", "dense"}
