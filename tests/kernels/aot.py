"""Compile Triton and Gluon kernels for a GPU that is not here, and read what the assembler made of them."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

# triton 3.9 warns where this is unset; it is the default that it warns about
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Built:
    ptx: str
    sass: str | None  # None where the disassembler is not bundled
    registers: int
    stack: int
    local: int
    shared: int


def compile_for(
    kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any], warps: int = 4
) -> Built:
    """`types` of the run-time arguments ("*bf16", "i32"); pointers and sizes count as divisible by 16."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, name in enumerate(names) if name in types and name != "TOKENS"}
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_type(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return read(compiled)


def read(compiled: Any) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = run(TOOLS / "cuobjdump", "-res-usage", cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage or "")
        registers, stack, local = map(int, found.groups()) if found else (0, 0, 0)
        sass = run(TOOLS / "nvdisasm", "-c", cubin)
    return Built(compiled.asm["ptx"], sass, registers, stack, local, compiled.metadata.shared)


def run(*command: object) -> str | None:
    if not Path(str(command[0])).is_file():
        return None
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
