"""Sparsity patterns: every form that is understood, every form that is refused."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparsegpt import NM, SparseGPTError, Unstructured, parse_sparsity
from sparsegpt.sparsity import doubtful
from tests.support import refused


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        (" 16:32 ", NM(16, 32)),
        ("1:2", NM(1, 2)),
        ("0.5", Unstructured(0.5)),
        (".5", Unstructured(0.5)),
        ("5e-1", Unstructured(0.5)),
        ("50%", Unstructured(0.5)),
        ("62.5%", Unstructured(0.625)),
        ("0", Unstructured(0)),
        ("0%", Unstructured(0)),
        ("50%/row", Unstructured(0.5, per_row=True)),
        ("0.25/row", Unstructured(0.25, per_row=True)),
        (0.5, Unstructured(0.5)),
        (0, Unstructured(0)),
        (NM(2, 4), NM(2, 4)),
        (Unstructured(0.3), Unstructured(0.3)),
    ],
)
def test_every_form_is_understood(text, pattern):
    assert parse_sparsity(text) == pattern


BAD_FORMS = [
    "4:2",
    "5:4",
    "4:4",
    "0:4",
    "0:0",
    "2:0",
    "-2:4",
    "2:-4",
    "2:4:8",
    "2 : 4",
    "2/4",
    ":",
    "2:",
    ":4",
    "2.0:4",
]
BAD_FORMS += ["1.5", "1", "100%", "150%", "-1", "-0.1", "-5%", "nan", "inf", "-inf", "1e400", "1e999999"]
BAD_FORMS += [
    "abc",
    "",
    " ",
    "%",
    "0.5.5",
    "0,5",
    "50 %%",
    "2:4/row",
    "/row",
    "0.5/rows",
    "0.5/",
    "1/row",
    "half",
    "0x1",
    "None",
    "2:4\n1:2",
    "9999999:99999999",
]


@pytest.mark.parametrize("text", BAD_FORMS)
def test_every_bad_form_is_refused_in_one_line(text):
    with refused():
        parse_sparsity(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0, -0.25, 1, 2, None, True, [], object()])
def test_values_that_are_no_fraction_are_refused(value):
    with refused():
        parse_sparsity(value)


def test_refusal_shows_what_was_found_and_what_was_expected():
    with refused("'abc'", "2:4", "0.5", "50%"):
        parse_sparsity("abc")
    with refused("4:2", "0 < n < m"):
        parse_sparsity("4:2")


MEANT = {"50": "50%", "62,5": "62.5%", "1.5": "1.5%", "50 %": "50%", "50pct": "50%", "33.3pct-per-row": "33.3%/row"}
MEANT |= {"50/row": "50%/row", "0,5": "0.5", "2/4": "2:4", "2-4": "2:4", "2 : 4": "2:4", "2of4": "2:4", "2 of 4": "2:4"}
MEANT |= {"4:2": "2:4", "8/4": "4:8", "2.4": "2:4 or 2.4%", "16_32": "16:32", "50 percent": "50%"}


@pytest.mark.parametrize("text", MEANT)
def test_the_nearest_reading_is_asked_for(text):
    with refused(f"; did you mean {MEANT[text]}?"):
        parse_sparsity(text)
    for meant in MEANT[text].split(" or "):
        parse_sparsity(meant)


@pytest.mark.parametrize("text", ["1", "100%", "100", "-1", "abc", "4:4", "0:4", "2:4:8", "-50%", "150", "0/4", ""])
def test_nothing_is_asked_for_where_nothing_is_near(text):
    with pytest.raises(SparseGPTError) as caught:
        parse_sparsity(text)
    assert "mean" not in str(caught.value)


@pytest.mark.parametrize(("text", "doubtful_"), [("0.5%", True), ("0.9%/row", True), ("1%", False), ("50%", False)])
def test_a_percentage_below_one_is_doubted(text, doubtful_):
    assert bool(doubtful(text)) == doubtful_
    assert not doubtful("0.005")
    assert not doubtful("0%")


@given(st.integers(2, 512).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))))
def test_nm_round_trip(pair):
    pattern = NM(*pair)
    assert parse_sparsity(str(pattern)) == pattern
    assert pattern.zeros == pytest.approx((pair[1] - pair[0]) / pair[1])


@given(st.floats(0, 1, exclude_max=True), st.booleans())
@example(1 / 3, False)
@example(0.9999999, True)
def test_fraction_round_trip(fraction, per_row):
    pattern = Unstructured(fraction, per_row)
    assert parse_sparsity(fraction) == Unstructured(fraction)
    assert parse_sparsity(str(pattern)) == pattern
    assert pattern.zeros == fraction


@given(st.text() | st.text(alphabet="0123456789:.%eE+-/row \n") | st.floats() | st.integers())
def test_any_other_input_raises_nothing_but_the_one_error(value):
    try:
        pattern = parse_sparsity(value)
    except SparseGPTError as error:
        assert "\n" not in str(error)
    else:
        assert 0 <= pattern.zeros < 1


def test_width_that_groups_do_not_divide_is_refused_by_name():
    with refused("model.layers.3.fc1", "30", "groups of 4"):
        NM(2, 4).check(30, "model.layers.3.fc1")
    NM(2, 4).check(32, "layer")
    Unstructured(0.5).check(31, "layer")
