"""Several processes prune one model as one process does: the same masks, and the same bits on every rank.

One pair of ranks does everything that is looked at here, as they wait for one another anyway.
"""

import copy
import functools
import os
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from sparsegpt import NM, Method, SparseGPTError
from sparsegpt.driver import ranks as ranks_module
from sparsegpt.driver.ranks import Group, Ranks
from sparsegpt.driver.stages import Matrix, share_out
from sparsegpt.eval.perplexity import score
from sparsegpt.run.job import Listener, run
from sparsegpt.run.options import RunOptions
from sparsegpt.settings.prune_settings import resolve_settings
from sparsegpt.solvers.correction import DriftAccumulator
from sparsegpt.solvers.hessian import HessianAccumulator
from tests.ranks import on_ranks
from tests.support import (
    CHILD_ENVIRONMENT,
    assert_pattern,
    block_linears,
    prune_model,
    random_windows,
    refused,
    save_model,
    tiny_model,
    weights_of,
    write_text,
)

WORLD = 2


def by_columns(weight: Tensor, hessian: object) -> Tensor:
    """A saliency for which all rows must be there."""
    return weight.abs() / weight.abs().sum(0).clamp_min(1e-9)


MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
# What is pruned: model, pattern, options.
CASES = {
    "magnitude": ("llama", "50%", {"method": "magnitude"}),
    "wanda": ("opt", "50%", {"method": "wanda", "preset": "paper"}),
    "paper": ("llama", "2:4", {"preset": "paper"}),
    "layer threshold": ("llama", "50%", {"preset": "paper", "allocation": "owl"}),
    "row threshold, refitted": ("llama", "50%/row", {"method": "sparsegpt+refit", "error_correction": 0.5}),
    "corrected admm": ("llama", "2:4", {}),
    "rotated": ("llama", "2:4", {"rotate": "all", "preset": "fast"}),
    "rotated mixture": ("mixtral", "2:4", {"rotate": "all", "preset": "fast"}),
    "rotated, with head": ("llama", "2:4", {"rotate": "values", "include_head": True, "preset": "fast"}),
    "integers": ("llama", "2:4", {"quantize": "int4:16", "preset": "paper"}),
    "scaled inputs": ("llama", "2:4", {"quantize": "int4:16", "quantizer": "awq", "preset": "paper"}),
    "own method": ("llama", "2:4", {"method": Method("own", saliency=by_columns)}),
    "mixture": ("mixtral", "2:4", {}),
    "mixture in block order": ("mixtral", "50%", {"preset": "paper"}),
    "trained": ("llama", "2:4", {"reconstruct": 1, "distill": 2, "micro_batch": 4}),
}
RUN = resolve_settings("2:4", "default", method="sparsegpt", rotate="off")


@functools.cache
def model_of(kind: str) -> nn.Module:
    return tiny_model(kind, **(MIXTURE if kind == "mixtral" else {}))


def pruned(case: str, windows: Tensor) -> tuple[dict[str, Tensor], list[tuple[str, float]], list[str]]:
    kind, sparsity, options = CASES[case]
    model = copy.deepcopy(model_of(kind))
    report = prune_model(model, windows, sparsity, **options)
    return weights_of(model), [(layer.name, layer.relative_error) for layer in report.layers], report.warnings


def message(call) -> str:
    with pytest.raises(SparseGPTError) as caught:
        call()
    return str(caught.value)


class Stop(Listener):
    """Ends a run behind its first block, as Ctrl-C does."""

    def block(self, report):
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    save_model(folder / "model", "llama")
    write_text(folder / "text.txt")
    return folder


def options(folders, name: str, **changes) -> RunOptions:
    given = {"samples": 6, "sequence_length": 16, "micro_batch": 2, "eval_windows": 6, **changes}
    text = str(folders / "text.txt")
    return RunOptions(str(folders / "model"), text, (text,), folders / name, **given)


