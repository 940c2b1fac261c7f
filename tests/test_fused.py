"""The fused sweep kernel without a GPU: numerics in the interpreter, code generation ahead of time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

from sparsegpt.solvers import fused

from .kernels.aot import compile_for

TYPES = dict.fromkeys(("weight_ptr", "error_ptr", "factor_ptr", "scale_ptr"), "*fp32") | {
    "kept_ptr": "*i8",
    "columns": "i32",
    "rows": "i32",
    "factor_stride": "i32",
}


def test_fused_sweep_in_the_interpreter():
    cases = Path(__file__).with_name("fused_cases.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(cases)]
    found = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (16, 32), (0, 0)])
def test_fused_sweep_compiles_without_spills(keep, group, target):
    constants = {"KEEP": keep, "GROUP": group, "K": fused.STRIP, "ROWS": fused.ROWS}
    built = compile_for(fused._strip_kernel, target, TYPES, constants, warps=fused.WARPS)
    assert built.stack == 0 and built.local == 0
    assert built.sass is None or not re.search(r"\b(LDL|STL)\b", built.sass)
