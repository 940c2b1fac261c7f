"""Measurements of the kernels: one product at a time, and a whole packed model generating beside its dense form.

    microseconds   median over the rounds, in which the candidates take turns; on a CPU over those rounds in which no
                   thread of the process lost its core to another (the best round when there is none); on a GPU its
                   work alone, launched while earlier work still runs
    GB/s           bytes of the weight that the candidate reads / time; `bandwidth` is what a plain copy reaches here
    read           a plain read of as many bytes takes so long, in the same rounds; on a GPU at the speed of a copy
    speedup        dense library time in the same dtype / candidate's time, of the same run
    ceiling        dense bytes / packed bytes: the most that reading less can give over a dense kernel bound by memory

Nothing is printed; the command line makes the tables. Dimension key: N out_features, K in_features, T tokens."""

from __future__ import annotations

import functools
import gc
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.eval.bench.trial import failure, random_dense, samples_of, trials
from sparsegpt.files.model_files import read_config
from sparsegpt.kernels.checkpoint.packed_config import read_packed_config
from sparsegpt.kernels.cpu import dense as on_cpu
from sparsegpt.kernels.cpu import library
from sparsegpt.kernels.cpu.read import read
from sparsegpt.kernels.dispatch.measured import OWN_DENSE, KernelRow, dtype_name
from sparsegpt.kernels.dispatch.route import DENSE, RESIDENT, Choice, Route
from sparsegpt.kernels.format.pack import packed_shapes
from sparsegpt.model.loading import one_line

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Name = TypeVar("Name")

SHAPES = ((14336, 4096), (4096, 14336))
TOKENS = (1, 4, 16, 64)
_FLUSH_BYTES = 1 << 28
_PAUSE_CYCLES = 400_000  # 0.2 ms


@dataclass(frozen=True)
class KernelFailure:
    """A candidate that was not timed, as its result was wrong or it did not run."""

    kernel: str
    dtype: str
    rows: int
    columns: int
    tokens: int
    reason: str


@dataclass(frozen=True)
class KernelBench:
    """Rows of `bench_kernels`, what failed, and the copy bandwidth of the device in GB/s (read plus written)."""

    device: str
    bandwidth: float
    rows: tuple[KernelRow, ...]
    failed: tuple[KernelFailure, ...] = ()


@dataclass(frozen=True)
class DecodeRow:
    """A model generating: `model` is "dense" or "packed"; memory in bytes, peak None where it cannot be measured."""

    model: str
    tokens_per_second: float
    speedup: float
    weight_bytes: int
    peak_memory_bytes: int | None


