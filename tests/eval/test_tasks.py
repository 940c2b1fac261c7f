"""Tasks by lm-eval: a small one made of this repository's own text, against a computation of our own."""

import json
import re
from pathlib import Path

import pytest
import torch

from sparsegpt.eval import tasks
from sparsegpt.eval.tasks import load_tasks, score_tasks
from sparsegpt.model.loading import load_model
from tests.support import every_task, in_short, refused

pytest.importorskip("lm_eval", reason="the extra `tasks` is not installed")

PAGE = Path(__file__).parents[2] / "docs" / "how-it-works.md"
QUESTIONS = 24
YAML = """
task: how-it-goes-on
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: right
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def questions():
    """Sentences of the page, each with its own second half and that of the two before it."""
    prose = re.sub(r"```.*?```|\|[^\n]*", "", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    words = [sentence.split() for sentence in prose.split(". ") if len(sentence.split()) > 9][:QUESTIONS]
    ends = [" " + " ".join(sentence[5:]) for sentence in words]
    return [
        {"start": " ".join(sentence[:5]), "ends": [ends[index - 1], ends[index], ends[index - 2]], "right": 1}
        for index, sentence in enumerate(words)
    ]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions()))
    (folder / "task.yaml").write_text(YAML.format(data=folder / "data.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield folder


@torch.no_grad()
def own_accuracy(model, tokenizer):
    """Of each question the end with the largest sum of log-probabilities, one token after the other."""
    right = 0
    for row in questions():
        start = tokenizer(row["start"], add_special_tokens=False)["input_ids"]
        sums = []
        for end in row["ends"]:
            whole = tokenizer(row["start"] + end, add_special_tokens=False)["input_ids"]
            log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(log_p[place - 1, whole[place]]) for place in range(len(start), len(whole))))
        right += sums.index(max(sums)) == row["right"]
    return right / len(questions())


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, task_folder):
    """The demo at 2:4, its report with the task, and the same folder packed."""
    from sparsegpt.cli.commands import app

    folder = tmp_path_factory.mktemp("pruned")
    words = ["run", "--sparsity", "2:4", "--preset", "paper", "--samples", "4", "--seqlen", "64", "--eval", "none"]
    words += ["--eval-tasks", "how-it-goes-on", "--include-path", str(task_folder), "--quiet"]
    app([*words, "--bos", "never", "--out", str(folder / "plain")], standalone_mode=False)
    app(["pack", str(folder / "plain"), str(folder / "packed")], standalone_mode=False)
    return folder


def test_accuracy_is_that_of_a_computation_of_our_own(pruned):
    found = json.loads((pruned / "plain" / "report.json").read_text())["tasks"]["how-it-goes-on"]["acc"]
    for which, name in (("dense", "demo"), ("pruned", str(pruned / "plain"))):
        loaded = load_model(name)
        accuracy = own_accuracy(loaded.model, loaded.tokenizer)
        assert found[which]["value"] == pytest.approx(accuracy)
        spread = (accuracy * (1 - accuracy) / (len(questions()) - 1)) ** 0.5
        assert found[which]["stderr"] == pytest.approx(spread)
    assert 1 / 3 < found["dense"]["value"] < 1


def test_packed_scores_as_unpacked(pruned, task_folder, run_cli):
    words = ("--tasks", "how-it-goes-on", "--include-path", task_folder, "--bos", "never", "--json")
    rows = [json.loads(run_cli("eval", "--model", pruned / name, *words).out) for name in ("plain", "packed")]
    assert rows[0] == rows[1]
    assert rows[0][0]["task"] == "how-it-goes-on"


def test_a_limit_takes_the_first_questions_and_every_answer_is_told(task_folder):
    loaded = load_model("demo")
    tasks = load_tasks(["how-it-goes-on"], task_folder, 4)
    told = []
    steps = {"batch_size": 3, "counted": lambda *counts: told.append(counts)}
    (score,) = score_tasks(loaded.model, loaded.tokenizer, tasks, **steps)
    assert told == [(done, 4 * 3) for done in range(4 * 3 + 1)]  # three ends each
    assert score.value in (0, 0.25, 0.5, 0.75, 1)
    assert load_tasks([]) is None
    assert score_tasks(loaded.model, loaded.tokenizer, None) == ()


def test_a_task_that_needs_the_network_is_refused(tmp_path):
    (tmp_path / "far.yaml").write_text(YAML.format(data="x").replace("path: json", "path: org/far-away"))
    with refused("far-away", "go online once", settings=["tasks"]):
        load_tasks(["how-it-goes-on"], tmp_path)


def test_what_is_wrong_with_tasks_is_said_before_the_model_is_loaded(task_folder, tmp_path, run_cli):
    with refused("expected a folder of task files", settings=["include_path"]):
        load_tasks(["x"], tmp_path / "absent")
    run_cli("eval", "--include-path", task_folder).refused("no task: name one", "--include-path")
    run_cli("run", "--sparsity", "2:4", "--task-limit", 3).refused("no task: name one", "--task-limit")
    run_cli("eval", "--tasks", ",").refused("names no task", "--tasks")


@pytest.mark.parametrize("known", in_short(("few", "every"), ["few"]))
def test_a_slip_is_answered_with_the_name(run_cli, monkeypatch, known):
    if known == "every":
        monkeypatch.setattr(tasks, "_harness_tasks", every_task)
    run_cli("eval", "--tasks", "helaswag").refused("'helaswag' is not known", "did you mean hellaswag?", "--tasks")
