"""The time left and the bars of notebooks, on blocks whose times are known."""

import io

import pytest

from sparsegpt.counting import StepReport
from sparsegpt.driver.reports import BlockReport
from sparsegpt.listeners.bars import Bars
from sparsegpt.listeners.time_left import StepsLeft, TimeLeft, in_words
from tests.support import prune_model, random_windows, tiny_model

TIMES = (9.0, 2.0, 4.0, 3.0, 3.0)


def test_the_first_block_pays_once_and_no_longer_counts():
    left = TimeLeft()
    found = [
        left.after(BlockReport(index, 5, 7, 0.1, seconds)) for index, seconds in enumerate((9.0, 2.0, 4.0, 3.0, 3.0))
    ]
    assert found == [36.0, 6.0, 6.0, 3.0, 0.0]


def steps_left(*told, part="a"):
    """Seconds left after each (done, seconds), of 10 steps."""
    left = StepsLeft()
    return [left.after(StepReport(part, "steps", done, 10, seconds)) for done, seconds in told]


def test_of_steps_too_the_first_no_longer_counts():
    assert steps_left((0, 1.0), (1, 6.0), (2, 8.0), (4, 11.0), (10, 23.0)) == [None, 45.0, 16.0, 10.0, 0.0]


def test_a_training_that_goes_on_is_timed_by_its_own_steps():
    assert steps_left((6, 0.0), (7, 3.0), (8, 5.0)) == [None, 9.0, 4.0]


def test_another_part_of_the_work_begins_anew():
    left = StepsLeft()
    told = [("a", 0, 0.0), ("a", 5, 10.0), ("b", 0, 0.5), ("b", 5, 1.5), ("b", 0, 2.0), ("b", 2, 6.0)]
    found = [left.after(StepReport(part, "steps", done, 10, seconds)) for part, done, seconds in told]
    assert found == [None, 10.0, None, 1.0, None, 16.0]
    assert left.after(StepReport("nothing", "steps", 0, 0, 1.0)) is None


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0:00"), (59.6, "1:00"), (123, "2:03"), (3723, "1:02:03")])
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


def test_a_bar_names_every_block_and_ends():
    shown = io.StringIO()
    options = {"preset": "paper", "reconstruct": 1, "distill": 2}
    prune_model(tiny_model("llama"), random_windows(), "2:4", **options, listener=Bars(file=shown, mininterval=0))
    assert "2/2" in shown.getvalue()
    assert "0:00 left" in shown.getvalue()
    for part in ("training model.layers.0", "training model.layers.1", "training the model"):
        assert part in shown.getvalue()
    assert shown.getvalue().endswith("\n")
