"""JSON of a known form: the form is a type, as annotations and dataclasses say it."""

import functools
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

_hints = functools.cache(get_type_hints)


def misfit(value: Any, kind: Any, where: str = "it", *, more: bool = False) -> str | None:
    """What of a value read from JSON is not of a type, in words; None where all of it is.

    kind: Any, None, bool, int, float (which whole numbers are too), str, X | Y, list[X], dict[str, X], tuple[X, Y] (a
    list in JSON), a TypedDict or a dataclass (objects in JSON). more: objects may have keys that the type does not
    know, as those of another version do.
    """

    def fits(part: Any, kind: Any, where: str) -> str | None:
        return misfit(part, kind, where, more=more)

    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        found = [fits(value, part, where) for part in inner]
        return None if None in found else found[0]
    if origin is list and isinstance(value, list):
        return _first(fits(item, inner[0], f"{where}[{place}]") for place, item in enumerate(value))
    if origin is tuple and isinstance(value, list) and len(value) == len(inner):
        pairs = enumerate(zip(value, inner, strict=True))
        return _first(fits(item, part, f"{where}[{place}]") for place, (item, part) in pairs)
    if origin is dict and isinstance(value, dict):
        return _first(fits(item, inner[1], f"{where}.{key}") for key, item in value.items())
    if (is_typeddict(kind) or is_dataclass(kind)) and isinstance(value, dict):
        return _of_object(value, kind, where, more=more)
    return None if _is_plain(value, kind) else f"{where} is {str(value)[:40]!r}"


def _of_object(value: dict[str, Any], kind: Any, where: str, *, more: bool) -> str | None:
    known = _hints(kind)
    if is_dataclass(kind):
        needed = {field.name for field in fields(kind) if field.default is field.default_factory is MISSING}
    else:
        needed = set(kind.__required_keys__)
    surplus = set() if more else value.keys() - known.keys()
    if wrong := sorted(needed - value.keys()) + sorted(surplus):
        return f"{where} {'lacks' if wrong[0] in needed else 'has'} {wrong[0][:40]!r}"
    pairs = ((key, item) for key, item in value.items() if key in known)
    return _first(misfit(item, known[key], f"{where}.{key}", more=more) for key, item in pairs)


def _is_plain(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if isinstance(value, bool):  # to Python a number
        return kind is bool
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, kind) if kind in (bool, int, str, type(None)) else value is kind


def _first(found: Iterable[str | None]) -> str | None:
    return next((text for text in found if text is not None), None)
