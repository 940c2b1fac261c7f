"""Memory: how much is to be had, and how much is this process's own at its worst moment.

Pages of mapped files do not count: the system takes them back whenever it needs the memory. Allocators keep what was
freed, so a long run would slowly grow unless told otherwise.
"""

import ctypes
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

SECONDS_BETWEEN_LOOKS = 0.02
LARGE = 1 << 20
_M_MMAP_THRESHOLD = -3  # of malloc.h


def private_bytes() -> int | None:
    """Private (anonymous) resident memory of this process; None where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


def give_back_freed_memory() -> None:
    """From now on, memory of LARGE bytes and more returns to the system as soon as it is freed (glibc).

    By itself glibc learns to keep pieces up to 32 MiB, and a heap full of holes then grows from block to block.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, LARGE)


class PeakWatch:
    """Looks at the private memory from time to time; `peak` is the most it saw, None where it cannot be seen.

    by_phase: the most while each phase of `during` lasted; empty where it cannot be seen.
    """

    def __init__(self) -> None:
        self.peak = private_bytes()
        self.by_phase: dict[str, int] = {}
        self._phase: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory watch", daemon=True)

    def __enter__(self) -> "PeakWatch":
        if self.peak is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count what is seen for this long to a phase, too; phases may come again, and end with one look at least."""
        self._phase = phase
        try:
            yield
        finally:
            if self.peak is not None:
                self._see()
            self._phase = None

    def _look(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_LOOKS):
            self._see()

    def _see(self) -> None:
        found, phase = private_bytes() or 0, self._phase
        self.peak = max(self.peak or 0, found)
        if phase is not None:
            self.by_phase[phase] = max(self.by_phase.get(phase, 0), found)


def peak_memory() -> dict[str, int]:
    """What this process held at most: resident bytes (pages of files among them), and bytes on the first GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    peak = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def available_memory() -> int | None:
    """Bytes of memory that can be had without swapping; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


def readable(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.1f} MiB"
