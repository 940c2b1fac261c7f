"""Figures of weights that were changed afterwards are no longer shown as those of the folder."""

import json

from sparsegpt.files.checked_json import read_checked, write_checked
from sparsegpt.files.figures import BEGIN, END, retell

REPORT = {
    "model": "m",
    "layers": [{"name": "a", "sparsity": "2:4", "shape": [4, 4], "relative_error": 0.5}],
    "perplexity": {"text": {"dense": 10.0, "pruned": float("inf"), "kernels": 12.5}},
    "bits_per_byte": {"text": {"dense": 1.0}},
    "tokens_per_second": {},
    "tasks": {"arc_easy": {"acc": {"pruned": {"value": 0.5, "stderr": 0.1}}}},
    "identity": {"model": "abc"},
}
CARD = f"# T\n\n{BEGIN}\n\n| perplexity | pruned |\n\n{END}\n\nmore {BEGIN}{END} end\r\n".encode() + b"\xff"


def test_no_score_is_the_folders_own_and_what_was_measured_says_on_what(tmp_path):
    write_checked(tmp_path / "report.json", REPORT)
    retell(tmp_path, "values rounded to int4")
    report = read_checked(tmp_path / "report.json")  # its checksum holds
    assert report["perplexity"] == report["bits_per_byte"] == report["tasks"] == {}
    assert report["before_change"]["tasks"] == REPORT["tasks"]
    assert report["before_change"]["change"] == "values rounded to int4"
    assert report["before_change"]["perplexity"] == REPORT["perplexity"]
    assert "layers.relative_error" in report["before_change"]["measured_before"]
    assert report["layers"] == REPORT["layers"]
    assert "identity" not in report


def test_a_report_without_a_checksum_stays_without(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"layers": [], "perplexity": {"t": {"pruned": 3.0}}}))
    retell(tmp_path, "changed")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["perplexity"] == {}
    assert "sha256" not in report
    (tmp_path / "report.json").write_text("[]")
    retell(tmp_path, "changed")
    assert (tmp_path / "report.json").read_text() == "[]"


def test_the_card_says_so_in_the_place_of_its_figures(tmp_path):
    (tmp_path / "README.md").write_bytes(CARD)
    retell(tmp_path, "values rounded to int4")
    card = (tmp_path / "README.md").read_bytes()
    assert b"perplexity" not in card
    assert card.count(b"values rounded to int4") == 2
    assert card.startswith(b"# T\n\n")
    assert card.endswith(b" end\r\n\xff")


def test_a_folder_without_either_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    retell(tmp_path, "changed")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
