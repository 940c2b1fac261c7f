"""From measured microseconds to the table of kernels, its file, and the choice that follows from it."""

import logging
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels import quantize
from sparsegpt.kernels.cpu import library
from sparsegpt.kernels.dispatch import measured
from sparsegpt.kernels.dispatch.integer24 import INTEGER24
from sparsegpt.kernels.dispatch.measured import (
    ANY,
    MEASURED,
    OWN_DENSE,
    KernelRow,
    Measured,
    find,
    in_words,
    judge,
    machine_name,
    remember,
)
from sparsegpt.kernels.dispatch.packed24 import PACKED24
from sparsegpt.kernels.format.pack import pack
from tests.kernels.helpers import weight24

BF16, F32, HERE = torch.bfloat16, torch.float32, torch.device("cpu")
ROUTES, choose = PACKED24.routes, PACKED24.choose


def taken(tokens: int, shape: tuple[int, int] = (64, 64), dtype: str = "bfloat16", **times: float) -> list[KernelRow]:
    """Rows of one product; times in microseconds by kernel, an underscore for the space before the integer form."""
    names = {name.replace("_int", " int"): time for name, time in times.items()}
    library = times.get("library", 120)
    return [
        KernelRow(name, dtype, *shape, tokens, time, 0, library / time, 0, 0, False, 0) for name, time in names.items()
    ]


def test_a_route_serves_as_long_as_it_wins_from_the_first_tokens_on() -> None:
    rows = [
        *taken(1, dense=100, library=100, fast=50),
        *taken(8, dense=100, library=100, fast=97),
        *taken(32, dense=100, library=100, fast=98),  # less than the margin
        *taken(64, dense=100, library=100, fast=50),  # out of reach
    ]
    (row,) = judge("GPU", rows)
    assert row == Measured("GPU", BF16, ANY, ((8, "fast"),), ((8, "fast"),), "2.0")
    assert row.closed() == ((8, "fast"), (ANY, "dense"))


@pytest.mark.parametrize("many", [True, False])
def test_the_worked_example_of_the_module(many: bool) -> None:
    """The table of gains in the docstring gives the steps that the docstring says, with and without many tokens."""
    text = str(measured.__doc__)
    table = [line.split() for line in text.partition("MANY_TOKENS = 1024:")[2].partition("few tokens")[0].splitlines()]
    (_, *counts), *routes = [line for line in table if line]
    assert f"MARGIN = {measured.MARGIN} and MANY_TOKENS = {measured.MANY_TOKENS}:" in text and len(routes) == 3
    rows = []
    for column, tokens in enumerate(map(int, counts), 1):
        if many or tokens < measured.MANY_TOKENS:
            rows += taken(tokens, dense=100, library=100, **{row[0]: 100 / float(row[column]) for row in routes})
    said = re.search(r"all columns +(.*)\n" if many else r"those below MANY_TOKENS alone +(.*)\n", text)
    assert said is not None and in_words(judge("GPU", rows)[0].closed()) == said[1]


def test_our_own_dense_product_is_no_route() -> None:
    rows = taken(1, dense=100, library=100, fast=50)
    beside = replace(rows[0], kernel=OWN_DENSE, microseconds=10)
    assert judge("GPU", [*rows, beside]) == judge("GPU", rows)


def test_of_two_routes_the_one_that_gains_more_over_its_tokens() -> None:
    rows = [*taken(1, dense=100, quick=40, steady=50), *taken(2, dense=100, quick=99, steady=50)]
    assert judge("GPU", rows)[0].steps == ((2, "steady"),)


def test_dense_serves_between_few_tokens_and_many() -> None:
    rows = [
        *taken(1, dense=100, library=100, decode=50, prefill=200),
        *taken(64, dense=100, library=100, decode=200, prefill=200),
        *taken(1024, dense=100, library=100, decode=900, prefill=90),
        *taken(4096, dense=100, library=100, decode=900, prefill=80),
    ]
    (row,) = judge("GPU", rows)
    assert row.steps == row.resident == ((1, "decode"), (1023, "dense"), (ANY, "prefill"))
    assert in_words(row.closed()) == "decode up to 1 token, dense up to 1023 tokens, prefill above"
    assert row.closed("resident")[1] == (1023, "resident")


