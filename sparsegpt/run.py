"""The whole job behind `python -m sparsegpt run`: load, score, prune, score again, save.

Prints nothing. What happens meanwhile is told to a `Listener`; everything measured is in the report.
"""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsegpt.blocks import name_filter
from sparsegpt.calib_data import Calibration, draw_windows, load_text
from sparsegpt.checkpoint import REPORT_NAME, check_target, new_folder, write_json
from sparsegpt.eval.perplexity import TextScore, score_text
from sparsegpt.models import DEMO, LoadedModel, load_model
from sparsegpt.pipeline import prune_blocks
from sparsegpt.reports import BlockReport, LayerReport, PruneReport, peak_memory
from sparsegpt.settings import PruneSettings

PACKAGES = ("sparsegpt", "torch", "transformers", "datasets", "safetensors")


class Listener:
    """Told what happens during a run; this one listens in silence."""

    def stage(self, text: str) -> None:
        """A new part of the work begins."""

    def scored(self, which: str, score: TextScore) -> None:
        """The "dense" or "pruned" model was scored on one text."""

    def layer(self, report: LayerReport) -> None:
        """One linear is pruned."""

    def block(self, report: BlockReport) -> None:
        """One decoder block is finished."""

    def warn(self, text: str) -> None:
        """Something that the user must not overlook."""


@dataclass(frozen=True)
class RunOptions:
    """What to run on and where to put it; how to prune is in PruneSettings.

    sequence_length None: min(2048, the model's limit). evaluate: data names or files, may be empty;
    eval_windows: score at most so many windows of each.
    """

    model: str
    calibration: str
    evaluate: tuple[str, ...]
    out: Path
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    eval_windows: int | None = None
    bos: str = "auto"
    only: str | None = None
    skip: str | None = None
    include_head: bool = False
    overwrite: bool = False


@dataclass
class _Clock:
    """Seconds by part of the work."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


def default_data(model: str, role: str) -> str:
    """The text used when none is named: pydoc for the demo, else c4 to calibrate and wikitext2 to evaluate."""
    if model == DEMO:
        return "pydoc"
    return "c4" if role == "calibration" else "wikitext2"


def run(options: RunOptions, settings: PruneSettings, listener: Listener | None = None) -> dict[str, Any]:
    """Prune a model as told, write the folder `options.out`, return the report that was written with it.

    Raises SparseGPTError for anything refused; nothing is written then, and an old result stays as it was.
    """
    listener = listener or Listener()
    clock = _Clock()
    check_target(options.out, overwrite=options.overwrite)
    select = name_filter(options.only, options.skip)
    with clock.measure("total"):
        listener.stage(f"loading {options.model}")
        with clock.measure("load"):
            loaded = load_model(options.model, dtype=options.dtype, device=options.device)
            length = options.sequence_length or loaded.default_sequence_length
            text = load_text(options.calibration, "calibration")
            calibration = draw_windows(text, loaded.tokenizer, options.samples, length, options.seed)
        scores: dict[str, dict[str, TextScore]] = {data: {} for data in options.evaluate}
        _score_all("dense", loaded, options, length, scores, clock, listener)
        for score in scores.values():
            if alarm := score["dense"].alarm:
                listener.warn(alarm)
        listener.stage(f"pruning to {settings.sparsity} with {settings.method}")
        pruned = prune_blocks(
            loaded.model,
            calibration.windows,
            settings,
            select=select,
            include_head=options.include_head,
            on_layer=listener.layer,
            on_block=listener.block,
        )
        loaded.round_to_stored()
        _score_all("pruned", loaded, options, length, scores, clock, listener)
    for warning in pruned.warnings:
        listener.warn(warning)
    report = _report(options, loaded, calibration, pruned, scores, clock)
    listener.stage(f"saving {options.out}")
    with new_folder(options.out, overwrite=options.overwrite) as draft:
        loaded.save(draft)
        write_json(draft / REPORT_NAME, report)
    return report


def _score_all(
    which: str,
    loaded: LoadedModel,
    options: RunOptions,
    length: int,
    scores: dict[str, dict[str, TextScore]],
    clock: _Clock,
    listener: Listener,
) -> None:
    for data in options.evaluate:
        listener.stage(f"scoring the {which} model on {data}")
        with clock.measure("eval"):
            scores[data][which] = score_text(
                loaded.model,
                loaded.tokenizer,
                data,
                length,
                batch_size=options.batch_size,
                bos=options.bos,
                max_windows=options.eval_windows,
            )
        listener.scored(which, scores[data][which])


def _report(
    options: RunOptions,
    loaded: LoadedModel,
    calibration: Calibration,
    pruned: PruneReport,
    scores: dict[str, dict[str, TextScore]],
    clock: _Clock,
) -> dict[str, Any]:
    """The contents of report.json."""
    perplexity = {
        data: {which: score.perplexity for which, score in by_model.items()} for data, by_model in scores.items()
    }
    bits = {
        data: {which: score.bits_per_byte for which, score in by_model.items()} for data, by_model in scores.items()
    }
    return {
        "model": loaded.name,
        **pruned.as_dict(),
        "seed": options.seed,
        "calibration": calibration.describe(),
        "perplexity": perplexity,
        "bits_per_byte": bits,
        "seconds": {**clock.seconds, **pruned.seconds},
        **peak_memory(),
        "stored_dtype": str(loaded.stored_dtype).removeprefix("torch."),
        "warnings": [score["dense"].alarm for score in scores.values() if score["dense"].alarm] + pruned.warnings,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
