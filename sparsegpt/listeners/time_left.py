"""How long a prune will still take, from the blocks that are finished."""

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


def in_words(seconds: float) -> str:
    """Seconds as 1:02:03, or as 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
