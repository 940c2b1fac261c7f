"""`bench shrink` and `bench speed`: perplexity of smaller models by every method, tokens per second side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsegpt.calib_data import draw_mixture, load_texts
from sparsegpt.eval.bench.quality import QualityBench, QualityRow
from sparsegpt.model.loading import load_model
from sparsegpt.shrinking.shrink import shrink_model
from sparsegpt.shrinking.speed import ROUNDS, compare_speed

# Name in the table -> what to ask for.
LADDER: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "obs": {"error_correction": 0.0, "residual_correction": 0.0},
    "default": {},
    "default+choose": {"choose": "divergence"},
    "default+distill": {"distill": 4},
}


@dataclass(frozen=True)
class ShrinkBench(QualityBench):
    """`QualityBench` for smaller models: a row's pattern is the share of the blocks' weights that is kept."""

    def _prune(self, method: str, pattern: str, grid: str, quantizer: str) -> QualityRow:
        loaded = self._load()
        shrunk = shrink_model(loaded.model, self._windows(loaded), pattern, seed=self.seed, **LADDER[method])
        loaded.model = shrunk.model
        return self._scored(loaded, method, pattern, sum(shrunk.report.seconds.values()))


@dataclass(frozen=True)
class SpeedRow:
    """Tokens per second of a model; times: as fast as the first one."""

    model: str
    parameters: int
    prefill: float
    decode: float
    prefill_times: float
    decode_times: float


def bench_speed(
    models: Sequence[str],
    sequence_length: int,
    *,
    device: str = "auto",
    rounds: int = ROUNDS,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> list[SpeedRow]:
    """Models by folder, Hub id or short name, all in one run and in turns; the first is what others are compared to.

    Raises SparseGPTError for what does not load.
    """
    told: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    loaded = {name: load_model(name, **told) for name in models}
    tokens = _tokens(loaded[models[0]].tokenizer, sequence_length)
    speeds = compare_speed({name: each.model for name, each in loaded.items()}, tokens, rounds)
    first = speeds[models[0]]
    return [
        SpeedRow(
            name,
            sum(parameter.numel() for parameter in loaded[name].model.parameters()),
            speed.prefill,
            speed.decode,
            speed.prefill / first.prefill,
            speed.decode / first.decode,
        )
        for name, speed in speeds.items()
    ]


def _tokens(tokenizer: Any, count: int) -> Any:
    """LongTensor [count] of the embedded text: what it says costs no time."""
    return draw_mixture(load_texts("pydoc", "calibration"), tokenizer, 1, count, 0, None).windows[0]
