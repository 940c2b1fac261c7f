"""How far a part of the work has got that is counted: windows scored, steps of a training."""

import time
from collections.abc import Callable
from dataclasses import dataclass

# Told how many are done, of how many: before the first, and after each.
Counted = Callable[[int, int], None]


@dataclass(frozen=True)
class StepReport:
    """Of a part of the work so many units are done, of a total, seconds after it began.

    The first one tells where it begins, mostly with none done; a training that goes on has some.
    """

    part: str
    unit: str
    done: int
    total: int
    seconds: float


def unheard(done: int, total: int) -> None:
    """Nobody listens."""


def counting(tell: Callable[[StepReport], None], part: str, unit: str) -> Counted:
    """What tells of a part of the work that begins now."""
    started = time.perf_counter()
    return lambda done, total: tell(StepReport(part, unit, done, total, time.perf_counter() - started))
