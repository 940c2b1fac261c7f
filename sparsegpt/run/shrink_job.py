"""The whole job of `python -m sparsegpt shrink`: load, score, shrink, score again, save. Prints nothing."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.checked_json import REPORT_NAME, write_checked
from sparsegpt.files.figures import CARD_NAME
from sparsegpt.files.results import check_target, claimed, filled
from sparsegpt.model.export import check_names, write_beside, write_weights
from sparsegpt.model.loading import LoadedModel, auto_class, source_folders
from sparsegpt.run.identity import surroundings, versions
from sparsegpt.run.memory import peak_memory
from sparsegpt.run.model_card import Card
from sparsegpt.run.options import RunOptions
from sparsegpt.run.planning import check_inputs, check_options
from sparsegpt.run.scored_job import JobListener, ScoredJob
from sparsegpt.run.shrink_options import SHARED
from sparsegpt.settings.prune_settings import resolve_settings
from sparsegpt.shrinking.settings import ShrinkSettings
from sparsegpt.shrinking.shrink import ShrinkListener, Shrunk, shrink_model
from sparsegpt.shrinking.speed import Speed, compare_speed


class Listener(ShrinkListener, JobListener):
    """Told what happens, scores of the "dense" and the "shrunk" model included; this one listens in silence."""


def shrink(
    options: RunOptions, settings: ShrinkSettings, listener: Listener | None = None, *, speed: bool = True
) -> dict[str, Any]:
    """Write a smaller model to the folder `options.out`, return the report that was written with it.

    Raises SparseGPTError for anything refused. What is there stays as it was until the new is whole.
    """
    _check_shared(options)
    check_options(options, resolve_settings(0.0))
    sources = source_folders(options.model)
    check_target(options.out, overwrite=options.overwrite, sources=sources)
    with claimed(options.out):
        check_inputs(options)
        job = _Job(options, settings, listener or Listener())
        job.load()
        job.score_texts("dense", job.loaded)
        smaller = job.shrink()
        job.score_texts("shrunk", smaller)
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


def _check_shared(options: RunOptions) -> None:
    """Raise SparseGPTError for an option of `run` that says nothing here."""
    for one in fields(options):
        if one.name not in (*SHARED, "out", "command") and getattr(options, one.name) != one.default:
            raise SparseGPTError(f"{one.name} is an option of run that shrink does not have: leave it out")


class _Job(ScoredJob):
    """The state of one `shrink`."""

    listener: Listener
    shrunk: Shrunk

    def __init__(self, options: RunOptions, settings: ShrinkSettings, listener: Listener) -> None:
        super().__init__(options, listener)
        self.settings = settings
        self.speeds: dict[str, Speed] = {}

    def load(self) -> None:
        """Texts, model, tokenizer and calibration windows."""
        self.load_model()
        check_names(self.loaded)
        for note in self.loaded.source.notes():
            self.warn(note)

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
        report = self.shrunk.report
        return Card(
            base=self.loaded.source.name,
            patterns=("shrunk",),
            method=self.settings.method,
            rows={
                "kept": f"{report.kept:.1%} of the weights in its blocks: {report.shape}",
                "calibration": self.calibration_in_words(),
                "stored as": str(self.loaded.stored_dtype).removeprefix("torch."),
            },
            perplexities=self.by_text("perplexity"),
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
            "perplexity": self.by_text("perplexity"),
            "bits_per_byte": self.by_text("bits_per_byte"),
            "speed": {which: asdict(speed) for which, speed in self.speeds.items()},
            "seconds": {**self.seconds, **found.seconds, "total": self.total_seconds},
            **peak_memory(),
            "stored_dtype": str(self.loaded.stored_dtype).removeprefix("torch."),
            "warnings": self.warnings,
            "surroundings": surroundings(),
            "versions": versions(),
        }
