"""Values of JSON against types that say their form."""

from dataclasses import dataclass
from typing import Any, TypedDict

import pytest

from sparsegpt.files.typed_json import misfit


@dataclass(frozen=True)
class Row:
    name: str
    shape: tuple[int, int]
    error: float | None = None


class Table(TypedDict, total=False):
    rows: list[Row]
    scores: dict[str, dict[str, float]]
    more: Any


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, int),
        (1, float),
        (True, bool),
        (None, int | None),
        (["x"], list[str]),
        ([], list[str]),
        ({"a": {"b": 1.5}}, dict[str, dict[str, float]]),
        ({"name": "x", "shape": [1, 2]}, Row),
        ({"rows": [{"name": "x", "shape": [1, 2], "error": 0.5}], "more": [None]}, Table),
        ({}, Table),
    ],
)
def test_what_fits(value, kind):
    assert misfit(value, kind) is None


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (True, int, "it is 'True'"),
        (0, bool, "it is '0'"),
        (1.5, int, "it is '1.5'"),
        ("1", float, "it is '1'"),
        (None, str, "it is 'None'"),
        ("x" * 99, int, f"it is '{'x' * 40}'"),
        ("ab", list[str], "it is 'ab'"),
        (["x", 1], list[str], "it[1] is '1'"),
        ([1], tuple[int, int], "it is '[1]'"),
        ([1, "x"], tuple[int, int], "it[1] is 'x'"),
        ({"a": {"b": None}}, dict[str, dict[str, float]], "it.a.b is 'None'"),
        ({"name": "x"}, Row, "it lacks 'shape'"),
        ({"name": "x", "shape": [1, 2], "y": 0}, Row, "it has 'y'"),
        ({"rows": [{"name": "x", "shape": [1, 2], "error": "?"}]}, Table, "it.rows[0].error is '?'"),
        ([], Table, "it is '[]'"),
    ],
)
def test_what_does_not_is_told_by_its_place(value, kind, said):
    assert misfit(value, kind) == said
