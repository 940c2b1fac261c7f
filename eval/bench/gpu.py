"""`bench gpu`: everything about a GPU in one command: correctness first, then kernels, solver, and a whole prune.

Each part runs in a process of its own and has to be done by its deadline: a kernel that faults ends all later work of
its process, one that hangs ends nothing, and neither costs more than the part it is in. What a part has measured by
then is kept: bench-gpu.json holds it, NAME.log what the part printed.
`--device cpu --small` is a rehearsal without a GPU. `python -m sparsegpt.eval.bench.gpu PART DEVICE FILE [small]` is
such a process.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from sparsegpt.driver.pipeline import prune_model
from sparsegpt.eval.bench.kernels import SHAPES, KernelFailure, bench_kernels
from sparsegpt.eval.bench.solver import SIZES, bench_solver
from sparsegpt.eval.bench.trial import last_error, trials
from sparsegpt.files.folders import write_atomically
from sparsegpt.kernels.dispatch.measured import KernelRow, judge, machine_name, to_plain

# Seconds after the start by which a part must be done, in the order of the parts: under nine minutes in all.
DEADLINES = {"correctness": 180.0, "kernels": 360.0, "solver": 420.0, "prune": 525.0}
TOKENS = (1, 4, 8, 16, 64, 2048)
KERNEL_SHAPES = (*SHAPES, (4096, 4096))
TRIAL_SECONDS = 75.0


@dataclass(frozen=True)
class ModelShape:
    """A random OPT and its calibration: the shape alone decides the time."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    samples: int
    sequence_length: int


OPT_1_3B = ModelShape(2048, 24, 32, 50272, 128, 2048)
SMALL = ModelShape(64, 2, 4, 256, 4, 64)


@dataclass
class GpuBench:
    """One session of measurements on `device`, written to the folder `out`."""

    device: torch.device
    out: Path
    small: bool = False
    results: dict[str, Any] = field(default_factory=dict)

    def run(self, tell: Callable[[str], None]) -> dict[str, Any]:
        """All parts in order; tell(line) is called as each begins. Returns and writes the results.

        A part is a dictionary of what it measured, with "failed", a reason, where it did not get to its end.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        self.results = {"date": date.today().isoformat(), "device": _device_name(self.device), "versions": _versions()}
        for name, deadline in DEADLINES.items():
            tell(name)
            self.results[name] = self._part(name, started + deadline - time.monotonic())
            write_atomically(self.out / "bench-gpu.json", json.dumps(self.results, indent=2) + "\n")
        return self.results

    def _part(self, name: str, seconds: float) -> dict[str, Any]:
        """What a process of its own measured in so many seconds."""
        log, kept = self.out / f"{name}.log", self.out / f"{name}.json"
        kept.unlink(missing_ok=True)
        failed = _run_for(self._command(name, kept), log, seconds)
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        kept.unlink(missing_ok=True)
        if name == "correctness":
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            found["summary"] = next((line for line in reversed(lines) if line), "")
        return found if failed is None else {**found, "failed": failed}

    def _command(self, name: str, kept: Path) -> list[str]:
        if name == "correctness":  # other libraries there may warn of what is none of these tests' business
            return [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-o", "filterwarnings="]
        small = ["small"] if self.small else []
        return [sys.executable, "-m", "sparsegpt.eval.bench.gpu", name, str(self.device), str(kept), *small]


def _run_for(command: list[str], log: Path, seconds: float) -> str | None:
    """Run a command, its output going to a file as it comes; why it did not end well in so many seconds, or None."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(max(0.0, seconds))
        except BaseException as ended:  # its deadline, or Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that it has started
            process.wait()
            if not isinstance(ended, subprocess.TimeoutExpired):
                raise
            return f"not done after {max(0.0, seconds):.0f} s"
    return None if code == 0 else last_error(log.read_text(encoding="utf-8", errors="replace"), code)


def measure_kernels(device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
    """Every kernel on each shape; the whole so far after each shape, with the rows that dispatch would go by."""
    shapes, tokens = ((64, 128),) if small else KERNEL_SHAPES, (1, 4) if small else TOKENS
    dtypes = (torch.bfloat16,)
    tried = trials(device, dtypes[0], shapes, TRIAL_SECONDS)
    rows: list[KernelRow] = []
    failed: list[KernelFailure] = []
    for shape in shapes:
        found = bench_kernels(device=str(device), shapes=(shape,), tokens=tokens, dtypes=dtypes, tried=tried)
        rows += found.rows
        failed += found.failed
        measured = judge(machine_name(device), tuple(rows))
        yield {
            "device": found.device,
            "bandwidth": found.bandwidth,
            "rows": [asdict(row) for row in rows],
            "failures": [asdict(failure) for failure in failed],
            "measured": [to_plain(row) for row in measured],
        }


def measure_solver(device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
    """The layer solvers beside the textbook; the whole so far after each layer and pattern."""
    rows: list[dict[str, Any]] = []
    for row in bench_solver(device, ((128, 128),) if small else SIZES):
        rows.append(asdict(row))
        yield {"rows": rows}


def measure_prune(device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
    """A whole prune to 2:4 of a random OPT, by preset: seconds in all and by part, peak GPU bytes."""
    shape = SMALL if small else OPT_1_3B
    found: dict[str, Any] = {"shape": asdict(shape)}
    for preset in ("paper", "default"):
        model = random_opt(shape, device)
        windows = torch.randint(shape.vocabulary, (shape.samples, shape.sequence_length))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        report = prune_model(model, windows, "2:4", preset=preset)
        seconds = {"total": time.perf_counter() - started, **report.seconds}
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        found[preset] = {"seconds": seconds, "peak_gpu_memory_bytes": peak}
        yield found


PARTS = {"kernels": measure_kernels, "solver": measure_solver, "prune": measure_prune}


def random_opt(shape: ModelShape, device: torch.device) -> Any:
    """An OPT with random weights, float16 on a GPU and float32 on a CPU."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        word_embed_proj_dim=shape.hidden,
        ffn_dim=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.sequence_length,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = OPTForCausalLM(config)
    return model.to(torch.float16 if device.type == "cuda" else torch.float32).eval()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    part, device_name, kept_in, *rest = sys.argv[1:]
    for so_far in PARTS[part](torch.device(device_name), bool(rest)):
        write_atomically(Path(kept_in), json.dumps(so_far))  # it may be killed at any moment
