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


def loads_in_flight(sass: str) -> int:
    """How many 16-byte loads of the loop around the tensor core's instructions are under way at once, at most.

    A load is under way from its instruction to the first that names one of its registers, around the loop's end too.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
    loops = [
        instructions[labels[target[1]] : end + 1]
        for end, text in enumerate(instructions)
        if (target := re.search(r"BRA.*`\((\.L_\S+)\)", text)) and labels[target[1]] <= end
    ]
    body = max((loop for loop in loops if any("HMMA" in text for text in loop)), key=len)
    under_way = [0] * len(body)
    for start, text in enumerate(body):
        if wide := re.search(r"LDG\S*\.128\S*\s+R(\d+)", text):
            registers = {f"R{int(wide[1]) + i}" for i in range(4)}
            for later in [*range(start + 1, len(body)), *range(start)]:
                if registers & set(re.findall(r"\bR\d+\b", body[later])):
                    break
                under_way[later] += 1
    return max(under_way)
