"""The fused sweep kernel without a GPU: numerics in the interpreter, code generation ahead of time."""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

from sparsegpt.solvers import fused
from tests.kernels.aot import compile_for
from tests.kernels.interpreter import interpret, interpreter_runs
from tests.support import in_short

TYPES = dict.fromkeys(("weight_ptr", "error_ptr", "factor_ptr", "scale_ptr"), "*fp32") | {
    "kept_ptr": "*i8",
    "columns": "i32",
    "rows": "i32",
    "factor_stride": "i32",
}


@interpreter_runs
@pytest.mark.parametrize("form", in_short(("not long", "long"), ["not long"]))
def test_fused_sweep_in_the_interpreter(form, forked_light):
    interpret(forked_light, [Path(__file__).with_name("fused_cases.py")], form)


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (16, 32), (0, 0)])
def test_fused_sweep_compiles_without_spills(keep, group, target):
    constants = {"KEEP": keep, "GROUP": group, "K": fused.STRIP, "ROWS": fused.ROWS}
    built = compile_for(fused._strip_kernel, target, TYPES, constants, warps=fused.WARPS)
    assert built.stack == 0 and built.local == 0
    assert built.sass is None or not re.search(r"\b(LDL|STL)\b", built.sass)
