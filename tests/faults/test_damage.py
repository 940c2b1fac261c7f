"""Truncated and bit-flipped files: one line or a correct result, never a traceback, never silently other weights."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch

from sparsegpt.files.results import is_whole
from tests.faults.jobs import everything, finished_blocks, work_folder
from tests.support import assert_pattern, save_tokenizer, tiny_model


def damage(path: Path, chance: random.Random) -> str:
    """Damage a file in one of the ways in which disks and copies do; says how."""
    content = bytearray(path.read_bytes())
    how = chance.choice(("flip", "flip", "flip", "truncate", "zeros", "grow"))
    place = chance.randrange(len(content)) if chance.random() < 0.5 else chance.randrange(min(3000, len(content)))
    if how == "flip":
        content[place] ^= 1 << chance.randrange(8)
    elif how == "truncate":
        del content[place:]
    elif how == "zeros":
        content[place : place + 4096] = bytes(len(content[place : place + 4096]))
    else:
        content += b"\0" * 7
    path.write_bytes(content)
    return f"{how} at {place} of {path.name}"


def check_pattern(out: Path, *, exactly: bool = True) -> None:
    """Every layer that the report lists keeps 2:4, in all shards; not exactly: some weights were zero before."""
    tensors = {}
    for path in out.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(path)
    layers = json.loads((out / "report.json").read_text())["layers"]
    assert layers
    for layer in layers:
        weight = tensors[f"{layer['name']}.weight"]
        assert weight.isfinite().all()
        assert ((weight != 0).reshape(-1, 4).sum(1) <= 2).all()
        if exactly:
            assert_pattern(weight, "2:4")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "model"
    tiny_model("llama").save_pretrained(folder, max_shard_size="30KB")
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("cases", [3, pytest.param(60, marks=pytest.mark.faults)])
def test_a_damaged_model_folder_is_refused_or_gives_exact_patterns(tiny_job, sharded, tmp_path, cases, seed):
    chance = random.Random(seed)
    names = sorted(path.name for path in sharded.iterdir())
    seen: Counter[str] = Counter()
    for case in range(cases):
        folder, out = tmp_path / "model", tmp_path / "out"
        shutil.copytree(sharded, folder)
        done = damage(folder / names[case % len(names)], chance)
        where = f"seed {seed}, case {case}: {done}"
        outcome = tiny_job.run(out, model=folder, method="wanda")
        try:
            if outcome.refused_or_done():
                check_pattern(out, exactly=not done.startswith("zeros"))
            else:
                assert not out.exists()
                assert finished_blocks(out) != 0  # a huge weight of a later block shows when its turn comes
        except AssertionError as error:
            raise AssertionError(where) from error
        seen["done" if outcome.code == 0 else "refused"] += 1
        shutil.rmtree(folder)
        for leftover in (out, work_folder(out)):
            shutil.rmtree(leftover, ignore_errors=True)
    print(f"\n{cases} damaged model folders, seed {seed}: {dict(seen)}")


@pytest.fixture(scope="module")
def unfinished(tiny_job, tmp_path_factory):
    """A run killed while it writes its third block."""
    folder = tmp_path_factory.mktemp("unfinished")
    out, calls = folder / "out", folder / "calls"
    fault = {"root": str(folder), "calls": str(calls)}
    assert tiny_job.run(out, fault=fault | {"kind": "count", "at": -1}).code == 0
    shutil.rmtree(out)
    made = calls.read_text().splitlines()
    # Bases, and what is outside of the blocks in them, are written before: three files.
    third = [place for place, call in enumerate(made) if "tensors.writing/" in call and call.startswith("open")][5]
    assert tiny_job.run(out, fault=fault | {"kind": "kill", "at": third}).code == -9
    assert finished_blocks(out) == 2
    return work_folder(out)


@pytest.mark.parametrize("cases", [3, pytest.param(60, marks=pytest.mark.faults)])
def test_a_damaged_unfinished_run_is_refused_or_ends_with_the_same_bits(tiny_job, unfinished, tmp_path, cases, seed):
    chance = random.Random(seed)
    names = ["state.json", "block-00000.safetensors", "block-00001.safetensors"]
    out = tmp_path / "out"
    seen: Counter[str] = Counter()
    for case in range(cases):
        shutil.copytree(unfinished, work_folder(out))
        done = damage(work_folder(out) / names[case % len(names)], chance)
        try:
            outcome = tiny_job.run(out, "--resume")
            seen["done" if outcome.code == 0 else "refused"] += 1
            if outcome.code:
                outcome.refused("state.json", "--overwrite")
                assert (work_folder(out) / "block-00001.safetensors").exists()
                outcome = tiny_job.run(out, "--overwrite")
                assert outcome.code == 0, outcome.err
            tiny_job.check(out)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, case {case}: {done}") from error
        shutil.rmtree(out)
    print(f"\n{cases} damaged unfinished runs, seed {seed}: {dict(seen)}")


@pytest.mark.parametrize("cases", [3, pytest.param(50, marks=pytest.mark.faults)])
def test_a_damaged_result_is_noticed_by_resume_and_breaks_no_command(tiny_job, forker, tmp_path, cases, seed):
    chance = random.Random(seed)
    reference, text = tmp_path / "reference", tiny_job.flags["calib"]
    assert tiny_job.run(reference).code == 0
    names = ["model.safetensors", "report.json", "config.json", "tokenizer.json", "generation_config.json"]
    out = tmp_path / "out"
    seen: Counter[str] = Counter()
    for case in range(cases):
        shutil.copytree(reference, out)
        done = damage(out / names[case % len(names)], chance)
        try:
            for command in (["inspect", out], ["eval", "--model", out, "--data", text, "--eval-windows", 2]):
                outcome = forker.run(command)
                seen[f"{command[0]} {outcome.code}"] += 1
                outcome.refused_or_done()
            outcome = tiny_job.run(out, "--resume")
            if is_whole(out):  # weights of their old length: their checksums tell
                outcome.refused("not empty", "--overwrite")
                assert tiny_job.run(out, "--resume", "--overwrite").code == 0
                tiny_job.check(out)
            else:  # nobody knows whether a disk or its owner has changed it
                before = everything(out)
                outcome.refused(names[case % len(names)], "changed since")
                tiny_job.run(out, "--resume", "--overwrite").refused("changed since")
                assert everything(out) == before
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, case {case}: {done}") from error
        shutil.rmtree(out)
    print(f"\n{cases} damaged results, seed {seed}: {dict(seen)}")
