"""`run --log-json`: every line is an object, and there is one for each block and linear."""

import io
import json

from sparsegpt.counting import StepReport
from sparsegpt.listeners.json_log import JsonLog


def test_every_line_is_json_and_every_block_is_there(run_cli, llama_folder, text_file, tmp_path):
    words = ["run", "--model", llama_folder, "--sparsity", "2:4", "--preset", "paper", "--calib", text_file]
    words += ["--eval", text_file, "--samples", 4, "--seqlen", 16, "--eval-windows", 2, "--out", tmp_path / "out"]
    words += ["--batch-size", 1, "--reconstruct", 2, "--distill", 3]
    found = [json.loads(line) for line in run_cli(*words, "--log-json").out.splitlines()]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    blocks = [line for line in found if line["event"] == "block"]
    assert [line["index"] for line in blocks] == [0, 1]
    assert blocks[-1]["seconds_left"] == 0
    assert blocks[0]["seconds_left"] == blocks[0]["seconds"]
    assert [line["name"] for line in found if line["event"] == "layer"] == [row["name"] for row in report["layers"]]
    scores = {line["model"]: line["perplexity"] for line in found if line["event"] == "scored"}
    assert scores == report["perplexity"][str(text_file)]
    # Four windows of 16 tokens are one step of an epoch.
    told = {part: [] for part in [f"scoring the {which} model on {text_file}" for which in ("dense", "pruned")]}
    told |= {f"training {part}": [] for part in ("model.layers.0", "model.layers.1", "the model")}
    for line in found:
        if line["event"] == "step":
            told[line["part"]].append((line["done"], line["total"]))
    assert [(steps[0], steps[-1]) for steps in told.values()] == [((0, n), (n, n)) for n in (2, 2, 2, 2, 3)]
    run_cli(*words, "--log-json", "--quiet", "--overwrite").refused("--log-json", "--quiet")


def test_steps_are_told_once_a_second_and_where_a_part_begins_and_ends():
    shown = io.StringIO()
    log = JsonLog(shown)
    for part in "ab":
        for done in range(31):
            log.step(StepReport(part, "windows", done, 30, done / 4))
    found = [json.loads(line) for line in shown.getvalue().splitlines()]
    assert [line["done"] for line in found] == 2 * [0, 4, 8, 12, 16, 20, 24, 28, 30]
    assert [line["seconds_left"] for line in found[:3]] == [None, 6.5, 5.5]
    assert found[0] == {
        "event": "step",
        "part": "a",
        "unit": "windows",
        "done": 0,
        "total": 30,
        "seconds": 0,
        "seconds_left": None,
    }
