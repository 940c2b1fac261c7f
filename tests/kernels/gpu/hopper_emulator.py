"""What wgmma_sp.py uses of Hopper beyond gluon_emulator.py, on the CPU: assembly run line by line for all lanes, sparse
warpgroup products as the PTX manual draws them, shared memory behind a matrix descriptor, and the rules of order
between copies, fences, barriers and products.

Memory that may not be read yet holds NaN, and breaking a rule is an error: a copy counts when waited for; its bytes may
be multiplied after a proxy fence and a barrier; a product happens when waited for; its bytes may be overwritten after
the barrier that follows. Threads run in step, so what one thread does too early for another is seen by the rules alone.
Written from PTX ISA 9.0: matrix descriptor format, canonical layouts (K-major, 128-byte swizzle), sparse matrix storage
for .f16 / .bf16, register fragments for m64nNk16 (D) and, doubled by sparsity, k32 (A)."""

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsegpt.kernels.gpu import mma_sp, wgmma_sp
from tests.kernels.gpu.gluon_emulator import Pointer, emulate, halves

WINDOW = 228 * 1024  # bytes of shared memory
NAN = 0x7FFF  # in float16 and in bfloat16
LANDED, FENCED, SEEN = 1, 2, 3  # a copy's bytes: waited for, visible to products, of all threads


