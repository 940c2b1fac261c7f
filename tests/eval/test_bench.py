"""The benchmarks run, measure what they name, and agree with one another; tiny, for the machinery alone."""

import json
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsegpt.cli.bench_commands import bench_gpu_command
from sparsegpt.eval.bench import gpu as bench_gpu
from sparsegpt.eval.bench import pipeline as bench_pipeline
from sparsegpt.eval.bench import solver as bench_solver
from sparsegpt.eval.bench.quality import LADDER, QualityBench, QualityRow, draw, draw_bytes
from sparsegpt.eval.bench.tables import gpu_tables, integers_table, texts_table
from sparsegpt.eval.perplexity import score_text
from sparsegpt.files.checked_json import write_checked
from sparsegpt.model.loading import load_model
from sparsegpt.settings.prune_settings import resolve_settings
from sparsegpt.sparsity import parse_sparsity
from tests.support import refused


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


def test_pipeline_bench_measures_both_orders(llama_folder, text_file, forked, monkeypatch):
    """Its two processes are forked off one that has the libraries."""
    run = SimpleNamespace(run=lambda command, **_: forked.run(*command[1:]))
    monkeypatch.setattr(bench_pipeline, "subprocess", run)
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
    with refused("rows.json", "seed", "give another file"):
        replace(job, seed=1).read(path)
    write_checked(path, {"perplexity": 1.0})  # as in another command's report
    with refused("rows.json", "give another file"):
        job.read(path)


def test_rows_on_grids_know_their_bytes_and_have_a_table_and_a_figure(llama_folder, text_file, tmp_path):
    job = QualityBench(str(llama_folder), str(text_file), str(text_file), 2, 16)
    options = {"grids": ("none", "int4:32"), "quantizers": ("rtn", "awq")}
    rows = list(job.run(("fast",), ("0", "2:4"), **options))
    assert [row.asked[1:] for row in rows] == [
        ("-", "none", ""),
        ("0", "int4:32", "rtn"),
        ("0", "int4:32", "awq"),
        ("2:4", "none", ""),
        ("2:4", "int4:32", "rtn"),
        ("2:4", "int4:32", "awq"),
    ]
    assert [row.bits for row in rows] == [16, 4.5, 4.5, 9, 3.5, 3.5]
    assert list(job.run(("fast",), ("0", "2:4"), rows, **options)) == []
    table = integers_table(rows)
    assert (table.row_count, [column.header for column in table.columns][-2:]) == (2, ["rtn", "awq"])
    written = draw_bytes(rows, "title", tmp_path / "bytes.png")
    assert "<svg" in written[1].read_text() and written[0].read_bytes().startswith(b"\x89PNG")