def test_the_prefill_route_takes_what_it_does_better() -> None:
    rows = [taken(n, dense=100, mma=50 if n <= 64 else 96, cutlass=150 if n <= 64 else 55) for n in (1, 64, 256, 1024)]
    (row,) = judge("GPU", [row for product in rows for row in product])
    assert row.steps == ((64, "mma"), (ANY, "cutlass"))  # dense won nowhere, so it does not serve between them


def test_a_route_that_wins_against_the_kept_weight_alone_has_its_gain_too() -> None:
    (row,) = judge("GPU", taken(1, library=100, dense=95, mma=94))
    assert (row.steps, row.resident, row.ratio) == ((), ((1, "mma"),), "1.1")


def test_a_gain_is_quoted_only_for_the_route_that_has_it(served: None) -> None:
    row = Measured("GPU", BF16, ANY, ((4, "of a later version"), (ANY, "cpu")), ratio="2.0")
    choice = PACKED24.by_measurement(row, pack(weight24(64, 96, BF16)))
    assert choice.steps == ((4, "dense"), (ANY, "cpu")) and choice.why == "measured on GPU"


def test_a_route_for_many_tokens_alone() -> None:
    rows = [*taken(1, dense=100, prefill=200), *taken(2048, dense=100, prefill=80)]
    (row,) = judge("GPU", rows)
    assert (row.steps, row.ratio) == (((2047, "dense"), (ANY, "prefill")), "1.5")


def test_what_wins_at_the_most_tokens_measured_is_not_trusted_beyond_unless_they_are_many() -> None:
    few = [*taken(1, dense=100, fast=50), *taken(64, dense=100, fast=50)]
    assert judge("GPU", few)[0].steps == ((64, "fast"),)
    assert judge("GPU", [*few, *taken(1024, dense=100, fast=50)])[0].steps == ((ANY, "fast"),)


def test_shapes_of_one_size_must_agree_and_sizes_stay_apart() -> None:
    tall, wide, small = (128, 32), (32, 128), (32, 32)
    rows = [
        *taken(1, tall, dense=100, fast=50),
        *taken(1, wide, dense=100, fast=25),
        *taken(4, tall, dense=100, fast=50),
        *taken(4, wide, dense=100, fast=120),
        *taken(1, small, dense=100, fast=120),
        *taken(4, small, dense=100),  # it failed here
    ]
    first, second = judge("GPU", rows)
    assert (first.weights, first.steps, first.ratio) == (32 * 32, (), "")
    assert (second.weights, second.steps, second.ratio) == (ANY, ((1, "fast"),), "2.4 to 4.8")


def test_resident_is_judged_by_the_kept_weight_and_integers_by_their_own_dense() -> None:
    rows = [
        *taken(1, library=60, dense=100, cpu=50, dense_int4=300, cpu_int4=70),
        *taken(8, library=60, dense=100, cpu=80, dense_int4=300, cpu_int4=290),
    ]
    values, integers = judge("CPU", rows)
    assert (values.steps, values.resident) == (((8, "cpu"),), ((1, "cpu"),))
    assert (integers.values, integers.steps, integers.resident) == ("int4", ((8, "cpu"),), ())


# The file


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "deep" / "measured.json"
    monkeypatch.setattr(measured, "measured_file", lambda: path)
    return path


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    for routes in (ROUTES, INTEGER24.routes):
        monkeypatch.setitem(routes, "cpu", replace(routes["cpu"], refusal=lambda weight: None))


def test_what_this_machine_remembers_goes_before_what_is_shipped(place: Path, served: None) -> None:
    here, weight = machine_name(HERE), pack(weight24(64, 96, BF16))
    ours = Measured(here, BF16, ANY, ((3, "cpu"), (9, "dense"), (ANY, "cpu")), ((2, "cpu"),), "1.5")
    other = Measured("another machine", BF16, ANY, ((7, "cpu"),), (), "9.9")
    assert remember([other]) == remember([ours]) == place
    assert [choose(weight).route(tokens) for tokens in (3, 4, 9, 10)] == ["cpu", "dense", "dense", "cpu"]
    assert [choose(weight, "resident").route(tokens) for tokens in (2, 3)] == ["cpu", "resident"]
    assert "1.5 times" in choose(weight).why and here in choose(weight).why
    assert [path.name for path in place.parent.iterdir()] == ["measured.json"]
    remember([replace(ours, steps=())])
    assert choose(weight).route(1) == "dense" and "no sparse kernel was faster" in choose(weight).why
    assert measured.remembered()["another machine"] == (other,)


