"""`bench pipeline`: what sharing saves. The published order beside a pass and a Hessian for every linear.

Each variant runs in a process of its own, so that peak memory is its own; both in one call, on the same windows.
"""

import json
import subprocess
import sys
from dataclasses import dataclass

from sparsegpt.errors import SparseGPTError
from sparsegpt.model.loading import load_config
from sparsegpt.model.loading import sequence_length as check_length

ORDERS = ("block", "linear")


@dataclass(frozen=True)
class PipelineRow:
    """One variant: seconds of the prune alone, peak resident bytes of its process."""

    order: str
    seconds: float
    peak_memory_bytes: int


def bench_pipeline(
    model: str,
    calibration: str,
    samples: int,
    sequence_length: int,
    device: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[PipelineRow]:
    """Prune `model` to 2:4 with sparsegpt, once in each order.

    Raises SparseGPTError for windows longer than the model's positions, and where a process is refused.
    """
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code, to_prune=True)
    check_length(model, config, sequence_length)
    rows = []
    for order in ORDERS:
        arguments = json.dumps(
            [model, calibration, samples, sequence_length, device, order, revision, trust_remote_code]
        )
        command = [sys.executable, "-m", "sparsegpt.eval.bench.pipeline", arguments]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            said = result.stderr.strip().splitlines() or [f"it ended with exit code {result.returncode}"]
            raise SparseGPTError(said[-1])
        rows.append(PipelineRow(order, **json.loads(result.stdout.splitlines()[-1])))
    return rows


def _measure(
    model: str,
    calibration: str,
    samples: int,
    sequence_length: int,
    device: str,
    order: str,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    """Prune in this process and print the measurement as one line of JSON."""
    import time

    from sparsegpt.calib_data import draw_mixture, load_texts
    from sparsegpt.driver.pipeline import prune_model
    from sparsegpt.model.loading import load_model
    from sparsegpt.run.memory import peak_memory

    texts = load_texts(calibration, "calibration")
    loaded = load_model(model, device=device, revision=revision, trust_remote_code=trust_remote_code, to_prune=True)
    length, bos = loaded.sequence_length(sequence_length), loaded.bos_token("auto")
    windows = draw_mixture(texts, loaded.tokenizer, samples, length, 0, bos, model=loaded.model).windows
    started = time.perf_counter()
    prune_model(loaded.model, windows, "2:4", preset="paper", order=order)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak_memory()["peak_memory_bytes"]}))


if __name__ == "__main__":
    try:
        _measure(*json.loads(sys.argv[1]))
    except SparseGPTError as error:
        sys.exit(str(error))
