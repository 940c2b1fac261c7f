"""Numbers as a person reads them. What is not known is a dash."""

import math
from collections.abc import Sequence
from typing import Any

from jinja2.filters import do_filesizeformat

UNKNOWN = "–"
# Letters of a name that a table shows whole.
NAME_WIDTH = 30
_MINUTE, _HOUR = 60, 3600


def short_names(names: Sequence[str]) -> dict[str, str]:
    """What a table calls texts and folders: of long paths the last parts, as many as tell all of them apart."""
    if max(map(len, names), default=0) <= NAME_WIDTH:
        return {name: name for name in names}
    parts = [name.split("/") for name in names]
    for count in range(1, max(map(len, parts))):
        short = ["/".join(part[-count:]) for part in parts]
        if len(set(short)) == len(set(names)) and all(short):
            return dict(zip(names, short, strict=True))
    return {name: name for name in names}


def perplexity(value: float | None) -> str:
    """Four digits, more of large ones."""
    if value is None or math.isnan(value):
        return UNKNOWN
    return "∞" if math.isinf(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def percent(value: float | None) -> str:
    """A share."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:.1%}"


def change(before: float | None, after: float | None) -> str:
    """How much larger, in percent or in times."""
    if before is None or after is None or not (0 < before < math.inf and math.isfinite(after)):
        return UNKNOWN
    ratio = after / before
    return f"× {ratio:,.1f}" if ratio >= 3 else f"{ratio - 1:+.1%}"


def error(value: float | None) -> str:
    """A relative error."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:.2%}" if value < 0.1 else f"{value:.1%}"


def with_error(value: float, stderr: float | None) -> str:
    """A score with its standard error, if there is one."""
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def bits(value: float | None) -> str:
    """Bits of a weight."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:.2f}"


def seconds(value: float | None) -> str:
    """A duration."""
    if value is None or not 0 <= value < math.inf:
        return UNKNOWN
    if value < _MINUTE:
        return f"{value:.1f} s"
    if value < _HOUR:
        return f"{value // _MINUTE:.0f} min {value % _MINUTE:.0f} s"
    return f"{value // _HOUR:.0f} h {value % _HOUR // _MINUTE:.0f} min"


def size(count: float | None) -> str:
    """Bytes."""
    return UNKNOWN if count is None or not math.isfinite(count) else do_filesizeformat(count, binary=True)


def plain(value: Any) -> str:
    """A setting."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(plain, value)) if isinstance(value, list) else str(value)
