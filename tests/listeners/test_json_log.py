"""`run --log-json`: every line is an object, and there is one for each block and linear."""

import json


def test_every_line_is_json_and_every_block_is_there(run_cli, llama_folder, text_file, tmp_path):
    words = ["run", "--model", llama_folder, "--sparsity", "2:4", "--preset", "paper", "--calib", text_file]
    words += ["--eval", text_file, "--samples", 4, "--seqlen", 16, "--eval-windows", 2, "--out", tmp_path / "out"]
    found = [json.loads(line) for line in run_cli(*words, "--log-json").out.splitlines()]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    blocks = [line for line in found if line["event"] == "block"]
    assert [line["index"] for line in blocks] == [0, 1]
    assert blocks[-1]["seconds_left"] == 0
    assert blocks[0]["seconds_left"] == blocks[0]["seconds"]
    assert [line["name"] for line in found if line["event"] == "layer"] == [row["name"] for row in report["layers"]]
    scores = {line["model"]: line["perplexity"] for line in found if line["event"] == "scored"}
    assert scores == report["perplexity"][str(text_file)]
    run_cli(*words, "--log-json", "--quiet", "--overwrite").refused("--log-json", "--quiet")
