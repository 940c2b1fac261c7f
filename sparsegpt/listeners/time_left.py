"""How long a prune will still take, from the blocks that are finished, and a part of it, from its steps."""

from sparsegpt.counting import StepReport
from sparsegpt.driver.reports import BlockReport


class TimeLeft:
    """Seconds that the blocks to come will take: as long as the finished ones took in the mean.

    The first block also pays for what is only done once, so from the second one on it no longer counts.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def after(self, report: BlockReport) -> float:
        """Seconds left once this block is finished; blocks that lose no linear cost little, and count as none."""
        if report.linears or not self._seconds:
            self._seconds.append(report.seconds)
        counted = self._seconds[1:] or self._seconds
        return sum(counted) / len(counted) * (report.blocks - report.index - 1)


class StepsLeft:
    """Seconds that the rest of a part of the work will take: a step as long as the finished ones took in the mean.

    The first step no longer counts once there is a second one.
    """

    def __init__(self) -> None:
        self._first: list[StepReport] = []  # where the part began, and what came next

    def after(self, report: StepReport) -> float | None:
        """Seconds left by now; None where nothing is done yet that could tell."""
        known = self._first
        if not known or known[0].part != report.part or report.done <= known[0].done:
            self._first = [report]
            return None
        if len(known) == 1:
            known.append(report)
        since = known[1] if report.done > known[1].done else known[0]
        return (report.seconds - since.seconds) / (report.done - since.done) * (report.total - report.done)


def in_words(seconds: float) -> str:
    """Seconds as 1:02:03, or as 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
