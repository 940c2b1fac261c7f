"""Runs the bodies of our Gluon kernels on the CPU: tensors of torch, pointers with bounds, the PTX instructions we use
emulated lane by lane as the PTX manual draws them. Slow, and just enough for mma_sp.py and mma_sp_int4.py.

What it does not see: how the compiler spreads a tensor over threads. The layouts put four consecutive elements of the
last axis into one lane's registers; the compiled kernels show one instruction for each such four."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pointer:
    """Address of elements of a flat tensor."""

    storage: Tensor
    offset: Any = 0

    def __add__(self, step: Any) -> "Pointer":
        return Pointer(self.storage, self.offset + step)

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.storage.dtype)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Offsets and mask of one shape; an unmasked address outside the tensor is an error."""
        offset, live = torch.broadcast_tensors(torch.as_tensor(self.offset), torch.as_tensor(mask))
        assert bool(((offset >= 0) & (offset < self.storage.numel()))[live].all()), "address outside the tensor"
        return offset.where(live, 0), live


def load(pointer: Pointer, mask: Any = True, other: float = 0) -> Tensor:
    offset, live = pointer.places(mask)
    return torch.where(live, pointer.storage[offset], torch.tensor(other, dtype=pointer.storage.dtype))


def store(pointer: Pointer, value: Tensor, mask: Any = True) -> None:
    offset, live = pointer.places(mask)
    pointer.storage[offset[live]] = value.expand(live.shape)[live]


def inline_asm(text: str, constraints: str, operands: list[Tensor], **options: Any) -> Tensor:
    assert options["pack"] == 4 and constraints.count(",") + 1 == 4 * (1 + len(operands))
    return mma_sp(text, *operands) if "mma.sp" in text else widen(text, *operands)


def mma_sp(text: str, a: Tensor, b: Tensor, sums: Tensor, e: Tensor) -> Tensor:
    """mma.sp.m16n8k32 on the last axis, 32 lanes of four registers."""
    found = re.fullmatch(r"mma\.sp::ordered_metadata\S*\.row\.col\.f32\.(\w+)\..* \$(\d+), 0x([01]);", text)
    assert found is not None
    dtype, register, selector = found[1], int(found[2]) - 16, int(found[3])
    a, b, sums, e = (part.unflatten(-1, (32, 4)) for part in torch.broadcast_tensors(a, b, sums, e))
    row, column = torch.arange(16)[:, None], torch.arange(16)[None, :]
    kept = halves(a, dtype)[..., row % 8 * 4 + column % 8 // 2, row // 8 + 2 * (column // 8), column % 2]
    k, n = torch.arange(32)[:, None], torch.arange(8)[None, :]
    right = halves(b, dtype)[..., n * 4 + k % 8 // 2, k // 8, k % 2]
    group = torch.arange(8)[None, :]
    words = e[..., row % 8 * 4 + 2 * selector + group // 4, register].long()
    nibbles = words >> (16 * (row // 8) + 4 * (group % 4)) & 15
    places = torch.stack([4 * group + (nibbles & 3), 4 * group + (nibbles >> 2)], -1).flatten(-2)
    dense = torch.zeros(*kept.shape[:-1], 32, dtype=torch.float64).scatter_add_(-1, places, kept)
    product = dense @ right
    lane, out = torch.arange(32)[:, None], torch.arange(4)[None, :]
    return (sums + product[..., lane // 4 + 8 * (out // 2), 2 * (lane % 4) + out % 2].float()).flatten(-2)


def widen(text: str, q: Tensor) -> Tensor:
    """Nibbles to pairs of 16-bit floats: OR into a power of two, then one exact multiply-add."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[re.findall(r"fma\.rn\.(\w+)x2", text)[0]]
    step = int(re.findall(r"shr\.u32 t, \$(\d+), 0;", text)[0]) - 4
    power, minus, one = (
        torch.tensor([int(found, 16) - (1 << 32 if int(found, 16) >> 31 else 0)], dtype=torch.int32).view(dtype)
        for found in (
            re.findall(r"0x000f000f, (0x\w+),", text)[0],
            re.findall(r"mov\.b32 minus, (0x\w+);", text)[0],
            re.findall(r"mov\.b32 one, (0x\w+);", text)[0],
        )
    )
    word = q.unflatten(-1, (32, 4))[..., step]
    registers = []
    for register in range(4):
        bits = (word >> (4 * register)) & 0x000F000F
        joined = (bits | power.view(torch.int32)).contiguous().view(dtype).unflatten(-1, (-1, 2))
        registers.append((joined * one + minus).flatten(-2).view(torch.int32))
    return torch.stack(registers, -1).flatten(-2)


def halves(registers: Tensor, name: str) -> Tensor:
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[name]
    return registers.contiguous().view(dtype).unflatten(-1, (-1, 2)).double()


def language(program: list[int]) -> SimpleNamespace:
    """What our kernels use of gluon.language, on torch tensors."""
    return SimpleNamespace(
        program_id=lambda axis: program[axis],
        arange=lambda start, end, layout=None: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        load=load,
        store=store,
        sum=torch.sum,
        exp=torch.exp,
        maximum=lambda x, y: x.clamp_min(y),
        convert_layout=lambda x, layout: x,
        inline_asm_elementwise=inline_asm,
        static_range=range,
        SliceLayout=lambda axis, parent: None,
        DistributedLinearLayout=lambda *parts: None,
        float32=torch.float32,
        int32=torch.int32,
        int64=torch.int64,
    )


@dataclass(frozen=True)
class Emulated:
    """Stands for a jitted kernel: `kernel[grid](...)` runs its body once for each block and returns `launched`."""

    body: Callable[..., None]
    program: list[int]
    launched: Any

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*operands: Any, num_warps: int, **constants: Any) -> Any:
            given = [Pointer(x.view(-1)) if isinstance(x, Tensor) else x for x in operands]
            for block in itertools.product(*map(range, grid)):
                self.program[:] = block
                self.body(*given, **constants)
            return self.launched

        return launch


def emulate(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType, launched: Any = None, **more: Any) -> None:
    """Put the emulator in place of Gluon in these modules, for one test; `more` adds names to it or replaces them."""
    program = [0, 0]
    fake = SimpleNamespace(**{**vars(language(program)), **more})
    for module in modules:
        monkeypatch.setattr(module, "gl", fake)
        for name, value in list(vars(module).items()):
            body = getattr(value, "fn", None)
            if type(value).__name__ in ("GluonJITFunction", "ConstexprFunction") and body is not None:
                kernel = name.endswith("_kernel")
                monkeypatch.setattr(module, name, Emulated(body, program, launched) if kernel else body)