def test_other_dtypes_and_forms_keep_the_shipped_rows(
    place: Path, served: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "machine_level", lambda: "avx512_bf16")
    before = {values: find(HERE, BF16, values, 99) for values in ("", "int4")}
    assert None not in before.values()
    remember([Measured(machine_name(HERE), F32, ANY, ())])
    assert {values: find(HERE, BF16, values, 99) for values in ("", "int4")} == before
    remember([Measured(machine_name(HERE), BF16, ANY, ((5, "cpu"),), values="int4")])
    assert INTEGER24.choose(quantize(pack(weight24(64, 128, BF16)), 4)).steps == ((5, "cpu"), (ANY, "dense"))
    assert find(HERE, BF16, "", 99) == before[""]


def test_a_path_that_was_not_measured_goes_by_the_next_lesser_one_for_few_tokens(
    served: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (
        Measured("avx2", BF16, ANY, ((256, "cpu"), (ANY, "dense")), ((4, "cpu"),), values="bitmask"),
        Measured("avx512", BF16, ANY, ((64, "cpu"),), values="int4"),
    )
    monkeypatch.setattr(measured, "MEASURED", rows)
    monkeypatch.setattr(library, "machine_level", lambda: "avx512")
    assert find(HERE, BF16, "int4", 99) == rows[1]
    lesser = find(HERE, BF16, "bitmask", 99)
    assert lesser is not None and (lesser.steps, lesser.resident) == (((16, "cpu"),), ((4, "cpu"),))
    monkeypatch.setattr(library, "machine_level", lambda: "plain")
    assert find(HERE, BF16, "bitmask", 99) is None


def test_a_route_that_is_unknown_or_cannot_serve_leaves_its_place_to_dense() -> None:
    row = Measured("GPU", BF16, ANY, ((4, "of a later version"), (8, "portable"), (9, "dense"), (ANY, "cutlass")))
    choice = PACKED24.by_measurement(row, pack(weight24(64, 96, BF16)))
    assert choice.steps == ((ANY, "dense"),) and "no sparse kernel" in choice.why


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": 2, "machines": {}}',
        '{"format": 1}',
        '{"format": 1, "machines": {"a": [{"dtype": "bfloat16"}]}}',
        '{"format": 1, "machines": {"a": [{"dtype": "nn", "weights": 1, "steps": [], "resident": [], "ratio": "", '
        '"values": ""}]}}',
        '{"format": 1, "machines": {"a": [{"dtype": "half", "weights": Infinity, "steps": [], "resident": [], '
        '"ratio": "", "values": ""}]}}',
    ],
)
def test_a_file_that_holds_something_else_is_named_once_and_never_overwritten(
    text: str, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.parent.mkdir()
    place.write_text(text)
    weight = pack(weight24(64, 96))
    with caplog.at_level(logging.WARNING, logger="sparsegpt.kernels"):
        assert choose(weight) == choose(weight)
    assert len(caplog.records) == 1 and str(place) in caplog.text
    with pytest.raises(SparseGPTError, match=r"measured\.json"):
        remember([Measured("GPU", BF16, ANY, ())])
    assert place.read_text() == text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(measured, "measured_file", lambda: tmp_path / "file" / "measured.json")
    with pytest.raises(SparseGPTError, match="XDG_CACHE_HOME"):
        remember([Measured("GPU", BF16, ANY, ())])


# The shipped rows


def test_the_shipped_rows_are_in_order() -> None:
    for row in MEASURED:
        assert row.path in library.LEVELS
        (limit, route), *rest = row.steps
        assert route in (INTEGER24.routes if row.values else ROUTES) and limit >= 1 and not rest
        if not row.values:  # a kept weight is never slower than one made for the call
            assert [route] == [name for _, name in row.resident] and row.resident[0][0] <= limit
    for first, second in pairwise(MEASURED):
        if (first.path, first.dtype, first.values) == (second.path, second.dtype, second.values):
            assert first.weights < second.weights  # otherwise the second is never reached
