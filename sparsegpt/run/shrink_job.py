"""The whole job of `python -m sparsegpt shrink`: load, score, shrink, score again, save. Prints nothing."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sparsegpt.calib_data import Calibration, TextSource, draw_mixture, load_text, load_texts
from sparsegpt.eval.perplexity import TextScore, score_text
from sparsegpt.files.checked_json import REPORT_NAME, write_checked
from sparsegpt.files.figures import CARD_NAME
from sparsegpt.files.results import check_target, claimed, filled
from sparsegpt.model.export import check_names, write_beside, write_weights
from sparsegpt.model.loading import LoadedModel, auto_class, load_model, source_folders
from sparsegpt.run.identity import surroundings, versions
from sparsegpt.run.memory import peak_memory
from sparsegpt.run.model_card import Card
from sparsegpt.run.options import RunOptions
from sparsegpt.run.planning import check_inputs, check_options
from sparsegpt.settings.prune_settings import resolve_settings
from sparsegpt.shrinking.settings import ShrinkSettings
from sparsegpt.shrinking.shrink import ShrinkListener, Shrunk, shrink_model
from sparsegpt.shrinking.speed import Speed, compare_speed


class Listener(ShrinkListener):
    """Told what happens, scores included; this one listens in silence."""

    def scored(self, which: str, score: TextScore) -> None:
        """The "dense" or the "shrunk" model was scored on one text."""

    def warn(self, text: str) -> None:
        """Something that the user must not overlook."""


def shrink(
    options: RunOptions, settings: ShrinkSettings, listener: Listener | None = None, *, speed: bool = True
) -> dict[str, Any]:
    """Write a smaller model to the folder `options.out`, return the report that was written with it.

    Raises SparseGPTError for anything refused. What is there stays as it was until the new is whole.
    """
    check_options(options, resolve_settings(0.0))
    sources = source_folders(options.model)
    check_target(options.out, overwrite=options.overwrite, sources=sources)
    with claimed(options.out):
        check_inputs(options)
        job = _Job(options, settings, listener or Listener())
        job.load()
        job.score("dense", job.loaded)
        smaller = job.shrink()
        job.score("shrunk", smaller)
        if speed:
            job.measure_speed()
        job.listener.stage(f"saving {options.out}")
        with filled(options.out, "shrink", overwrite=options.overwrite, sources=sources) as draft:
            write_beside(smaller, draft)
            write_weights(smaller, draft)
            (draft / CARD_NAME).write_bytes(job.card().added_to(smaller.source.card))
            report = job.report(draft)
            write_checked(draft / REPORT_NAME, report)
    return report


class _Job:
    """The state of one `shrink`."""

    loaded: LoadedModel
    calibration: Calibration
    texts: dict[str, TextSource]
    shrunk: Shrunk

    def __init__(self, options: RunOptions, settings: ShrinkSettings, listener: Listener) -> None:
        self.options, self.settings, self.listener = options, settings, listener
        self.started, self.seconds = time.perf_counter(), dict[str, float]()
        self.date = datetime.now(UTC).isoformat(timespec="seconds")
        self.scores: dict[str, dict[str, TextScore]] = {data: {} for data in options.evaluate}
        self.speeds: dict[str, Speed] = {}
        self.warnings: list[str] = []

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the wall seconds of a part of the work."""
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def warn(self, text: str) -> None:
        """Tell the user, and the report."""
        self.warnings.append(text)
        self.listener.warn(text)

    def load(self) -> None:
        """Texts, model, tokenizer and calibration windows."""
        options = self.options
        with self.measure("load"):
            texts = load_texts(options.calibration, "calibration")
            to_score = {data: load_text(data, "evaluation") for data in options.evaluate}
            self.listener.stage(f"loading {options.model}")
            self.loaded = load_model(
                options.model,
                dtype=options.dtype,
                device=options.device,
                revision=options.revision,
                trust_remote_code=options.trust_remote_code,
                to_prune=True,
            )
            check_names(self.loaded)
            self.length = self.loaded.sequence_length(options.sequence_length)
            self.texts = {data: text.for_tokenizer(self.loaded.tokenizer) for data, text in to_score.items()}
            self.calibration = draw_mixture(
                texts,
                self.loaded.tokenizer,
                options.samples,
                self.length,
                options.seed,
                self.loaded.bos_token(options.bos),
                model=self.loaded.model,
            )
        for note in self.loaded.source.notes():
            self.warn(note)

    def score(self, which: str, loaded: LoadedModel) -> None:
        """Score a model on every evaluation text; an absurd dense score is an alarm."""
        for data, text in self.texts.items():
            self.listener.stage(f"scoring the {which} model on {data}")
            with self.measure("eval"):
                found = self.scores[data][which] = score_text(
                    loaded.model,
                    loaded.tokenizer,
                    text,
                    self.length,
                    batch_size=self.options.batch_size,
                    bos=self.options.bos,
                    max_windows=self.options.eval_windows,
                )
            self.listener.scored(which, found)
            if which == "dense" and found.alarm:
                self.warn(found.alarm)

    def shrink(self) -> LoadedModel:
        """The smaller model, with weights as they will be stored."""
        with self.loaded.source.files.meanwhile():
            self.shrunk = shrink_model(
                self.loaded.model,
                self.calibration.windows,
                settings=self.settings,
                seed=self.options.seed,
                micro_batch=self.options.micro_batch,
                bytes_each=self.loaded.stored_dtype.itemsize,
                listener=self.listener,
            )
        for text in self.shrunk.report.warnings:
            self.warn(text)
        with torch.no_grad():
            for parameter in self.shrunk.model.parameters():
                parameter.copy_(parameter.to(self.loaded.stored_dtype))
        return self.loaded.smaller(self.shrunk.model, self.shrunk.report.changes)

    def measure_speed(self) -> None:
        """Tokens per second, dense and shrunk, in turns."""
        self.listener.stage("measuring tokens per second")
        models = {"dense": self.loaded.model, "shrunk": self.shrunk.model}
        with self.measure("speed"):
            self.speeds = compare_speed(models, self.calibration.windows[0])

    def card(self) -> Card:
        """What the model card says."""
        report, calibration = self.shrunk.report, "{source}, {samples} windows of {sequence_length} tokens, seed {seed}"
        return Card(
            base=self.loaded.source.name,
            patterns=("shrunk",),
            method=self.settings.method,
            rows={
                "kept": f"{report.kept:.1%} of the weights in its blocks: {report.shape}",
                "calibration": calibration.format(**self.calibration.describe()),
                "stored as": str(self.loaded.stored_dtype).removeprefix("torch."),
            },
            perplexities=self._by_text("perplexity"),
            command=self.options.command,
            loader=auto_class(self.loaded.model.config).__name__,
            trust_remote_code=self.options.trust_remote_code,
            made="Made by taking heads, channels or blocks out of the base model: an ordinary, smaller model.",
        )

    def report(self, folder: Path) -> dict[str, Any]:
        """The contents of report.json."""
        found, options = self.shrunk.report, self.options
        return {
            "model": options.model,
            "command": options.command,
            "date": self.date,
            "method": self.settings.method,
            "settings": self.settings.as_dict(),
            **found.as_dict(),
            "layers": [],  # none of them has zeros
            "weight_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            "seed": options.seed,
            "calibration": self.calibration.describe(),
            "perplexity": self._by_text("perplexity"),
            "bits_per_byte": self._by_text("bits_per_byte"),
            "speed": {which: asdict(speed) for which, speed in self.speeds.items()},
            "seconds": {**self.seconds, **found.seconds, "total": time.perf_counter() - self.started},
            **peak_memory(),
            "stored_dtype": str(self.loaded.stored_dtype).removeprefix("torch."),
            "warnings": self.warnings,
            "surroundings": surroundings(),
            "versions": versions(),
        }

    def _by_text(self, attribute: str) -> dict[str, dict[str, float]]:
        return {
            data: {which: getattr(score, attribute) for which, score in by_model.items()}
            for data, by_model in self.scores.items()
        }
