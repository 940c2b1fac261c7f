"""How much memory is this process's own, at its worst moment.

Pages of mapped files do not count: the system takes them back whenever it needs the memory. Allocators keep what was
freed, so a long run would slowly grow unless told otherwise.
"""

import ctypes
import sys
import threading
from pathlib import Path
from types import TracebackType

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
    """Looks at the private memory from time to time; `peak` is the most it saw, None where it cannot be seen."""

    def __init__(self) -> None:
        self.peak = private_bytes()
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

    def _look(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_LOOKS):
            self.peak = max(self.peak or 0, private_bytes() or 0)
