"""Which kernel won where: rows shipped with the package, and rows measured on this machine by `sparsegpt tune`.

A row holds for one kind of device, dtype and form of values, and for weights of up to so many elements. Its steps say
which route has beaten dense up to how many tokens; above the last step dense serves.

Steps are judged by what each route gains, dense time / its time. An example, with MARGIN = 1.03 and MANY_TOKENS = 1024:

    tokens         1       8      64     256    1024    4096
    mma_sp      1.60    1.50    1.20    0.90    0.70    0.60
    portable    1.90    0.80    0.70    0.60    0.50    0.40
    cutlass     0.30    0.50    0.90    1.02    1.20    1.40

    few tokens    a route counts from the fewest tokens on, as long as it gains MARGIN: mma_sp to 64, portable to 1. The
                  larger product of gains wins: mma_sp, 1.60 * 1.50 * 1.20 = 2.88, against 1.90.
    many tokens   the same from the most tokens down to MANY_TOKENS: cutlass wins. It serves down to where it stops to
                  gain MARGIN: to 1024.
    between       dense, here at 256

    all columns                    mma_sp up to 64 tokens, dense up to 1023 tokens, cutlass above
    those below MANY_TOKENS alone  mma_sp up to 64 tokens, dense above

Shapes of one size are judged together: the least of their gains must reach MARGIN.

Rows of this machine lie in $XDG_CACHE_HOME/sparsegpt/measured.json (~/.cache by default), under the name of the GPU, or
of the processor and the number of threads, for homes that several machines share. They go before the shipped ones."""

from __future__ import annotations

import functools
import json
import logging
import math
import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.checked_json import read_json
from sparsegpt.files.folders import write_atomically
from sparsegpt.kernels.cpu import library
from sparsegpt.kernels.cpu.build import cache_folder

logger = logging.getLogger(__name__)

ANY = 1 << 62  # tokens or weights: no limit
# What a bench calls this package's product with a dense weight, which is no route of a packed one.
OWN_DENSE = "own-dense"
# What a route must gain over dense to be taken, and the tokens from which what wins goes on winning.
MARGIN, MANY_TOKENS = 1.03, 1024
# Up to so many a CPU's kernels have won on every path that was measured.
FEW_TOKENS = 16
FORMAT = 1

# Up to so many tokens, this route.
Step = tuple[int, str]


@dataclass(frozen=True)
class KernelRow:
    """One candidate on one shape and number of tokens.

    `kernel` is "library" (torch on the dense weight), "own-dense" (our kernel on it, where linears that stay dense go
    through that), a route of the dispatch, or an integer form; `chosen` marks what the automatic choice takes.
    `read_microseconds` is what a plain read of as many bytes took in the same rounds.
    """

    kernel: str
    dtype: str
    rows: int
    columns: int
    tokens: int
    microseconds: float
    gigabytes_per_second: float
    speedup: float
    speedup_over_best_dense: float
    ceiling: float
    chosen: bool
    read_microseconds: float


@dataclass(frozen=True)
class Measured:
    """One row of the table.

    Attributes:
        path: a CPU's instruction set (cpu.library.LEVELS), or the name of a machine (`machine_name`).
        dtype, values: of the inputs; "" for values in that dtype, or "int8", say.
        weights: how many elements the weight may have.
        steps: ascending; dense is decompressed for the call on a CPU, and kept on a GPU.
        resident: the steps where dense is kept on a CPU as well.
        ratio: time of the library on the dense weight / of `winner`, for the fewest tokens measured; for the most where
            no sparse route serves few.
    """

    path: str
    dtype: torch.dtype
    weights: int
    steps: tuple[Step, ...]
    resident: tuple[Step, ...] = ()
    ratio: str = ""
    values: str = ""

    @property
    def winner(self) -> str | None:
        """The first sparse route of the steps."""
        return next((route for _, route in self.steps or self.resident if route != "dense"), None)

    def closed(self, dense: str = "dense") -> tuple[Step, ...]:
        """The steps where dense goes by that name ("dense" or "resident"), the last one without a limit."""
        steps = self.resident if dense == "resident" else self.steps
        if not steps or steps[-1][0] != ANY:
            steps = (*steps, (ANY, "dense"))
        return tuple((limit, dense if route == "dense" else route) for limit, route in steps)


