"""The time left and the bars of notebooks, on blocks whose times are known."""

import io

import pytest

from sparsegpt.driver.reports import BlockReport
from sparsegpt.listeners.bars import Bars
from sparsegpt.listeners.time_left import TimeLeft, in_words
from tests.support import prune_model, random_windows, tiny_model

TIMES = (9.0, 2.0, 4.0, 3.0, 3.0)


def test_the_first_block_pays_once_and_no_longer_counts():
    left = TimeLeft()
    found = [
        left.after(BlockReport(index, 5, 7, 0.1, seconds)) for index, seconds in enumerate((9.0, 2.0, 4.0, 3.0, 3.0))
    ]
    assert found == [36.0, 6.0, 6.0, 3.0, 0.0]


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0:00"), (59.6, "1:00"), (123, "2:03"), (3723, "1:02:03")])
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


def test_a_bar_names_every_block_and_ends():
    shown = io.StringIO()
    prune_model(tiny_model("llama"), random_windows(), "2:4", preset="paper", listener=Bars(file=shown, mininterval=0))
    assert "2/2" in shown.getvalue()
    assert "0:00 left" in shown.getvalue()
    assert shown.getvalue().endswith("\n")