class SharedMemory:
    """Words of 16 bits, how far the copy into each has come, and whether a product still reads it."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.words = torch.full((WINDOW // 2,), NAN, dtype=torch.int16)
        self.progress = torch.zeros(WINDOW // 2, dtype=torch.int8)
        self.read = torch.zeros(WINDOW // 2, dtype=torch.bool)  # by a product that not all threads have waited for
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.groups: list[list[tuple[Tensor, Tensor]]] = []

    def copy(self, target: "Stages", pointer: Pointer, mask: Any) -> None:
        """cp.async with a source size: masked elements are written as zeros."""
        offset, live = pointer.places(mask)
        places = target.places().view(offset.shape)
        assert not self.read[places].any(), "a copy into memory that products read"
        self.words[places], self.progress[places] = NAN, 0
        self.copies.append((places, pointer.storage[offset].masked_fill(~live, 0).view(torch.int16)))

    def commit_group(self) -> None:
        self.groups.append(self.copies)
        self.copies = []

    def wait_group(self, pending: int) -> None:
        while len(self.groups) > pending:
            for places, values in self.groups.pop(0):
                self.words[places], self.progress[places] = values, LANDED

    def fence(self) -> None:
        self.progress[self.progress == LANDED] = FENCED

    def barrier(self) -> None:
        self.progress[self.progress == FENCED] = SEEN
        self.read[:] = False

    def multiply(self, places: Tensor) -> Callable[[str], Tensor]:
        """Begin to read words for a product; the values as the product finds them when it happens."""
        assert (self.progress[places] == SEEN).all(), "a product of memory that is not there for all threads"
        self.read[places] = True
        return lambda dtype: halves(self.words[places].contiguous().view(torch.int32), dtype).flatten(-2)

    def free(self) -> None:
        """The compiler may take the memory for itself."""
        assert not self.copies and not self.groups and not self.read.any(), "memory still in use"


class Stages:
    """NVMMASharedLayout(128, 16 bits) of [stages, rows, 64], or one stage of it."""

    def __init__(self, memory: SharedMemory, shape: list[int], start: int) -> None:
        self.memory, self.shape, self.address = memory, shape, start

    def index(self, stage: int) -> "Stages":
        assert 0 <= stage < self.shape[0]
        rows, columns = self.shape[1:]
        return Stages(self.memory, [rows, columns], self.address + stage * rows * columns * 2)

    def places(self) -> Tensor:
        row, column = torch.arange(self.shape[0])[:, None], torch.arange(64)[None, :]
        return self.address // 2 + shared_offset(row, column)


def shared_offset(row: Tensor, column: Tensor) -> Tensor:
    """Where NVMMASharedLayout puts an element of [rows, 64], in elements."""
    return 64 * row + 8 * (column // 8 ^ row % 8) + column % 8


# ---------------------------------------------------------------- instructions


class Assembly:
    """A block of PTX for WARPS x 32 lanes; $i are the operands, tied ones are one register."""

    def __init__(self, memory: SharedMemory, constraints: str, operands: list[Tensor]) -> None:
        kinds = constraints.split(",")
        results = sum(kind.startswith("=") for kind in kinds)
        assert len(kinds) == results + len(operands)
        self.memory, self.registers = memory, {f"${results + i}": value for i, value in enumerate(operands)}
        for kind, value in zip(kinds[results:], operands, strict=True):
            if kind.isdigit():
                self.registers[f"${kind}"] = value.clone()
        self.results, self.fenced = results, False
        self.issued: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []

    def run(self, text: str) -> list[Tensor]:
        for line in text.replace("{ .reg", ".reg").removesuffix("}").rstrip().removesuffix(";").split(";"):
            name, _, rest = line.strip().partition(" ")
            operands = [part.strip() for part in re.split(r",(?![^{]*})", rest)]
            self.step(name, operands)
        assert not self.issued and not self.groups, "the block ends with products in flight"
        return [self.registers[f"${i}"] for i in range(self.results)]

    def value(self, name: str) -> Any:
        if name == "global_smem":
            return torch.tensor(self.memory.start)
        return self.registers[name] if name in self.registers else torch.tensor(int(name, 0))

    def step(self, name: str, operands: list[str]) -> None:
        simple = {
            "shr.u32": lambda a, b: a >> b,
            "or.b64": torch.bitwise_or,
            "add.u64": torch.add,
            "setp.eq.b32": torch.eq,
            "cvt.u64.u32": lambda a: a,
            "mov.b32": lambda a: a,
        }
        if name in simple:
            self.registers[operands[0]] = simple[name](*(self.value(operand) for operand in operands[1:]))
        elif name == "wgmma.fence.sync.aligned":
            self.fenced = True
        elif name == "wgmma.commit_group.sync.aligned":
            self.groups.append(self.issued)
            self.issued = []
        elif name == "wgmma.wait_group.sync.aligned":
            while len(self.groups) > int(operands[0]):
                for product in self.groups.pop(0):
                    product()
        elif name.startswith("wgmma.mma_async.sp.sync.aligned."):
            assert self.fenced, "a product without wgmma.fence before it"
            self.issued.append(self.product(name.rpartition("aligned.")[2], operands))
        else:
            assert name == ".reg", name

    def product(self, kind: str, operands: list[str]) -> Callable[[], None]:
        """d, a, b-desc, sp-meta, sp-sel, scale-d, imm-scale-a, imm-scale-b, imm-trans-b"""
        found = re.fullmatch(r"m64n(\d+)k32\.f32\.(f16|bf16)\.\2", kind)
        assert found is not None and len(operands) == 9, kind
        tokens, dtype = int(found[1]), found[2]
        d, a = (vector.strip("{}").split(",") for vector in operands[:2])
        assert len(d) == tokens // 2 and len(a) == 4 and tokens % 8 == 0 and tokens <= 256
        scale_d, *immediates = operands[5:]
        assert self.value(scale_d).all() and immediates == ["1", "1", "0"]
        A = sparse_rows(
            torch.stack([self.registers[name] for name in a], -1), self.value(operands[3]), operands[4], dtype
        )
        read = self.memory.multiply(described(self.value(operands[2]), tokens))

        def happen() -> None:
            D_GMN = A @ read(dtype).mT
            warp, lane = torch.arange(D_GMN.shape[0] * 4)[:, None], torch.arange(32)[None, :]
            for j, name in enumerate(d):
                row = 16 * (warp % 4) + lane // 4 + 8 * (j // 2 % 2)
                column = 8 * (j // 4) + 2 * (lane % 4) + j % 2
                self.registers[name] = self.registers[name] + D_GMN[warp // 4, row, column].float()

        return happen


def sparse_rows(a: Tensor, e: Tensor, selector: str, dtype: str) -> Tensor:
    """Operand A [warpgroups, 64, 32] from registers [warps, 32 lanes, 4] and metadata [warps, 32 lanes]."""
    assert selector in ("0", "1")
    row, group, half = torch.arange(64)[:, None, None], torch.arange(8)[None, :, None], torch.arange(2)[None, None, :]
    warp, high, lane = row // 16, row % 16 // 8, 4 * (row % 8)
    # kept pair `group` of a row: lanes of a quad take pairs in turn, the second four in registers 2 and 3
    kept = halves(a, dtype).unflatten(0, (-1, 4))[:, warp, lane + group % 4, high + 2 * (group // 4), half]
    # the selector names the pair of lanes that hold the metadata, each for 16 columns, row g in the low half
    word = e.long().unflatten(0, (-1, 4))[:, warp, lane + 2 * int(selector) + group // 4]
    position = word >> (16 * high + 4 * (group % 4) + 2 * half) & 3
    assert (position[..., 0] != position[..., 1]).all(), "equal positions in the metadata"
    dense = torch.zeros(*kept.shape[:-1], 4, dtype=torch.float64).scatter_add_(-1, position, kept)
    return dense.flatten(-2)


def described(descriptor: Tensor, tokens: int) -> Tensor:
    """Places [warpgroups, tokens, 32], in 16-bit words, of a K-major operand B behind each warpgroup's descriptor."""
    descriptor = descriptor.broadcast_to(descriptor.shape).reshape(-1, 4 * 32)
    assert (descriptor == descriptor[:, :1]).all(), "one descriptor for all threads of a warpgroup"
    fields = descriptor[:, 0, None, None]
    start, leading, stride = ((fields >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    base_offset, mode = fields >> 49 & 7, fields >> 62 & 3
    known = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | base_offset << 49 | mode << 62
    assert (known == fields).all(), "bits outside the fields"
    assert (leading == 16).all() and (base_offset == 0).all() and (mode == 1).all()
    n, k = torch.arange(tokens)[:, None], torch.arange(32)[None, :]
    address = start + 128 * (n % 8) + stride * (n // 8) + 2 * k
    return (address ^ (address >> 7 & 7) << 4) // 2  # Swizzle<3, 4, 3> of the address


# ---------------------------------------------------------------- in place of Gluon


def emulate_hopper(monkeypatch: pytest.MonkeyPatch, *, told: bool, unknown_bytes: int = 0) -> None:
    """Put the emulator in place of Gluon in wgmma_sp, with or without an address told by the compiler.

    `unknown_bytes` of shared memory are taken beside the stages.
    """
    memories: list[SharedMemory] = []
    metadata = SimpleNamespace(shared=0)

    def of_the_block(name: str) -> Callable[..., None]:
        def call(*operands: int) -> None:
            getattr(memories[-1], name)(*operands)

        return call

    def allocate(dtype: torch.dtype, shape: list[int], layout: tuple[int, int]) -> Stages:
        assert layout == (128, 16) and dtype.itemsize == 2 and shape[2] == 64
        memories.append(SharedMemory(1024))
        metadata.shared = math.prod(shape) * 2 + unknown_bytes
        return Stages(memories[-1], shape, 5120 if told else 1024)

    def elementwise(text: str, constraints: str, operands: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
        tensors = torch.broadcast_tensors(*(torch.as_tensor(operand) for operand in operands))
        registers = [part for tensor in tensors for part in tensor.reshape(*tensor.shape[:2], -1).unbind(-1)]
        assert len(registers) == pack * len(operands)  # one block of assembly for all registers of a lane
        results = Assembly(memories[-1], constraints, registers).run(text)
        if not isinstance(dtype, tuple):
            return results[0]
        return tuple(torch.stack(results[i : i + pack], -1).view_as(tensors[0]) for i in range(0, len(results), pack))

    def threadwise(text: str, constraints: str, operands: tuple[Stages], dtype: torch.dtype) -> Tensor:
        (stages,) = operands
        (address,) = Assembly(memories[-1], constraints, [torch.tensor(stages.address)]).run(text)
        return address

    def convert_layout(x: Tensor, layout: None) -> Tensor:
        memories[-1].free()
        return x

    emulate(
        monkeypatch, mma_sp, wgmma_sp,
        launched=SimpleNamespace(metadata=metadata),
        allocate_shared_memory=allocate,
        NVMMASharedLayout=lambda width, element_bitwidth, rank: (width, element_bitwidth),
        BlockedLayout=lambda *parts: None,
        inline_asm_elementwise=elementwise,
        inline_asm=threadwise,
        convert_layout=convert_layout,
        join=lambda a, b: torch.stack([a, b], -1),
    )  # fmt: skip
    monkeypatch.setattr(wgmma_sp, "TELLS_ADDRESS", told)
    monkeypatch.setattr(wgmma_sp, "copy", lambda stage, pointer, mask: stage.memory.copy(stage, pointer, mask))
    monkeypatch.setattr(wgmma_sp, "fence_async_shared", of_the_block("fence"))
    monkeypatch.setattr(wgmma_sp, "barrier", of_the_block("barrier"))
    monkeypatch.setattr(wgmma_sp.async_copy, "commit_group", of_the_block("commit_group"))
    monkeypatch.setattr(wgmma_sp.async_copy, "wait_group", of_the_block("wait_group"))
