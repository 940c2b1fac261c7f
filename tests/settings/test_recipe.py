"""Recipes: which rule says what of which linear, and that each linear then becomes exactly that."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsegpt import NM, Unstructured
from sparsegpt.grid import Grid
from sparsegpt.settings.prune_settings import resolve_settings
from sparsegpt.settings.recipe import KEYS, choose, parse_recipe, parse_rules, read_recipe
from sparsegpt.solvers import METHODS
from sparsegpt.sparsity import parse_sparsity
from tests.support import one_line_or_none, refused

NAMES = [f"model.layers.{index}.{part}_proj" for index in range(3) for part in ("self_attn.q", "mlp.up", "mlp.down")]


def rule(modules: str, **said: object) -> dict[str, object]:
    return {"modules": modules, **said}


def chosen(*rules: dict[str, object], sparsity="2:4", **options):
    return choose(resolve_settings(sparsity, recipe=parse_rules(list(rules)), **options), NAMES)


# What is read


def test_grids_are_read_and_may_be_taken_away():
    rules = parse_rules([rule("q_proj", quantize="int8:row", quantizer="rtn"), rule("mlp", quantize="none")])
    assert rules[0].changes == {"quantize": Grid(8, None), "quantizer": "rtn"}
    choices = chosen(rule("mlp", quantize="none"), quantize="int4:32")
    assert choices["model.layers.0.mlp.up_proj"].quantize is None
    assert choices["model.layers.0.self_attn.q_proj"].quantize == Grid(4, 32)
    with refused("rule 1", "groups of 6 weights under one scale cut groups of 2:4"):
        parse_rules([rule("q_proj", sparsity="2:4", quantize="int4:6")])


def test_a_recipe_may_round_alone_and_a_quantizer_needs_a_grid():
    assert all(
        choice.quantize for choice in chosen(rule("q_proj", quantize="int8"), sparsity=0, quantize="int4").values()
    )
    with refused("a quantizer rounds to integers", settings=["quantize"]):
        resolve_settings("2:4", quantizer="rtn")
    with refused("quantizer 'gtpq' is not known", "did you mean gptq?"):
        resolve_settings("2:4", quantize="int4", quantizer="gtpq")
    with refused("quantize 'fp8' is not understood", settings=["quantize"]):
        resolve_settings("2:4", quantize="fp8")


def test_a_file_is_read_rule_by_rule(tmp_path):
    path = tmp_path / "mix.toml"
    path.write_text(
        "[[rule]]\nmodules = 'q_proj'\nsparsity = '4:8'\nmethod = 'wanda+refit'\ndamping = 1\nblock_size = 16\n"
        "error_correction = 0.25\nresidual_correction = 0\n[[rule]]\nmodules = 'mlp'\nsparsity = 0.4\n"
        "[[rule]]\nmodules = 'up'\nskip = true\n"
    )
    first, second, third = read_recipe(path)
    assert (first.modules, first.skip) == ("q_proj", None)
    assert first.changes == {
        "sparsity": NM(4, 8),
        "method": "wanda+refit",
        "damping": 1,
        "block_size": 16,
        "error_correction": 0.25,
        "residual_correction": 0,
    }
    assert second.changes == {"sparsity": Unstructured(0.4)}
    assert (third.changes, third.skip) == ({}, True)
    assert third.origin == f"{path}: rule 3"


GOOD = "[[rule]]\nmodules = 'mlp'\nsparsity = '2:4'\n[[rule]]\nmodules = 'q'\n"
BROKEN = {
    "a misspelt key": (GOOD + "sparcity = 0.5", ("rule 2", "'sparcity'", "did you mean sparsity?")),
    "a key of the command line": (GOOD + "block-size = 8", ("rule 2", "did you mean block_size?")),
    "a key of nothing": (GOOD + "zzz = 1", ("rule 2", "'zzz'", "did you mean")),
    "a table beside the rules": ("[defaults]\nsparsity = 0.5", ("'defaults'", "did you mean rule?")),
    "one table for a list": ("[rule]\nmodules = 'q'\nskip = true", ("[[rule]]",)),
    "rules that are no tables": ("rule = [1, 2]", ("[[rule]]",)),
    "nothing": ("", ("[[rule]]",)),
    "no modules": ("[[rule]]\nsparsity = 0.5", ("rule 1", "modules")),
    "no change": (GOOD, ("rule 2", "changes nothing")),
    "no TOML": (GOOD + "skip = yes", ("TOML", "line 6")),
    "a key twice": (GOOD + "skip = true\nskip = true", ("TOML",)),
    "no regular expression": ("[[rule]]\nmodules = '('\nskip = true", ("rule 1", "'('", "regular expression")),
    "a number too large": (f"[[rule]]\nmodules = 'q'\ndamping = {'9' * 5000}", ("TOML",)),
    "nested without end": ("a = " + "[" * 100_000, ("TOML",)),
    "modules of another type": (
        "[[rule]]\nmodules = ['q']\nskip = true",
        ("rule 1", "modules must be a text", "['q']"),
    ),
    "skip of another type": (GOOD + "skip = 1", ("rule 2", "skip must be true or false")),
    "a sparsity of another type": (GOOD + "sparsity = true", ("rule 2", "sparsity must be")),
    "a method of another type": (GOOD + "method = 3", ("rule 2", "method must be a text")),
    "a damping of another type": (GOOD + "damping = 'auto'", ("rule 2", "damping must be a number")),
    "a block size of another type": (GOOD + "block_size = 8.0", ("rule 2", "whole number", "8.0")),
    "a sparsity out of range": (GOOD + "sparsity = '4:2'", ("rule 2", "4:2")),
    "an unknown method": (GOOD + "method = 'obc'", ("rule 2", "'obc'", "sparsegpt")),
    "a damping out of range": (GOOD + "damping = -1", ("rule 2", "damping")),
    "a damping that is no number": (GOOD + "damping = nan", ("rule 2", "damping")),
    "a correction out of range": (GOOD + "error_correction = 1.5", ("rule 2", "error correction", "1.5")),
    "a block size out of range": (GOOD + "block_size = 0", ("rule 2", "block size")),
    "blocks that split groups": (GOOD + "block_size = 6\nsparsity = '2:4'", ("rule 2", "block size", "2:4")),
    "skipped and pruned": (GOOD + "skip = true\nsparsity = 0.5", ("rule 2", "skip = true", "sparsity")),
    "a correction that cannot be": (
        GOOD + "method = 'wanda'\nerror_correction = 0.5",
        ("rule 2", "'wanda'", "never updates weights"),
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_recipe_that_makes_no_sense_is_refused_with_file_and_rule(how, tmp_path):
    text, fragments = BROKEN[how]
    path = tmp_path / "mix.toml"
    path.write_text(text)
    with refused(str(path), *fragments):
        read_recipe(path)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with refused("missing.toml", "cannot be read"):
        read_recipe(tmp_path / "missing.toml")
    with refused(str(tmp_path), "cannot be read"):
        read_recipe(tmp_path)
    path = tmp_path / "latin.toml"
    path.write_bytes(b"# caf\xe9\n")
    with refused("latin.toml", "UTF-8"):
        read_recipe(path)


def test_a_path_in_place_of_rules_is_refused():
    with refused("read_recipe"):
        resolve_settings("2:4", recipe="mix.toml")


VALUES = st.one_of(
    st.sampled_from(
        ["2:4", "0.5", "50%/row", "wanda", "admm", "sparsegpt+refit", "q_proj", "mlp", ".", "", "(", "[[a]"]
    ),
    st.sampled_from([0, 1, 8, 128, 0.5, 0.01, True, False, float("nan"), float("inf"), -1, 10**400, None]),
    st.text(max_size=8) | st.integers() | st.floats() | st.lists(st.integers(), max_size=2),
)
TABLES = st.lists(
    st.dictionaries(st.sampled_from([*KEYS, "sparsty", "rule"]) | st.text(max_size=5), VALUES), max_size=4
)
LIKELY = {"modules": st.sampled_from(["q", "mlp", r"layers\.1\.", "up|down", "x"])}
ODD = st.lists(st.fixed_dictionaries(LIKELY, optional=dict.fromkeys(list(KEYS)[1:], VALUES)), min_size=1, max_size=2)
USUAL = {
    "skip": st.booleans(),
    "sparsity": st.sampled_from(["2:4", 0.5, "4:8", 0]),
    "method": st.sampled_from(list(METHODS)),
    "damping": st.sampled_from([0, 0.1]),
    "block_size": st.sampled_from([1, 4, 6]),
    "error_correction": st.sampled_from([0, 1]),
    "residual_correction": st.sampled_from([0, 0.5]),
}


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_bytes_of_any_kind_are_one_line_or_none(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    one_line_or_none(lambda: read_recipe(path))


@given(st.text(alphabet="[]rule\n='\"mods.0:24#{}\\", max_size=60))
def test_text_that_looks_like_toml_is_one_line_or_none(text):
    one_line_or_none(lambda: parse_recipe(text))


@given(TABLES | ODD | st.lists(st.fixed_dictionaries(LIKELY, optional=USUAL), min_size=1, max_size=4))
def test_tables_of_any_kind_are_one_line_or_none_and_so_is_what_they_come_to(tables):
    rules = one_line_or_none(lambda: parse_rules(tables))
    if rules is None:
        return
    assert [dict(rule.as_dict()) for rule in rules] == [
        {key: str(parse_sparsity(value)) if key == "sparsity" else value for key, value in table.items()}
        for table in tables
    ]
    choices = one_line_or_none(lambda: choose(resolve_settings("2:4", recipe=rules), NAMES))
    assert choices is None or list(choices) == NAMES


# Which rule applies


@given(st.lists(st.fixed_dictionaries(LIKELY, optional=USUAL), min_size=1, max_size=4))
def test_each_key_is_taken_from_the_last_rule_that_matches_and_has_it(tables):
    rules = one_line_or_none(lambda: parse_rules(tables))
    choices = rules and one_line_or_none(lambda: choose(resolve_settings("2:4", recipe=rules), NAMES))
    base = {"sparsity": "2:4", "method": "admm", "damping": None, "block_size": 128}
    for name, choice in (choices or {}).items():
        said = [table for table in tables if re.search(table["modules"], name)]
        skips = [table["skip"] for table in said if "skip" in table]
        assert (choice is None) == (skips != [] and skips[-1])
        if choice is None:
            continue
        for key, value in base.items():
            last = [value, *(table[key] for table in said if key in table)][-1]
            assert getattr(choice, key) == (parse_sparsity(last) if key == "sparsity" else last), key


def test_later_rules_override_earlier_ones_key_by_key():
    choices = chosen(
        rule("mlp", sparsity=0.5, method="sparsegpt"),
        rule(r"layers\.1\.", sparsity="4:8", damping=0.2),
        rule("down", method="admm"),
    )
    asked = {name: (str(c.sparsity), c.method, c.damping) for name, c in choices.items()}
    assert asked["model.layers.0.self_attn.q_proj"] == ("2:4", "admm", None)
    assert asked["model.layers.0.mlp.up_proj"] == ("0.5", "sparsegpt", None)
    assert asked["model.layers.0.mlp.down_proj"] == ("0.5", "admm", None)
    assert asked["model.layers.1.self_attn.q_proj"] == ("4:8", "admm", 0.2)
    assert asked["model.layers.1.mlp.up_proj"] == ("4:8", "sparsegpt", 0.2)
    assert asked["model.layers.1.mlp.down_proj"] == ("4:8", "admm", 0.2)


def test_what_is_skipped_stays_skipped_until_a_rule_takes_it_up_again():
    skip, other = rule("mlp", skip=True), rule("down", sparsity=0.5)
    assert chosen(skip, other)["model.layers.0.mlp.down_proj"] is None
    again = chosen(skip, other, rule(r"layers\.0\.", skip=False))
    assert again["model.layers.0.mlp.down_proj"].sparsity == Unstructured(0.5)
    assert again["model.layers.0.mlp.up_proj"].sparsity == NM(2, 4)
    assert again["model.layers.1.mlp.down_proj"] is None


def shares(choice) -> tuple[float, float]:
    return choice.error_correction, choice.residual_correction


def test_a_method_that_moves_no_weight_drops_corrections_said_before_and_refuses_those_said_after():
    name = "model.layers.0.self_attn.q_proj"
    default = resolve_settings("2:4")
    wanda = rule("q", method="wanda")
    assert shares(default) > (0, 0)
    assert shares(chosen(wanda)[name]) == (0, 0)
    assert shares(chosen(rule("q", error_correction=1), wanda)[name]) == (0, 0)
    assert shares(chosen(wanda, error_correction=0.3)[name]) == (0, 0)
    assert shares(chosen(wanda, rule("q", method="admm"))[name]) == shares(default)
    assert shares(chosen(wanda)["model.layers.0.mlp.up_proj"]) == shares(default)
    with refused("recipe: rule 2", name, "'wanda'", "never updates weights"):
        chosen(wanda, rule("q|up", error_correction=0.5))
    with refused("recipe: rule 1", "'magnitude'"):
        chosen(rule("q", residual_correction=0.5), method="magnitude")


def test_values_that_contradict_each_other_only_together_name_rule_and_linear():
    rules = [rule("mlp", sparsity=0.5), rule("down", block_size=6), rule("down", sparsity="2:4")]
    with refused("recipe: rule 3", "model.layers.0.mlp.down_proj", "block size 6", "2:4"):
        chosen(*rules, rule("self_attn", skip=True))