def in_words(steps: Sequence[Step]) -> str:
    """What serves how many tokens, for the user."""
    *limited, (_, last) = steps
    parts = [f"{route} up to {limit} token{'s' if limit > 1 else ''}" for limit, route in limited]
    return ", ".join([*parts, f"{last} above" if parts else last])


# Measured as BENCHMARKS.md says. avx512_bf16: one core of an AMD EPYC (Zen 5). avx512: two cores of an Intel Xeon
# without bfloat16 products; avx2: the same, torch's libraries held to AVX2, and for integers and bitmasks two cores of
# an AMD EPYC, up to 256 tokens. ANY: torch lost on all tokens, up to 1024.
_BF16, _F32 = torch.bfloat16, torch.float32
MEASURED = (
    Measured("avx512_bf16", _BF16, 1 << 23, ((64, "cpu"),), ((32, "cpu"),), "2.2 to 3.7"),
    Measured("avx512_bf16", _BF16, ANY, ((32, "cpu"),), ((16, "cpu"),), "3.0 to 3.9"),
    Measured("avx512_bf16", _F32, 1 << 23, ((1024, "cpu"),), ((1024, "cpu"),), "0.9 to 3.1"),
    Measured("avx512_bf16", _F32, ANY, ((64, "cpu"),), ((64, "cpu"),), "1.9 to 2.8"),
    Measured("avx512", _BF16, ANY, ((ANY, "cpu"),), ((ANY, "cpu"),), "3.0 to 3.3"),
    Measured("avx512", _F32, ANY, ((64, "cpu"),), ((32, "cpu"),), "1.8 to 2.1"),
    Measured("avx2", _BF16, ANY, ((ANY, "cpu"),), ((ANY, "cpu"),), "1.9 to 3.1"),
    Measured("avx2", _F32, ANY, ((16, "cpu"),), ((16, "cpu"),), "1.5 to 1.9"),
    Measured("avx512_bf16", _BF16, ANY, ((48, "cpu"),), (), "4.0 to 5.1", "int8"),
    Measured("avx512_bf16", _BF16, ANY, ((48, "cpu"),), (), "5.0 to 6.6", "int4"),
    Measured("avx512", _BF16, ANY, ((ANY, "cpu"),), (), "2.9 to 4.8", "int8"),
    Measured("avx512", _BF16, ANY, ((ANY, "cpu"),), (), "2.7 to 4.7", "int4"),
    Measured("avx2", _BF16, ANY, ((256, "cpu"),), (), "2.1 to 3.0", "int8"),
    Measured("avx2", _BF16, ANY, ((256, "cpu"),), (), "2.1 to 3.0", "int4"),
    Measured("avx2", _BF16, ANY, ((256, "cpu"),), ((256, "cpu"),), "1.7 to 1.8", "bitmask"),
    Measured("avx2", _BF16, ANY, ((256, "cpu"),), (), "1.4 to 1.6", "bitmask int8"),
    Measured("avx2", _BF16, ANY, ((256, "cpu"),), (), "0.7 to 0.9", "bitmask int4"),
    Measured("avx2", _F32, ANY, ((64, "cpu"),), ((64, "cpu"),), "1.6 to 1.8", "bitmask"),
    Measured("avx2", _F32, ANY, ((64, "cpu"),), (), "2.4 to 2.5", "bitmask int8"),
    Measured("avx2", _F32, ANY, ((64, "cpu"),), (), "1.4", "bitmask int4"),
)


