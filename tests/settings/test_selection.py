"""Ranges of blocks, such as 0:12, and names of linears by regular expressions."""

import copy
import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsegpt.settings import selection
from sparsegpt.settings.selection import name_filter, parse_blocks
from tests.support import one_line_or_none, prune_model, random_windows, refused, tiny_model


@given(
    st.lists(
        st.tuples(st.none() | st.integers(0, 11), st.none() | st.integers(0, 12), st.booleans()), min_size=1, max_size=3
    )
)
def test_ranges_mean_what_slices_mean(ranges):
    parts, expected, empty = [], set(), False
    for start, end, single in ranges:
        if single:
            parts.append(str(start or 0))
            expected.add(start or 0)
        else:
            parts.append(f"{'' if start is None else start}:{'' if end is None else end}")
            expected |= set(range(12)[start:end])
            empty |= not range(12)[start:end]
    if empty:
        with refused("holds no block"):
            parse_blocks(",".join(parts))
    else:
        assert parse_blocks(",".join(parts)).indices(12) == expected


@pytest.mark.parametrize("text", ["12", "0:13", "13:", "5,12:", "99999999:"])
def test_blocks_that_a_model_does_not_have_are_refused_with_their_number(text):
    with refused(f"blocks {text} are out of range", "the model has 12 blocks, 0 to 11"):
        parse_blocks(text).indices(12)


@pytest.mark.parametrize("text", ["", ",", "a", "1-3", "-1", "0:-1", "1:2:3", "0 :2", "1,,2", "٣", "1\n2", "1e3"])
def test_blocks_in_another_form_are_refused(text):
    with refused(f"blocks {text!r} are not understood", "0:12"):
        parse_blocks(text)


@given(st.text(max_size=12) | st.text("0123456789:,- ", max_size=12))
def test_blocks_of_any_kind_are_ranges_or_one_line(text):
    found = one_line_or_none(lambda: parse_blocks(text))
    indices = found and one_line_or_none(lambda: found.indices(24))
    assert indices is None or (indices and indices <= set(range(24)))


@pytest.mark.parametrize(("text", "indices"), [("0:1", {0}), ("1", {1}), (":2", {0, 1}), (":1,2:", {0, 2})])
def test_only_the_linears_of_these_blocks_are_pruned(text, indices):
    model = tiny_model("llama", num_hidden_layers=3)
    select = name_filter("mlp", "up")
    report = prune_model(copy.deepcopy(model), random_windows(), "2:4", only_blocks=text, select=select)
    expected = {f"model.layers.{index}.mlp.{part}_proj" for index in indices for part in ("gate", "down")}
    assert {layer.name for layer in report.layers} == expected
    with refused("no linear layer", settings=["blocks"]):
        prune_model(model, random_windows(), "2:4", only_blocks=text, select=name_filter(r"layers\.7\."))


@pytest.mark.parametrize("text", [r"(a|a)*$", r"(?:(?:\w|\w)*)*!", r"(.*)*x(.*)*y(.*)*z(.*)*\d\d\d"])
def test_an_expression_has_an_end(text, monkeypatch):
    """Alternatives that repeat what repeats: found or refused, and never without an end."""
    monkeypatch.setattr(selection, "SECONDS", 0.2)
    expression = selection.Expression(text, "modules =", "")
    one_line_or_none(lambda: expression.found_in("a" * 60 + "b" * 60))


def test_an_expression_whose_time_is_up_is_named(monkeypatch):
    def endless(*arguments, **options):
        raise TimeoutError

    expression = selection.Expression("a+", "--only", "only")
    monkeypatch.setattr(expression, "_pattern", SimpleNamespace(search=endless))
    with refused("--only 'a+' takes longer than 2 s on model.layers.0"):
        expression.found_in("model.layers.0")


@pytest.mark.parametrize(
    "text", ["((((a{99}){99}){99}){99}){99}", "a{10001}", "(a{1,101}){100}", "(a{,99999999999}){2}", "x" * 100_001]
)
def test_an_expression_that_would_fill_the_memory_is_refused(text):
    """Counts are compiled as often as they count: five of 99, one in the other, are ten thousand million parts."""
    with refused("--only", "is too large"):
        selection.Expression(text, "--only", "only")


def test_expressions_of_a_reasonable_size_are_taken():
    names = [f"model.layers.{block}.mlp.{part}_proj" for block in range(80) for part in ("gate", "up", "down")]
    expression = selection.Expression("|".join(map(re.escape, names)), "--only", "only")
    assert all(map(expression.found_in, names))
    expression = selection.Expression(r"layers\.\d{1,2}\.(?:[a-z_]{3,10}\.){2}", "--only", "only")
    assert [expression.found_in(name) for name in (names[0], "model.layers.1.self_attn.rotary.cos")] == [False, True]