@pytest.fixture(scope="module")
def found(folders):
    """What each of two ranks has to tell."""
    windows = random_windows(24)

    def work(rank: int) -> dict[str, object]:
        team, told = Ranks.here(), {}
        mine = windows[rank::WORLD]
        told |= {case: pruned(case, mine) for case in CASES}
        told["again"] = pruned("corrected admm", mine)
        told["sums"] = sums(team, rank)
        told["score"] = score(model_of("llama"), windows.flatten(), 16, batch_size=5, max_windows=11, ranks=team)
        told["refusals"] = {
            "settings": message(lambda: prune_model(copy.deepcopy(model_of("llama")), mine, f"{rank + 1}:4")),
            "models": message(lambda: prune_model(tiny_model("llama", seed=rank), mine, "2:4")),
            "too few": message(lambda: run(options(folders, "few", samples=1), RUN, None, team)),
            "unequal": message(lambda: prune_model(copy.deepcopy(model_of("llama")), mine[rank:], "2:4", distill=1)),
            "of rank 0": message(lambda: team.first(lambda: refuse("no"))),
        }
        told["report"] = run(options(folders, "two"), RUN, None, team)
        with pytest.raises(KeyboardInterrupt):
            run(options(folders, "stopped"), RUN, Stop(), team)
        return told

    return on_ranks(WORLD, work)


def refuse(text: str) -> None:
    raise SparseGPTError(text)


def sums(team: Ranks, rank: int) -> tuple[Tensor, int, Tensor, list[Tensor | None]]:
    """The Hessian, its tokens and a drift, of inputs of each rank; gradients, one of which rank 1 alone has."""
    inputs = random_inputs(rank)
    gram, drift = HessianAccumulator(700), DriftAccumulator()
    gram.add(inputs)
    drift.add_residual(2 * inputs[:, :3], inputs[:, :3], inputs)
    team.add_up(gram, drift)
    gradients = [torch.tensor([1.0 + rank]), torch.tensor([4.0]) if rank else None, None]
    return gram.take(), gram.tokens, drift.residual, team.average(gradients, [torch.zeros(1)] * 3)