def bench_kernels(
    *,
    device: str = "cpu",
    shapes: Iterable[tuple[int, int]] = SHAPES,
    tokens: Iterable[int] = TOKENS,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    rounds: int = 31,
    copy_bytes: int = 1 << 28,
    tried: Mapping[str, str | None] | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> KernelBench:
    """Time the library's dense product and every route that can serve, for each shape, dtype and number of tokens.

    A route whose result is wrong, or that does not run, is reported and not timed. tried: what `trials` found for these
    shapes, by default asked here. tell(line) is called as each shape begins.
    """
    target = torch.device(device)
    shapes, tokens = tuple(shapes), tuple(tokens)
    for shape in shapes:
        packed_shapes(shape)  # refused now, not after the measurements of others
    if tried is None:
        tried = trials(target, dtypes[0], shapes)
    rows: list[KernelRow] = []
    failed: list[KernelFailure] = []
    bandwidth = copy_bandwidth(target, copy_bytes)
    for shape in shapes:
        tell(f"{shape[0]} x {shape[1]}")
        candidates = [found for dtype in dtypes for found in _candidates(random_dense(shape, dtype, target))]
        reads = _reads(target, {candidate.bytes_read for candidate in candidates})
        for count in tokens:
            rows += _bench_one(candidates, reads, bandwidth, count, rounds, tried, failed)
        del candidates
    return KernelBench(str(target), bandwidth, tuple(rows), tuple(failed))


def bench_decode(
    dense: Path,
    packed: Path,
    *,
    trust_remote_code: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    kernels: str = "auto",
    new_tokens: int = 48,
    prompt_tokens: int = 8,
    rounds: int = 6,
) -> list[DecodeRow]:
    """Greedy generation with batch size 1 from a dense folder and from its packed form, taking turns.

    Each token after the first is timed; tokens per second are one over the typical time (`typical_seconds`).
    """
    from transformers import AutoModelForCausalLM

    from sparsegpt.kernels.hf.quantizer import load_packed

    read_packed_config(read_config(packed).get("quantization_config"), packed)  # refused before anything is loaded
    code = {"trust_remote_code": trust_remote_code}

    def load_dense() -> Any:
        with one_line(str(dense)):
            return AutoModelForCausalLM.from_pretrained(dense, dtype=dtype, **code).to(device)

    def load_sparse() -> Any:
        with one_line(str(packed)):
            return load_packed(packed, dtype=dtype, kernels="auto", **code).to(device)

    models, peaks = {}, {}
    for name, load in (("dense", load_dense), ("packed", load_sparse)):
        before = _reset_peak(device)
        models[name] = load()
        if name == "packed":
            _force(models[name], kernels)
        _generate(models[name], prompt_tokens, new_tokens)  # warms up: builds, chooses, allocates
        peaks[name] = _peak_since(device, before)
    steps: dict[str, list[tuple[float, bool]]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            steps[name] += _generate(model, prompt_tokens, new_tokens)
    seconds = {name: typical_seconds(times) for name, times in steps.items()}
    return [
        DecodeRow(name, 1 / seconds[name], seconds["dense"] / seconds[name], _bytes_of(model), peaks[name])
        for name, model in models.items()
    ]


def time_in_turns(runs: Mapping[Name, Callable[[], object]], device: torch.device, rounds: int) -> dict[Name, float]:
    """Seconds of each run: the candidates take turns, so that what disturbs the machine disturbs them alike."""
    taken: dict[Name, list[tuple[float, bool]]] = {name: [] for name in runs}
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for round_ in range(rounds + 1):  # the first round warms up
        for name, run in runs.items():
            if flush is not None:
                flush.zero_()  # a weight read again and again would come from the GPU's cache
                torch.cuda._sleep(_PAUSE_CYCLES)  # until the host has launched what is timed
            before = _preemptions()
            seconds = _time_once(run, device)
            if round_:
                taken[name].append((seconds, device.type == "cpu" and _preemptions() > before))
    return {name: typical_seconds(times) for name, times in taken.items()}


def typical_seconds(times: Sequence[tuple[float, bool]]) -> float:
    """Median of the seconds of undisturbed rounds of [(seconds, disturbed)]; the best round when all were disturbed."""
    calm = sorted(seconds for seconds, disturbed in times if not disturbed)
    return calm[len(calm) // 2] if calm else min(seconds for seconds, _ in times)


def _preemptions() -> int:
    """How often a thread of this process has lost its core while it wanted to run; 0 where nobody counts."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def copy_bandwidth(device: torch.device, size: int) -> float:
    """GB/s of a plain copy of `size` bytes, read plus written."""
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.ones_like(source)
    seconds = time_in_turns({"copy": lambda: target.copy_(source)}, device, 5)["copy"]
    return 2 * size / seconds / 1e9


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A kernel with its weight prepared. dense: the weight that it stands for; choice: among the routes of its form."""

    name: str
    dtype: torch.dtype
    run: Callable[[Tensor], Tensor]
    dense: Tensor
    bytes_read: int
    choice: Choice | None = None

    @property
    def route(self) -> str:
        """The name without the form of the values."""
        return self.name.partition(" ")[0]


def _candidates(dense: Tensor) -> Iterator[_Candidate]:
    """Of a dense 2:4 weight [N, K]: products with itself, and with each form of it every route that can serve.

    A form of which only dense could serve is left out, unless its values are as they were.
    """
    dtype = dense.dtype
    yield _Candidate("library", dtype, lambda inputs: functional.linear(inputs, dense), dense, dense.nbytes)
    if dtype == torch.bfloat16 and dense.is_cpu and on_cpu.most_tokens():
        yield _Candidate(OWN_DENSE, dtype, lambda inputs: on_cpu.run(dense, inputs, None), dense, dense.nbytes)
    for sample in samples_of(dense):
        table, weight = sample.table, sample.weight
        names = [name for name in table.serving(weight) if name != RESIDENT]  # that is the library's product
        if sample.values and names == [DENSE]:
            continue
        expanded = sample.dense() if sample.values else dense
        for name in names:
            run, choice = _prepared(table.routes[name], weight), table.choose(weight)
            yield _Candidate(f"{name} {sample.values}".strip(), dtype, run, expanded, weight.nbytes, choice)


def _prepared(route: Route, weight: Any) -> Callable[[Tensor], Tensor]:
    state = route.prepare(weight)
    return lambda inputs: route.run(state, inputs, None)


def _reads(device: torch.device, sizes: set[int]) -> dict[int, Callable[[], object]]:
    """{bytes: a plain read of as many}; none on a GPU, where a kernel of torch's would not be one."""
    if device.type != "cpu":
        return {}
    memory = torch.ones(-(-max(sizes) // 8), dtype=torch.int64)
    library.to_huge_pages(memory)
    return {size: functools.partial(read, memory[: -(-size // 8)]) for size in sizes}


def _bench_one(
    candidates: Sequence[_Candidate],
    reads: Mapping[int, Callable[[], object]],
    bandwidth: float,
    tokens: int,
    rounds: int,
    tried: Mapping[str, str | None],
    failed: list[KernelFailure],
) -> list[KernelRow]:
    (rows, columns), device = candidates[0].dense.shape, candidates[0].dense.device
    some = torch.randn(tokens, columns, device=device)
    inputs = {candidate.dtype: some.to(candidate.dtype) for candidate in candidates}
    expected = {
        dense: functional.linear(inputs[dtype].float(), dense.float())
        for dense, dtype in {candidate.dense: candidate.dtype for candidate in candidates}.items()
    }
    right = []
    for candidate in candidates:
        run = functools.partial(candidate.run, inputs[candidate.dtype])
        reason = tried.get(candidate.route) or failure(run, expected[candidate.dense])
        if reason is None or candidate.name == "library":
            right.append(candidate)
        else:
            failed.append(KernelFailure(candidate.name, dtype_name(candidate.dtype), rows, columns, tokens, reason))
    runs: dict[Any, Callable[[], object]] = {
        candidate: functools.partial(candidate.run, inputs[candidate.dtype]) for candidate in right
    }
    seconds = time_in_turns({**runs, **reads}, device, rounds)
    dense = {candidate.dtype: seconds[candidate] for candidate in right if candidate.name == "library"}
    return [
        KernelRow(
            kernel=candidate.name,
            dtype=dtype_name(candidate.dtype),
            rows=rows,
            columns=columns,
            tokens=tokens,
            microseconds=taken * 1e6,
            gigabytes_per_second=candidate.bytes_read / taken / 1e9,
            speedup=dense[candidate.dtype] / taken,
            speedup_over_best_dense=min(dense.values()) / taken,
            ceiling=rows * columns * candidate.dtype.itemsize / candidate.bytes_read,
            chosen=candidate.choice is not None and candidate.route == candidate.choice.route(tokens),
            read_microseconds=1e6 * seconds.get(candidate.bytes_read, candidate.bytes_read / bandwidth / 1e9),
        )
        for candidate, taken in ((candidate, seconds[candidate]) for candidate in right)
    ]


def _time_once(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _force(model: Any, kernels: str) -> None:
    from sparsegpt.kernels.layers.linear import set_kernels

    set_kernels(model, kernels)


def _generate(model: Any, prompt_tokens: int, new_tokens: int) -> list[tuple[float, bool]]:
    """(seconds, disturbed) of each token that one generation makes after its first, which includes the prompt."""
    marks: list[tuple[float, int]] = []

    def mark(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        marks.append((time.perf_counter(), _preemptions()))
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    prompt = torch.arange(2, 2 + prompt_tokens, device=model.device)[None]
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    # transformers calls the criteria once a token, and reads the answer on the host: a GPU has finished by then
    model.generate(prompt, attention_mask=torch.ones_like(prompt), stopping_criteria=[mark], **settings)
    return [(end - start, late > early) for (start, early), (end, late) in pairwise(marks)]


def _bytes_of(model: Any) -> int:
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.nbytes for tensor in tensors.values())


def _reset_peak(device: str) -> int | None:
    """Bytes in use now, from which a peak is counted; None where there is no such counter."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew
    except OSError:
        return None
    return _resident("VmRSS")


def _peak_since(device: str, before: int | None) -> int | None:
    if before is None:
        return None
    now = torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else _resident("VmHWM")
    return None if now is None else now - before


def _resident(field: str) -> int | None:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else None
