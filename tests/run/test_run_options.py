"""What follows from the options of a run where nothing is given: texts and the folder to write."""

import re

import pytest

from sparsegpt.run.options import default_data, default_folder
from sparsegpt.sparsity import parse_sparsity


@pytest.mark.parametrize(
    ("model", "sparsity", "name"),
    [
        ("demo", "2:4", "demo-2of4"),
        ("demo", "16:32", "demo-16of32"),
        ("demo", "50%", "demo-50pct"),
        ("demo", "0.5", "demo-50pct"),
        ("demo", "50%/row", "demo-50pct-per-row"),
        ("demo", "0.333", "demo-33.3pct"),
        ("demo", "0.07", "demo-7pct"),  # 100 * 0.07 is not 7 in binary
        ("demo", "0", "demo-0pct"),
        ("facebook/opt-1.3b", "2:4", "opt-1.3b-2of4"),
        ("./my models/llama [7b]:x/", "2:4", "llama--7b--x-2of4"),
        ("C:\\models\\a%b?*", "2:4", "C--models-a-b---2of4"),
        (".", "2:4", "model-2of4"),
        ("/", "2:4", "model-2of4"),
    ],
)
def test_the_default_folder_has_a_plain_name(model, sparsity, name):
    folder = default_folder(model, parse_sparsity(sparsity))
    assert folder.parts == ("pruned", name)
    assert re.fullmatch(r"[\w.\-]+", name)


def test_fractions_that_differ_have_folders_of_their_own():
    names = {default_folder("demo", parse_sparsity(f"{thousandth / 10}%")).name for thousandth in range(1000)}
    assert len(names) == 1000


def test_the_demo_needs_no_network():
    assert {default_data("demo", role) for role in ("calibration", "evaluation")} == {"pydoc"}
    assert [default_data("opt-1.3b", role) for role in ("calibration", "evaluation")] == ["c4", "wikitext2"]
