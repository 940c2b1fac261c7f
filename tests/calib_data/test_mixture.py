"""Windows of several texts, in turns."""

import pytest
import torch

from sparsegpt.calib_data import draw_mixture, draw_windows, load_texts
from sparsegpt.calib_data.mixture import text_names
from tests.support import refused


class Letters:
    """A tokenizer with a token for each letter."""

    def __call__(self, text, **options):
        return {"input_ids": list(text.encode())}


@pytest.fixture
def texts(tmp_path):
    for name, letter in (("a.txt", "a"), ("b.txt", "b")):
        (tmp_path / name).write_text(letter * 50)
    return f"{tmp_path / 'a.txt'}, {tmp_path / 'b.txt'}"


def test_windows_come_in_turns(texts):
    windows = draw_mixture(load_texts(texts, "calibration"), Letters(), 5, 8, seed=0).windows
    assert [chr(window[0]) for window in windows] == ["a", "b", "a", "b", "a"]
    assert all(len(set(window.tolist())) == 1 for window in windows)


def test_one_text_gives_what_it_gives_alone(texts, tmp_path):
    text = tmp_path / "c.txt"
    text.write_text("the quick brown fox jumps over the lazy dog")
    (source,) = load_texts(str(text), "calibration")
    mixture, alone = draw_mixture([source], Letters(), 4, 8, seed=3), draw_windows(source, Letters(), 4, 8, seed=3)
    assert torch.equal(mixture.windows, alone.windows)
    assert mixture.describe() == alone.describe()


def test_a_file_with_a_comma_in_its_name_is_one_text(tmp_path):
    path = tmp_path / "a,b.txt"
    path.write_text("words")
    assert text_names(str(path)) == (str(path),)
    assert text_names("c4, wikitext2") == ("c4", "wikitext2")


def test_a_text_named_twice_is_refused():
    with refused("names one twice", settings=["calibration"]):
        text_names("c4, c4")


@pytest.mark.parametrize("names", ["", ","])
def test_a_list_that_names_nothing_is_refused(names):
    with refused("unknown text"):
        load_texts(names, "calibration")


def test_fewer_windows_than_texts_are_refused(texts):
    with refused("a calibration window of each of 2 texts", settings=["samples"]):
        draw_mixture(load_texts(texts, "calibration"), Letters(), 1, 8, seed=0)
