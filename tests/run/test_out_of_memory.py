"""A GPU that runs out of memory: the run goes on behind its last finished block with half the micro-batch."""

from dataclasses import replace

import pytest
import torch

from sparsegpt.driver import pipeline
from sparsegpt.driver.groups import GroupSolver
from sparsegpt.model.loading import load_model
from sparsegpt.recovery import training
from sparsegpt.recovery.distill import Distiller
from sparsegpt.run.job import run
from sparsegpt.run.options import RunOptions
from sparsegpt.settings.prune_settings import resolve_settings
from tests.support import refused, save_model, write_text


@pytest.fixture
def options(tmp_path):
    def make(out: str, micro_batch: int) -> RunOptions:
        return RunOptions(
            model=str(save_model(tmp_path / "model")),
            calibration=str(write_text(tmp_path / "text.txt")),
            evaluate=(),
            out=tmp_path / out,
            samples=8,
            sequence_length=16,
            micro_batch=micro_batch,
        )

    return make


def exhausted(monkeypatch, fits) -> list[int]:
    """Let a block's pruning fail unless fits(windows of a micro-batch, block); returns the sizes that were tried."""
    tried = []
    real = pipeline._Driver.prune_block

    def prune_block(self, index):
        tried.append(len(self.streams.pruned[0]))
        if not fits(tried[-1], index):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, index)

    monkeypatch.setattr(pipeline._Driver, "prune_block", prune_block)
    return tried


def weights(folder):
    return load_model(str(folder)).model.state_dict()


def test_from_the_first_block_on_it_is_a_run_with_the_smaller_micro_batch(options, monkeypatch, tmp_path):
    settings = resolve_settings("2:4", rotate="off")  # bases are kept as the larger micro-batch found them
    run(options("expected", 2), settings)
    tried = exhausted(monkeypatch, lambda windows, index: windows <= 2)
    report = run(options("out", 8), settings)
    assert tried == [8, 4, 2, 2]
    assert sum("--micro-batch" in warning for warning in report["warnings"]) == 2
    expected = weights(tmp_path / "expected")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "out").items())


def test_finished_blocks_are_not_pruned_again(options, monkeypatch):
    tried = exhausted(monkeypatch, lambda windows, index: windows <= 4 or index == 0)
    report = run(options("out", 8), resolve_settings("2:4"))
    assert tried == [8, 8, 4]
    assert [block["index"] for block in report["blocks"]] == [0, 1]
    assert len(report["layers"]) == 14


def test_what_a_failed_block_had_reported_is_forgotten(options, monkeypatch):
    real, groups = GroupSolver.prune, []

    def prune(self, *arguments, **keywords):
        groups.append(arguments)
        if len(groups) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(GroupSolver, "prune", prune)
    report = run(options("out", 8), resolve_settings("2:4"))
    names = [layer["name"] for layer in report["layers"]]
    assert len(names) == len(set(names)) == 14


def test_one_window_that_does_not_fit_is_refused(options, monkeypatch):
    exhausted(monkeypatch, lambda windows, index: False)
    with refused("out of memory", "--overwrite", "--seqlen", "--device cpu"):
        run(options("out", 2), resolve_settings("2:4"))


def distillation_that_fits(monkeypatch, most: int) -> list[int]:
    """Let steps of distillation fail with more than `most` windows; returns the windows of each step."""
    steps, real = [], Distiller.step

    def step(self, batch, number, rate):
        steps.append(len(batch[0]))
        if steps[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, number, rate)

    monkeypatch.setattr(training, "TOKENS_PER_BATCH", 4 * 16)  # four windows
    monkeypatch.setattr(Distiller, "step", step)
    return steps


def test_a_distillation_that_ran_out_of_memory_begins_anew_with_half_its_windows(options, monkeypatch):
    """What it is compared with at the end, too: the loss before it, on the windows that are held out now."""
    settings = resolve_settings("2:4", "paper", distill=1)
    steps = distillation_that_fits(monkeypatch, 2)
    report = run(options("out", 8), settings)
    assert steps == [4, 2, 2, 2]  # not with a micro-batch of four, which would change nothing; two windows held out
    expected = run(options("expected", 2), settings)
    assert [epoch["loss"] for epoch in report["epochs"]] == pytest.approx(
        [epoch["loss"] for epoch in expected["epochs"]], rel=1e-3
    )


def test_a_window_that_does_not_fit_into_distillation_is_refused_with_a_way_on(options, monkeypatch, tmp_path):
    distillation_that_fits(monkeypatch, 0)
    with refused("out of memory", "--resume --distill 0", "--seqlen"):
        run(options("out", 4), resolve_settings("2:4", distill=1))
    plain = resolve_settings("2:4")
    report = run(replace(options("out", 4), resume=True), plain)
    assert report["epochs"] == []
    run(options("expected", 4), plain)
    expected = weights(tmp_path / "expected")
    close = {
        name: torch.allclose(tensor, expected[name], atol=1e-3) for name, tensor in weights(tmp_path / "out").items()
    }
    assert all(close.values())