def test_several_texts_are_scored_and_have_a_table_of_their_own(llama_folder, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    job = QualityBench(str(llama_folder), str(text_file), f"{text_file},{other}", 2, 16)
    rows = list(job.run(("magnitude",), ("2:4",)))
    dense, loaded = rows[0], load_model(str(llama_folder))
    expected = [score_text(loaded.model, loaded.tokenizer, str(text), 16).perplexity for text in (text_file, other)]
    assert [dense.perplexity, dense.elsewhere[str(other)]] == expected
    job.write(tmp_path / "rows.json", rows)
    assert job.read(tmp_path / "rows.json") == rows


def test_the_table_of_texts_says_which_share_of_the_gap_is_closed():
    rows = [
        QualityRow("dense", "-", 10.0, 0.0, elsewhere={"a/b.txt": 20.0}),
        QualityRow("paper", "2:4", 30.0, 1.0, elsewhere={"a/b.txt": 40.0}),
        QualityRow("fast", "2:4", 20.0, 1.0, elsewhere={"a/b.txt": 35.0}),
    ]
    table = texts_table(rows, "home")
    assert [column.header for column in table.columns] == ["pattern", "method", "home", "b.txt"]
    cells = [list(column.cells) for column in table.columns]
    assert cells[2:] == [["10.00", "30.00 (0%)", "20.00 (50%)"], ["20.00", "40.00 (0%)", "35.00 (25%)"]]


def test_figure_has_a_line_a_method(tmp_path):
    rows = [QualityRow("dense", "-", 4.0, 0.0)]
    rows += [QualityRow(m, p, 5.0 + i, 1.0) for i, m in enumerate(("wanda", "admm")) for p in ("2:4", "0.5", "0.6")]
    written = draw(rows, "title", tmp_path / "quality.png")
    assert [path.suffix for path in written] == [".png", ".svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in written[1].read_text()


@pytest.mark.parametrize("part", list(bench_gpu.PARTS))
def test_gpu_bench_measures_what_its_tables_show(part):
    *_, found = bench_gpu.PARTS[part](torch.device("cpu"), True)
    found = json.loads(json.dumps(found))  # as it comes from a process of its own
    empty = {"failed": "nothing yet"}
    results = {"date": "today", "device": "cpu", "versions": {"torch": "2"}, "correctness": {"summary": "1 passed"}}
    results |= {name: found if name == part else empty for name in bench_gpu.PARTS}
    first, tests, table = gpu_tables(results)
    assert first == "today, cpu, torch 2." and tests.endswith("1 passed")
    if part == "kernels":
        assert {row["kernel"] for row in found["rows"]} >= {"library", "dense"} and found["failures"] == []
        assert table.row_count == len(found["rows"]) and found["measured"]
    elif part == "solver":
        assert [row["pattern"] for row in found["rows"]] == ["2:4", "0.5"] and table.row_count == 2
        assert found["rows"][0]["loss_ratio"] == pytest.approx(1, rel=1e-3)
    else:
        assert set(found) == {"shape", "paper", "default"} and table.row_count == 2
        assert found["paper"]["seconds"]["total"] >= found["paper"]["seconds"]["capture"] > 0


def test_gpu_bench_keeps_what_a_part_measured_before_it_crashed_or_hung(tmp_path, monkeypatch):
    """Parts are processes: their exit, their faults and their hanging cost nobody else anything."""
    keep = "import pathlib, sys, time, subprocess; pathlib.Path(sys.argv[1]).write_text('{\"rows\": [1]}'); "
    child = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(child.pid, flush=True);"
    )
    scripts = {
        "correctness": "print('5 passed')",
        "kernels": keep + "print('torch.AcceleratorError: CUDA error'); print('advice'); sys.exit(1)",
        "solver": keep + child + "time.sleep(60)",
        "prune": keep,
    }
    monkeypatch.setattr(bench_gpu, "DEADLINES", {"correctness": 9, "kernels": 19, "solver": 4, "prune": 29})
    job = bench_gpu.GpuBench(torch.device("cpu"), tmp_path)
    monkeypatch.setattr(job, "_command", lambda name, kept: [sys.executable, "-c", scripts[name], str(kept)])
    parts = []
    results = job.run(parts.append)
    assert parts == list(scripts) and json.loads((tmp_path / "bench-gpu.json").read_text()) == results
    assert results["correctness"] == {"summary": "5 passed"}
    assert results["kernels"] == {"rows": [1], "failed": "torch.AcceleratorError: CUDA error"}
    assert results["solver"]["rows"] == [1] and re.fullmatch(r"not done after \d s", results["solver"]["failed"])
    assert results["prune"] == {"rows": [1]}
    assert not process_lives(int((tmp_path / "solver.log").read_text()))
    assert {path.name for path in tmp_path.iterdir()} == {"bench-gpu.json", *(f"{name}.log" for name in scripts)}


def process_lives(pid: int) -> bool:
    try:
        return " Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except FileNotFoundError:
        return False


def test_ctrl_c_ends_a_part_of_the_gpu_bench_too(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 2)
        script = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
        with pytest.raises(KeyboardInterrupt):
            bench_gpu._run_for([sys.executable, "-c", script], tmp_path / "part.log", 30)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not process_lives(int((tmp_path / "part.log").read_text()))


def test_gpu_bench_as_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_gpu, "DEADLINES", {"correctness": 0, "kernels": 0, "solver": 120, "prune": 0})
    with refused("correctness failed: not done after 0 s, see", "kernels failed", "prune failed"):
        bench_gpu_command(device="cpu", out=tmp_path, small=True)
    printed = capsys.readouterr().out
    assert "\n\n| layer     | pattern |" in printed and printed == (tmp_path / "bench-gpu.md").read_text()
