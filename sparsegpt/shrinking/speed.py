"""Speed of models side by side: what is compared takes turns, so that what disturbs the machine disturbs all alike."""

import statistics
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from timeit import Timer
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Name = TypeVar("Name", bound=Hashable)
# Rounds in which all take turns, and seconds of each of these measurements at least.
ROUNDS, SECONDS = 5, 0.02
# Tokens that are written one after another.
DECODED = 16


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a model in transformers: read at once, and written one by one."""

    prefill: float
    decode: float


def median_seconds(runs: Mapping[Name, Callable[[], object]], rounds: int = ROUNDS) -> dict[Name, float]:
    """The median over rounds of the seconds of each run."""
    timers = {name: Timer(run) for name, run in runs.items()}
    counts = {name: max(1, int(SECONDS / timer.timeit(1))) for name, timer in timers.items()}  # warms up, too
    found: dict[Name, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            found[name].append(timer.timeit(counts[name]) / counts[name])
    return {name: statistics.median(times) for name, times in found.items()}


def compare_speed(models: Mapping[str, "PreTrainedModel"], tokens: Tensor, rounds: int = ROUNDS) -> dict[str, Speed]:
    """Models by name -> the speed of each, on one window of tokens, LongTensor [sequence]."""
    window = tokens[None]
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, model in models.items():
        runs[name, "prefill"] = partial(_read, model, window)
        runs[name, "decode"] = partial(_write, model, window[:, :DECODED])
    seconds = median_seconds(runs, rounds)
    decoded = min(DECODED, len(tokens))
    return {name: Speed(len(tokens) / seconds[name, "prefill"], decoded / seconds[name, "decode"]) for name in models}


@torch.no_grad()
def _read(model: "PreTrainedModel", window: Tensor) -> object:
    return model(input_ids=window.to(model.device), use_cache=False)


@torch.no_grad()
def _write(model: "PreTrainedModel", window: Tensor) -> object:
    """Token after token, each with the keys and values of those before it."""
    cache = None
    for token in window.to(model.device).split(1, dim=1):
        cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
    return cache
