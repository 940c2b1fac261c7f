"""Windows of several texts, in turns."""

import pytest
import torch

from sparsegpt.calib_data import draw_mixture, draw_windows, load_texts
from sparsegpt.calib_data.mixture import Share, shares_of
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
    assert shares_of(str(path)) == (Share(str(path)),)
    assert shares_of("c4, wikitext2") == (Share("c4"), Share("wikitext2"))


def test_a_text_named_twice_is_refused():
    with refused("names one twice", settings=["calibration"]):
        shares_of("c4, c4")


@pytest.mark.parametrize("names", ["", ","])
def test_a_list_that_names_nothing_is_refused(names):
    with refused("unknown text"):
        load_texts(names, "calibration")


def test_fewer_windows_than_texts_are_refused(texts):
    with refused("a calibration window of each of 2 texts", settings=["samples"]):
        draw_mixture(load_texts(texts, "calibration"), Letters(), 1, 8, seed=0)


@pytest.mark.parametrize(
    ("shares", "drawn"),
    [
        ("=1{}=1", "abab"),
        ("=0.75{}=0.25", "aaba"),
        ("=3{}=1", "aaba"),
        ("=1{}=2", "bab"),
        ("=0.8{}=0.2", "aabaa"),
    ],
)
def test_shares_say_how_many_windows_each_text_gives(shares, drawn, texts):
    """Each window comes from the text that lags most behind its share, by hand."""
    first, second = texts.split(", ")
    ours = shares.format(f",{second}")
    mixture = draw_mixture(load_texts(first + ours, "calibration"), Letters(), len(drawn), 8, seed=0)
    assert "".join(chr(window[0]) for window in mixture.windows) == drawn
    assert mixture.source.startswith(f"{first}={float(shares[1:].split('{')[0]):g}, ")


@pytest.mark.parametrize("share", ["0", "-1", "nan", "inf", "half", ""])
def test_a_share_that_is_none_is_refused(share):
    with refused(f"expected a share above 0 after the name, as in wiki.txt=0.5, found '{share}'"):
        shares_of(f"pydoc={share},c4=0.5")


def test_shares_of_some_texts_alone_are_refused():
    with refused("gives some texts a share and others none", settings=["calibration"]):
        shares_of("pydoc=0.5,c4")


def test_a_share_too_small_for_a_window_is_refused(texts):
    first, second = texts.split(", ")
    with refused("a calibration window of each of 2 texts, found 4 in all", settings=["samples"]):
        draw_mixture(load_texts(f"{first}=100,{second}=1", "calibration"), Letters(), 4, 8, seed=0)


def test_a_file_with_an_equals_sign_in_its_name_is_one_text(tmp_path):
    path = tmp_path / "a=1"
    path.write_text("words")
    assert shares_of(f"c4=2,{path}=3") == (Share("c4", 2.0), Share(str(path), 3.0))
    assert shares_of(f"c4,{path}") == (Share("c4"), Share(str(path)))
