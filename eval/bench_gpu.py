"""`bench gpu`: everything about a GPU in one command: correctness first, then kernels, solver, and a whole prune.

Each part writes its JSON as soon as it is done, so that a run cut short keeps what it measured. A part that would begin
after BUDGET_SECONDS is left out and named. `--device cpu --small` is a rehearsal without a GPU.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from sparsegpt.eval.bench_solver import SIZES, bench_solver
from sparsegpt.kernels.bench import SHAPES, bench_kernels
from sparsegpt.kernels.measured import judge, machine_name, to_plain
from sparsegpt.pipeline import prune_blocks
from sparsegpt.settings import resolve_settings

BUDGET_SECONDS = 480.0
TOKENS = (1, 4, 8, 16, 64, 2048)
KERNEL_SHAPES = (*SHAPES, (4096, 4096))


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
        """All parts in order; tell(line) is called as each begins. Returns and writes the results."""
        self.out.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        self.results = {"date": date.today().isoformat(), "device": self._device_name(), "versions": _versions()}
        parts = {
            "correctness": self._correctness,
            "prune": self._prune,
            "solver": self._solver,
            "kernels": self._kernels,
        }
        for name, part in parts.items():
            if time.perf_counter() - started > BUDGET_SECONDS:
                self.results[name] = f"left out: {BUDGET_SECONDS:.0f} s were over"
                continue
            tell(name)
            self.results[name] = part()
            (self.out / "bench-gpu.json").write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")
        return self.results

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor() or "cpu"

    def _correctness(self) -> dict[str, Any]:
        """The tests marked gpu; their last line and exit code."""
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        (self.out / "correctness.log").write_text(result.stdout + result.stderr, encoding="utf-8")
        lines = result.stdout.strip().splitlines()
        return {"exit_code": result.returncode, "summary": lines[-1] if lines else ""}

    def _kernels(self) -> dict[str, Any]:
        shapes, tokens = ((64, 128),) if self.small else KERNEL_SHAPES, (1, 4) if self.small else TOKENS
        dtypes = (torch.bfloat16,)
        found = bench_kernels(device=str(self.device), shapes=shapes, tokens=tokens, dtypes=dtypes)
        rows = judge(machine_name(self.device), found.rows)
        return {**asdict(found), "measured": [to_plain(row) for row in rows]}

    def _solver(self) -> list[dict[str, Any]]:
        sizes = ((128, 128),) if self.small else SIZES
        rows = list(bench_solver(self.device, sizes))
        return [
            asdict(row) | {"speedup": row.speedup, "solve_speedup": row.solve_speedup, "admm_cost": row.admm_cost}
            for row in rows
        ]

    def _prune(self) -> dict[str, Any]:
        """A whole prune to 2:4 of a random OPT, by preset: seconds in all and by part, peak GPU bytes."""
        return {preset: self._prune_once(preset) for preset in ("paper", "default")}

    def _prune_once(self, preset: str) -> dict[str, Any]:
        shape = SMALL if self.small else OPT_1_3B
        model = random_opt(shape, self.device)
        windows = torch.randint(shape.vocabulary, (shape.samples, shape.sequence_length))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        report = prune_blocks(model, windows, resolve_settings("2:4", preset))
        seconds = {"total": time.perf_counter() - started, **report.seconds}
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return {"shape": asdict(shape), "seconds": seconds, "peak_gpu_memory_bytes": peak}


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


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
