"""What every job has that makes a model of a model: its texts and windows, its scores, where the time went."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sparsegpt.calib_data import Calibration, TextSource, draw_mixture, load_text, load_texts
from sparsegpt.calib_data.sources import OWN_TEXT
from sparsegpt.counting import counting
from sparsegpt.driver import reports as driver
from sparsegpt.driver.ranks import ONE_RANK, Ranks
from sparsegpt.eval.perplexity import TextScore, score_text
from sparsegpt.model.loading import LoadedModel, load_model
from sparsegpt.run.options import RunOptions


class JobListener(driver.Listener):
    """Told what happens during a job, the driver's work included; this one listens in silence."""

    def stage(self, text: str) -> None:
        """A new part of the work begins."""

    def scored(self, which: str, score: TextScore) -> None:
        """A state of the model, as "dense" or "pruned", was scored on one text."""

    def warn(self, text: str) -> None:
        """Something that the user must not overlook."""


class ScoredJob:
    """The state of one job: the model, what it scored, what was warned of."""

    listener: JobListener
    loaded: LoadedModel
    length: int
    calibration: Calibration
    texts: dict[str, TextSource]

    def __init__(self, options: RunOptions, listener: JobListener) -> None:
        self.options, self.listener = options, listener
        self.started = time.perf_counter()
        self.date = datetime.now(UTC).isoformat(timespec="seconds")
        self.seconds: dict[str, float] = {}
        self.scores: dict[str, dict[str, TextScore]] = {data: {} for data in options.evaluate}
        self.warnings: list[str] = []

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the wall seconds of a part of the work."""
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    @property
    def total_seconds(self) -> float:
        """Since the job began."""
        return time.perf_counter() - self.started

    def warn(self, text: str) -> None:
        """Tell the user, and the report."""
        self.warnings.append(text)
        self.listener.warn(text)

    def load_model(self, stream_through: Path | None = None) -> None:
        """Texts, model, tokenizer and calibration windows. stream_through: as for `load_model`."""
        options = self.options
        with self.measure("load"):
            sources = load_texts(options.calibration, "calibration")
            to_score = {data: load_text(data, "evaluation") for data in options.evaluate}
            self.listener.stage(f"loading {options.model}")
            self.loaded = loaded = load_model(
                options.model,
                dtype=options.dtype,
                device=options.device,
                revision=options.revision,
                trust_remote_code=options.trust_remote_code,
                stream_through=stream_through,
                to_prune=True,
            )
            self.length = loaded.sequence_length(options.sequence_length)
            self.texts = {data: text.for_tokenizer(loaded.tokenizer) for data, text in to_score.items()}
            if any(source.name == OWN_TEXT for source in sources):
                self.listener.stage("the model writes its calibration text")
            self.calibration = draw_mixture(
                sources,
                loaded.tokenizer,
                options.samples,
                self.length,
                options.seed,
                loaded.bos_token(options.bos),
                options.documents,
                loaded.model,
            )

    def score_texts(self, which: str, loaded: LoadedModel, ranks: Ranks = ONE_RANK) -> None:
        """Score a model on every evaluation text that it was not scored on; an absurd dense score is an alarm.

        ranks: who shares the windows out.
        """
        for data, text in self.texts.items():
            found = self.scores[data].get(which)
            if found is None:
                part = f"scoring the {which} model on {data}"
                self.listener.stage(part)
                with self.measure("eval"):
                    found = score_text(
                        loaded.model,
                        loaded.tokenizer,
                        text,
                        self.length,
                        batch_size=self.options.batch_size,
                        bos=self.options.bos,
                        max_windows=self.options.eval_windows,
                        ranks=ranks,
                        counted=counting(self.listener.step, part, "windows"),
                    )
                self.scores[data][which] = found
            self.listener.scored(which, found)
            if which == "dense" and found.alarm:
                self.warn(found.alarm)

    def calibration_in_words(self) -> str:
        """For the model card."""
        words = "{source}, {samples} windows of {sequence_length} tokens, seed {seed}"
        return words.format(**self.calibration.describe())

    def by_text(self, attribute: str) -> dict[str, dict[str, float]]:
        """{text: {state of the model: this attribute of its score}}."""
        return {
            data: {which: getattr(score, attribute) for which, score in by_model.items()}
            for data, by_model in self.scores.items()
        }