def random_inputs(rank: int) -> Tensor:
    return torch.randn(5 + rank, 700, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_end_with_the_same_bits_and_with_the_masks_of_one_process(case, found):
    (ours, errors, warnings), (theirs, *others) = found[0][case], found[1][case]
    assert [errors, warnings] == others
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    alone, expected, _ = pruned(case, random_windows(24))
    assert [name for name, _ in errors] == [name for name, _ in expected]
    assert [error for _, error in errors] == pytest.approx([error for _, error in expected], rel=1e-3)
    for name in ours:
        assert torch.equal(ours[name] == 0, alone[name] == 0), name
        torch.testing.assert_close(ours[name], alone[name], rtol=1e-3, atol=1e-4)


def test_patterns_are_exact(found):
    weights = found[0]["corrected admm"][0]
    for name in block_linears(model_of("llama")):
        assert_pattern(weights[f"{name}.weight"], NM(2, 4))


def test_the_same_ranks_give_the_same_bits_again(found):
    once, again = found[0]["corrected admm"], found[0]["again"]
    assert all(torch.equal(once[0][name], again[0][name]) for name in once[0])


def test_sums_are_those_of_all_inputs(found):
    inputs = torch.cat([random_inputs(rank).double() for rank in range(WORLD)])
    for told in found:
        gram, tokens, residual, gradients = told["sums"]
        assert tokens == len(inputs)
        torch.testing.assert_close(gram.double(), inputs.T @ inputs, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(residual.double(), inputs[:, :3].T @ inputs, rtol=1e-5, atol=1e-4)
        assert gradients == [torch.tensor([1.5]), torch.tensor([2.0]), None]


def test_a_shared_score_has_the_bits_of_one_process(found):
    alone = score(model_of("llama"), random_windows(24).flatten(), 16, batch_size=5, max_windows=11)
    assert [told["score"] for told in found] == [alone] * WORLD


@pytest.mark.parametrize(
    ("what", "fragments"),
    [
        ("settings", ("ranks differ", "settings", "1:4", "on rank 0", "2:4", "on rank 1")),
        ("models", ("ranks differ", "weights", "on rank 1")),
        ("too few", ("2 ranks", "1 calibration windows")),
        ("unequal", ("2 ranks", "equal shares", "multiple of 2")),
        ("of rank 0", ("no",)),
    ],
)
def test_every_rank_refuses_what_one_must(what, fragments, found):
    for told in found:
        assert all(fragment in told["refusals"][what] for fragment in fragments), told["refusals"][what]


def test_a_run_of_two_ranks_is_that_of_one(found, folders):
    alone = run(options(folders, "one"), RUN)
    shared = found[0]["report"]
    assert (alone["ranks"], shared["ranks"]) == (1, WORLD)
    assert [layer["zeros"] for layer in shared["layers"]] == [layer["zeros"] for layer in alone["layers"]]
    text = str(folders / "text.txt")
    assert shared["perplexity"][text]["dense"] == alone["perplexity"][text]["dense"]
    assert shared["perplexity"][text]["pruned"] == pytest.approx(alone["perplexity"][text]["pruned"], rel=1e-3)
    assert found[1]["report"]["identity"] == alone["identity"]


def test_one_process_goes_on_where_two_have_stopped_and_says_so(found, folders):
    report = run(options(folders, "stopped", resume=True), RUN)
    assert any("ranks 2 then, 1 now" in warning for warning in report["warnings"])
    whole = found[0]["report"]
    assert [layer["zeros"] for layer in report["layers"]] == [layer["zeros"] for layer in whole["layers"]]


# Ends


def lost(rank: int) -> str | None:
    """Rank 1 leaves while rank 0 waits for it."""
    team = Ranks.here()
    if rank:
        os._exit(0)
    return message(lambda: team.gather(rank))


def waited(rank: int) -> str | None:
    """Rank 1 sleeps for longer than rank 0 waits."""
    ranks_module.GRACE = 0.1
    team = Group(patience=1 / 60)
    if rank:
        time.sleep(3)
        os._exit(0)
    return message(lambda: team.gather(rank))


def test_a_rank_that_is_gone_is_named():
    assert "rank 1 on" in on_ranks(WORLD, lost)[0]


def test_a_rank_that_hangs_is_named_with_the_time_limit():
    told = on_ranks(WORLD, waited, seconds=1)[0]
    assert "rank 1 did not answer" in told
    assert "time limit is 0.0166667 minutes" in told


# Who does what


class Three(Ranks):
    """Three ranks as far as dealing goes."""

    world = 3
    split, whole = Group.split, Group.whole
    alone = Ranks()


def rows(share) -> list[int]:
    return [part.stop - part.start for part in share.parts]


def test_one_process_solves_everything():
    shares = share_out([{"a": Matrix(5, 4, True)}, {"b": Matrix(3, 8, False)}], Ranks())
    assert {name: (share.rows, rows(share)) for name, share in shares.items()} == {"a": (5, [5]), "b": (3, [3])}


def test_rows_of_a_wide_input_are_split_and_bound_ones_stay_together():
    stage = [{"free": Matrix(1000, 4, True), "bound": Matrix(1000, 4, False), "other": Matrix(900, 4, False)}]
    shares = {name: rows(share) for name, share in share_out(stage, Three()).items()}
    assert shares == {"free": [333, 333, 334], "bound": [1000, 0, 0], "other": [0, 900, 0]}


def test_experts_go_whole_to_the_ranks():
    """Six inputs for three ranks: two each, and no Hessian is factored twice."""
    stage = [{f"up{k}": Matrix(64, 64, True), f"gate{k}": Matrix(64, 64, True)} for k in range(6)]
    shares = share_out(stage, Three())
    owners = [rows(shares[f"up{k}"]).index(64) for k in range(6)]
    assert sorted(owners) == [0, 0, 1, 1, 2, 2]
    assert owners == [rows(shares[f"gate{k}"]).index(64) for k in range(6)]


def test_fewer_rows_than_ranks_are_for_one():
    assert rows(share_out([{"gate": Matrix(2, 4, True)}], Three())["gate"]) == [2, 0, 0]


# Places


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_refused_on_every_rank():
    with refused("cuda", settings=("device",)):
        Group.place(Three(), "cuda")
    assert Group.place(Three(), "auto") == "auto"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_compute_on_two_gpus(folders):
    """By nccl, each on the GPU of its number; one process on one GPU chooses the same weights."""
    words = ["run", "--model", folders / "model", "--calib", folders / "text.txt", "--eval", "none", "--samples", 6]
    words += ["--seqlen", 16, "--sparsity", "2:4", "--preset", "paper", "--device", "cuda", "--quiet"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2]
    for name, launcher in (("gpus", torchrun), ("gpu", [])):
        command = [sys.executable, *launcher, "-m", "sparsegpt", *words, "--out", folders / name]
        subprocess.run(list(map(str, command)), check=True, env=CHILD_ENVIRONMENT)
    two, one = (safetensors.torch.load_file(folders / name / "model.safetensors") for name in ("gpus", "gpu"))
    off = sum(int(((two[name] == 0) != (one[name] == 0)).sum()) for name in one)
    assert off <= 0.001 * sum(tensor.numel() for tensor in one.values())
