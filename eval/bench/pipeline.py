"""`bench pipeline`: what sharing saves. The published order beside a pass and a Hessian for every linear.

Each variant runs in a process of its own, so that peak memory is its own; both in one call, on the same windows.
"""

import json
import subprocess
import sys
from dataclasses import dataclass

ORDERS = ("block", "linear")


@dataclass(frozen=True)
class PipelineRow:
    """One variant: seconds of the prune alone, peak resident bytes of its process."""

    order: str
    seconds: float
    peak_memory_bytes: int


def bench_pipeline(model: str, calibration: str, samples: int, sequence_length: int, device: str) -> list[PipelineRow]:
    """Prune `model` to 2:4 with sparsegpt, once in each order."""
    rows = []
    for order in ORDERS:
        arguments = json.dumps([model, calibration, samples, sequence_length, device, order])
        command = [sys.executable, "-m", "sparsegpt.eval.bench.pipeline", arguments]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(PipelineRow(order, **json.loads(result.stdout.splitlines()[-1])))
    return rows


def _measure(model: str, calibration: str, samples: int, sequence_length: int, device: str, order: str) -> None:
    """Prune in this process and print the measurement as one line of JSON."""
    import time

    from sparsegpt.calib_data import draw_windows, load_text
    from sparsegpt.driver.pipeline import prune_model
    from sparsegpt.model.loading import load_model
    from sparsegpt.run.memory import peak_memory

    loaded = load_model(model, device=device)
    text, bos = load_text(calibration, "calibration"), loaded.bos_token("auto")
    windows = draw_windows(text, loaded.tokenizer, samples, sequence_length, 0, bos).windows
    started = time.perf_counter()
    prune_model(loaded.model, windows, "2:4", preset="paper", order=order)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak_memory()["peak_memory_bytes"]}))


if __name__ == "__main__":
    _measure(*json.loads(sys.argv[1]))
