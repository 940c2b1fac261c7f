"""The Triton kernels in Triton's interpreter, in a process of its own: they know of it when they are defined."""

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

from tests.forked import Forked
from tests.kernels.interpreter import interpret, interpreter_runs
from tests.support import in_short

CASES = [Path(__file__).with_name(name) for name in ("interpreter_cases.py", "bitmask_cases.py")]


@interpreter_runs
@pytest.mark.parametrize("form", in_short(("not long", "long"), ["not long"]))
def test_kernels_in_the_interpreter(form: str, forked_light: Forked) -> None:
    # numpy warns of overflow in exp(-x), which is infinity there and the right zero afterwards
    interpret(forked_light, CASES, form, "ignore:overflow encountered:RuntimeWarning")
