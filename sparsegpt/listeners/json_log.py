"""`run --log-json`: what happens, as one JSON object a line, for machines that watch."""

import json
from dataclasses import asdict
from typing import Any, TextIO

from sparsegpt.counting import StepReport
from sparsegpt.driver.reports import BlockReport, EpochReport, LayerReport, RotationReport
from sparsegpt.eval.perplexity import TextScore
from sparsegpt.eval.tasks import TaskScore
from sparsegpt.listeners.time_left import StepsLeft, TimeLeft
from sparsegpt.run.job import Listener

# Seconds between two lines on the steps of one part of the work.
PAUSE = 1.0


class JsonLog(Listener):
    """Writes every event at once: {"event": "block", "index": 0, ...}. file: where to."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._left, self._steps_left = file, TimeLeft(), StepsLeft()
        self._told: StepReport | None = None

    def stage(self, text: str) -> None:
        """A new part of the work."""
        self._tell("stage", text=text)

    def scored(self, which: str, score: TextScore) -> None:
        """A perplexity."""
        self._tell("scored", model=which, **asdict(score))

    def scored_task(self, which: str, score: TaskScore) -> None:
        """A metric of a task."""
        self._tell("task", model=which, **asdict(score))

    def rotated(self, report: RotationReport) -> None:
        """What other bases brought."""
        self._tell("rotated", **asdict(report))

    def layer(self, report: LayerReport) -> None:
        """One linear, with the calibration tokens a second that its solve took."""
        self._tell("layer", **asdict(report), tokens_per_second=report.tokens / max(report.seconds, 1e-9))

    def block(self, report: BlockReport) -> None:
        """One block, with the seconds that the others will take."""
        self._tell("block", **asdict(report), seconds_left=self._left.after(report))

    def epoch(self, report: EpochReport) -> None:
        """One epoch of distillation."""
        self._tell("epoch", **asdict(report))

    def step(self, report: StepReport) -> None:
        """Where a part of the work begins and ends, and about every second how far it is."""
        left, last = self._steps_left.after(report), self._told
        goes_on = last is not None and last.part == report.part and last.done < report.done < report.total
        if last is None or not goes_on or report.seconds - last.seconds >= PAUSE:
            self._told = report
            self._tell("step", **asdict(report), seconds_left=left)

    def warn(self, text: str) -> None:
        """A warning."""
        self._tell("warning", text=text)

    def _tell(self, event: str, **values: Any) -> None:
        self._file.write(json.dumps({"event": event, **values}) + "\n")
        self._file.flush()