def find(device: torch.device, dtype: torch.dtype, values: str, weights: int) -> Measured | None:
    """The row for a weight of so many elements, or None where nothing like it has been measured."""
    for rows in (remembered().get(machine_name(device), ()), *_shipped(device)):
        alike = [row for row in rows if (row.dtype, row.values) == (dtype, values)]
        if alike:
            return next((row for row in alike if weights <= row.weights), None)
    return None


def _shipped(device: torch.device) -> Iterator[list[Measured]]:
    """The shipped rows of a device; then, for few tokens, those of the lesser paths, which its CPU has too."""
    if device.type != "cpu":
        yield [row for row in MEASURED if row.path == machine_name(device)]
    elif level := library.machine_level():
        best = library.LEVELS.index(level)
        yield [row for row in MEASURED if row.path == level]
        for path in reversed(library.LEVELS[:best]):
            yield [_for_few_tokens(row) for row in MEASURED if row.path == path]


def _for_few_tokens(row: Measured) -> Measured:
    steps, resident = (
        tuple((min(limit, FEW_TOKENS), route) for limit, route in found[:1]) for found in (row.steps, row.resident)
    )
    return replace(row, steps=steps, resident=resident)


def machine_name(device: torch.device) -> str:
    """A GPU's name; a CPU's, with the instruction set that the kernel takes there and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_processor()} ({library.machine_level() or 'no compiler'}, threads: {torch.get_num_threads()})"


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "CPU"


# Judging measurements


def judge(machine: str, measurements: Iterable[KernelRow]) -> tuple[Measured, ...]:
    """The rows that measurements on one machine give, by dtype, form of values and size; sizes ascend, the last is ANY.

    Shapes of one size count together: a route wins where it gains MARGIN on all of them.
    """
    alike: dict[tuple[str, str], dict[int, list[KernelRow]]] = {}
    for row in measurements:
        if row.kernel == OWN_DENSE:
            continue
        values = row.kernel.partition(" ")[2]
        alike.setdefault((row.dtype, values), {}).setdefault(row.rows * row.columns, []).append(row)
    return tuple(
        _judge_size(machine, dtype, values, ANY if size == max(sizes) else size, sizes[size])
        for (dtype, values), sizes in alike.items()
        for size in sorted(sizes)
    )


def _judge_size(machine: str, dtype: str, values: str, weights: int, measurements: list[KernelRow]) -> Measured:
    steps = _steps(_gains(measurements, "dense"))
    resident = _steps(_gains(measurements, "library"))  # none where the library's product is not of these values
    row = Measured(machine, getattr(torch, dtype), weights, steps, resident, values=values)
    if row.winner is None:
        return row
    tokens = (min if (steps or resident)[0][1] == row.winner else max)(found.tokens for found in measurements)
    gains = sorted(found.speedup for found in measurements if (found.tokens, _route(found)) == (tokens, row.winner))
    return replace(row, ratio=" to ".join(dict.fromkeys(f"{gain:.1f}" for gain in (gains[0], gains[-1]))))


def _route(row: KernelRow) -> str:
    return row.kernel.partition(" ")[0]


def _gains(measurements: list[KernelRow], dense: str) -> dict[int, dict[str, list[float]]]:
    """{tokens: {route: dense time / its time, one a shape}}; a route without a time for one of the shapes has a 0."""
    times: dict[tuple[int, int, int], dict[str, float]] = defaultdict(dict)
    for row in measurements:
        times[row.tokens, row.rows, row.columns][_route(row)] = row.microseconds
    routes = {_route(row) for row in measurements} - {"dense", "library"}
    gains: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (tokens, _, _), taken in times.items():
        for route in routes:
            gains[tokens][route].append(taken[dense] / taken[route] if {dense, route} <= taken.keys() else 0.0)
    return gains


def _steps(gains: Mapping[int, Mapping[str, Sequence[float]]]) -> tuple[Step, ...]:
    """One sparse route for few tokens, one for many where so many were measured; dense where it won between them."""
    counts = sorted(gains)
    few_route = _winner(gains, counts)
    few = _run(gains, counts, few_route)
    many_route = _winner(gains, [count for count in counts[::-1] if count >= MANY_TOKENS])
    many = _run(gains, counts[::-1], many_route)
    # From the most tokens down, as long as the other one does not gain as much.
    many = list(takewhile(lambda n: n not in few or sum(gains[n][many_route]) > sum(gains[n][few_route]), many))
    few = [count for count in few if count not in many]
    steps: list[Step] = []
    if few:
        steps.append((ANY if few[-1] == counts[-1] >= MANY_TOKENS else few[-1], few_route))
    if many:
        if len(few) + len(many) < len(counts):
            steps.append((min(many) - 1, "dense"))
        steps.append((ANY, many_route))
    return tuple(steps)


def _winner(gains: Mapping[int, Mapping[str, Sequence[float]]], counts: list[int]) -> str:
    """The route that gains most over the first counts, as long as it wins on all of them; "" where none does."""
    best, most = "", 0.0
    for route in sorted({route for by_route in gains.values() for route in by_route}):
        gained = sum(math.log(gain) for count in _run(gains, counts, route) for gain in gains[count][route])
        if gained > most:
            best, most = route, gained
    return best


def _run(gains: Mapping[int, Mapping[str, Sequence[float]]], counts: list[int], route: str) -> list[int]:
    """The first counts, as long as the route wins on all of them."""
    return list(takewhile(lambda count: route in gains[count] and min(gains[count][route]) >= MARGIN, counts))


# What this machine remembers


def measured_file() -> Path:
    """Where the rows of this machine are kept."""
    return cache_folder().parent / "measured.json"


def remember(rows: Sequence[Measured]) -> Path:
    """Keep the rows of one machine in place of those it had; returns the file.

    Raises SparseGPTError when the file cannot be written, or holds something else.
    """
    try:
        path = measured_file()
        kept = _load(path)
        kept[rows[0].path] = tuple(rows)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # kernels lie in it, too
        machines = {name: [to_plain(row) for row in kept[name]] for name in sorted(kept)}
        write_atomically(path, json.dumps({"format": FORMAT, "machines": machines}, indent=1) + "\n")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise SparseGPTError(
            f"the measurements cannot be kept ({error}); set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    remembered.cache_clear()
    return path


@functools.cache
def remembered() -> dict[str, tuple[Measured, ...]]:
    """{machine: its rows}; empty, and said once, where the file cannot be understood."""
    try:
        return _load(measured_file())
    except (OSError, RuntimeError, SparseGPTError) as error:  # RuntimeError: there is no home
        logger.warning("%s; the measurements shipped with the package serve", error)
        return {}


def dtype_name(dtype: torch.dtype) -> str:
    """As in torch, without its name."""
    return str(dtype).removeprefix("torch.")


def to_plain(row: Measured) -> dict[str, Any]:
    """A row without its machine, as JSON has it."""
    plain = asdict(replace(row, dtype=dtype_name(row.dtype)))  # type: ignore[arg-type]
    del plain["path"]
    return plain


def _load(path: Path) -> dict[str, tuple[Measured, ...]]:
    if not path.exists():
        return {}
    found = read_json(path)
    try:
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}, expected {FORMAT}")
        return {name: tuple(_from_plain(name, row) for row in rows) for name, rows in found["machines"].items()}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise SparseGPTError(
            f"{path}: not measurements of kernels ({error}); delete it and run `python -m sparsegpt tune`"
        ) from error


def _from_plain(machine: str, plain: dict[str, Any]) -> Measured:
    dtype = getattr(torch, plain["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{plain['dtype']!r} is no dtype")
    steps, resident = (
        tuple((int(tokens), str(route)) for tokens, route in plain[key]) for key in ("steps", "resident")
    )
    return Measured(machine, dtype, int(plain["weights"]), steps, resident, str(plain["ratio"]), str(plain["values"]))
