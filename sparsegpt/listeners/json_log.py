"""`run --log-json`: what happens, as one JSON object a line, for machines that watch."""

import json
from dataclasses import asdict
from typing import Any, TextIO

from sparsegpt.driver.reports import BlockReport, EpochReport, LayerReport, RotationReport
from sparsegpt.eval.perplexity import TextScore
from sparsegpt.eval.tasks import TaskScore
from sparsegpt.listeners.time_left import TimeLeft
from sparsegpt.run.job import Listener


class JsonLog(Listener):
    """Writes every event at once: {"event": "block", "index": 0, ...}. file: where to."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._left = file, TimeLeft()

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

    def warn(self, text: str) -> None:
        """A warning."""
        self._tell("warning", text=text)

    def _tell(self, event: str, **values: Any) -> None:
        self._file.write(json.dumps({"event": event, **values}) + "\n")
        self._file.flush()
