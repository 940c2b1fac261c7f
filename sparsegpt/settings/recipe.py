r"""Recipes: other settings for some of the linears, by ordered rules in a TOML file.

    [[rule]]
    modules = 'down_proj$'          # a regular expression, searched in full module names
    sparsity = 0.4
    method = "sparsegpt"

    [[rule]]
    modules = 'layers\.0\.'
    skip = true                     # left dense; `skip = false` in a later rule takes linears up again

All rules that match a linear apply to it in the order of the file, over what the command line or the preset says: a
later rule overrides an earlier one key by key. `skip` is such a key: settings that a later rule gives to a skipped
linear wait for a `skip = false`. A method that moves no weight takes no corrections from the preset, the command line
or earlier rules; given in the same rule or a later one they are refused.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparsegpt.errors import SparseGPTError, nearest
from sparsegpt.grid import parse_grid
from sparsegpt.settings.prune_settings import CORRECTIONS, LinearSettings, PruneSettings, Rule
from sparsegpt.solvers import parse_method
from sparsegpt.sparsity import parse_sparsity

# What a rule may say: the types of its value, and how they are called.
_TEXT, _NUMBER = ((str,), "a text"), ((int, float), "a number")
KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "modules": _TEXT,
    "skip": ((bool,), "true or false"),
    "sparsity": ((str, int, float), 'a text such as "2:4" or a fraction'),
    "method": _TEXT,
    "damping": _NUMBER,
    "block_size": ((int,), "a whole number"),
    "quantize": _TEXT,
    "quantizer": _TEXT,
    "error_correction": _NUMBER,
    "residual_correction": _NUMBER,
}


def read_recipe(path: Path | str) -> tuple[Rule, ...]:
    """The rules of a TOML file. Raises SparseGPTError, naming the file, and the rule where it is one rule's fault."""
    try:
        return parse_recipe(Path(path).read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise SparseGPTError(
            f"recipe {path} cannot be read: {error.strerror}; give a TOML file{_beside(Path(path))}"
        ) from error
    except UnicodeDecodeError as error:
        raise SparseGPTError(
            f"recipe {path} is not UTF-8 text (byte {error.start}): convert it, or give a TOML file"
        ) from error


def _beside(path: Path) -> str:
    """A question for a recipe in the folder that is named, or for a file of a name like the one that is not there."""
    try:
        if path.is_dir():
            recipes = sorted(str(each) for each in path.glob("*.toml"))
            return f"; did you mean {recipes[0]}?" if recipes else ""
        near = nearest(path.name, [each.name for each in path.parent.iterdir()])
    except OSError:
        return ""
    return f"; did you mean {path.with_name(near)}?" if near else ""


def parse_recipe(text: str, source: str = "recipe") -> tuple[Rule, ...]:
    """The rules of a recipe's text; `source` is how messages call it. Raises SparseGPTError as `read_recipe` does."""
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise SparseGPTError(f"{source} is not TOML: {' '.join(str(error).split())}") from error
    _refuse_unknown(source, tables, ["rule"])
    return parse_rules(tables.get("rule"), source)


def parse_rules(tables: Any, source: str = "recipe") -> tuple[Rule, ...]:
    """The rules of plain tables, such as [{"modules": "mlp", "sparsity": "2:4"}].

    Raises SparseGPTError, naming the rule, for keys and values that a rule cannot have.
    """
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise SparseGPTError(f"{source} holds no rules: expected tables headed [[rule]]")
    return tuple(_rule(table, f"{source}: rule {number}") for number, table in enumerate(tables, start=1))


def _rule(table: dict[str, Any], origin: str) -> Rule:
    _refuse_unknown(origin, table, KEYS)
    for key, value in table.items():
        types, called = KEYS[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise SparseGPTError(f"{origin}: {key} must be {called}, found {_shown(value)}")
    if "modules" not in table:
        raise SparseGPTError(f"{origin}: expected modules = a regular expression on module names")
    changes = {key: value for key, value in table.items() if key not in ("modules", "skip")}
    skip = table.get("skip")
    if skip is None and not changes:
        raise SparseGPTError(f"{origin}: changes nothing; expected one of {', '.join(KEYS)} beside modules")
    if skip and changes:
        raise SparseGPTError(f"{origin}: skip = true leaves linears dense, so {next(iter(changes))} has no meaning")
    try:
        if "sparsity" in changes:
            changes["sparsity"] = parse_sparsity(changes["sparsity"])
        if "quantize" in changes:
            changes["quantize"] = parse_grid(changes["quantize"])
        changes |= {key: float(value) for key, value in changes.items() if KEYS[key] is _NUMBER}
        return Rule(table["modules"], changes, skip, origin)
    except (SparseGPTError, OverflowError) as error:
        raise SparseGPTError(f"{origin}: {error}") from error


def _refuse_unknown(where: str, table: dict[str, Any], known: Iterable[str]) -> None:
    for key in table:
        if key not in known:
            raise SparseGPTError(f"{where}: {_shown(key)} is not known: did you mean {nearest(key, known, 0)}?")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def choose(settings: PruneSettings, names: Iterable[str]) -> dict[str, LinearSettings | None]:
    """What applies to each linear, by its full name; None where a rule leaves it dense.

    Raises SparseGPTError, naming rule and linear, where rules contradict each other, and when nothing is left to prune.
    """
    choices = {name: _choice(settings, name) for name in names}
    if settings.recipe and not any(map(_does_something, choices.values())):
        skipped = sum(choice is None for choice in choices.values())
        raise SparseGPTError(
            f"the recipe prunes nothing: it skips {skipped} of {len(choices)} linears, the others are asked for 0 zeros"
        )
    return choices


def _does_something(choice: LinearSettings | None) -> bool:
    return choice is not None and (choice.sparsity.zeros > 0 or choice.quantize is not None)


def _choice(settings: PruneSettings, name: str) -> LinearSettings | None:
    values = {field.name: getattr(settings, field.name) for field in fields(LinearSettings)}
    giver = dict.fromkeys(values, -1)  # the index of the matching rule that a value comes from
    matching = [rule for rule in settings.recipe if rule.matches(name)]
    skip = False
    for index, rule in enumerate(matching):
        values |= rule.changes
        giver |= dict.fromkeys(rule.changes, index)
        skip = skip if rule.skip is None else rule.skip
    if skip:
        return None
    if not parse_method(values["method"]).updates_weights:
        # Corrections said before the method did not know of it; said with it or after it they are a contradiction.
        values |= {share: 0.0 for share in CORRECTIONS if giver[share] < giver["method"]}
    try:
        return LinearSettings(**values)
    except SparseGPTError as error:
        raise SparseGPTError(f"{matching[-1].origin}: {name}: {error}") from error


def sets_sparsity(settings: PruneSettings, name: str) -> bool:
    """Whether a rule, and not the whole run, decides how sparse this linear becomes."""
    return any("sparsity" in rule.changes and rule.matches(name) for rule in settings.recipe)


def idle_rules(settings: PruneSettings, choices: dict[str, LinearSettings | None]) -> list[str]:
    """What to tell of rules that change nothing: they match no linear, or skipped ones alone."""
    found = []
    for rule in settings.recipe:
        matched = [name for name in choices if rule.matches(name)]
        if not matched:
            found.append(f"{rule.origin}: {rule.modules!r} matches none of the {len(choices)} linears to prune")
        elif not rule.skip and all(choices[name] is None for name in matched):
            found.append(f"{rule.origin}: every linear that {rule.modules!r} matches is skipped")
    return found
