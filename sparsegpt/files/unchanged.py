"""Files whose pages a model is made of, and which must stay as they are for as long as it is used.

Pages of a mapped file follow the file. Where somebody writes into it, other weights are read without a word; where it
shrinks, the system ends whoever reads the pages that are gone (SIGBUS).
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sparsegpt.errors import SparseGPTError

_REFUSED = 1  # the exit code


@dataclass(frozen=True)
class Unchanged:
    """Files as they were at a moment: the system's number of each, its bytes, when it was written."""

    seen: Mapping[Path, tuple[int, int, int]] = field(default_factory=dict)

    @classmethod
    def since_now(cls, paths: Iterable[Path]) -> "Unchanged":
        """These files as they are now; OSError as the system raises it."""
        return cls({path: _seen(path) for path in paths})

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Read the files here. SparseGPTError, naming the file, where one is not as it was, before or after."""
        self.check()  # before: whoever reads pages that are gone has no other chance
        try:
            yield
        finally:
            self.check()

    def check(self) -> None:
        """SparseGPTError, naming the file, where one is not as it was.

        A file that is gone still has its pages for those who had mapped them.
        """
        for path, seen in self.seen.items():
            try:
                found = _seen(path)
            except OSError:
                continue
            if found != seen:
                size = f"it had {seen[1]} bytes and has {found[1]}" if found[1] != seen[1] else "somebody wrote into it"
                raise SparseGPTError(
                    f"{path} changed while it was read ({size}): put the file back as it was and begin again"
                )


def mapped_file(address: int) -> str | None:
    """The file whose page is at an address of this process; None for other memory, and where the system does not tell.

    "(deleted)" stands behind a name that is gone.
    """
    try:
        with Path("/proc/self/maps").open(encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                span, _, _, _, inode, *name = line.split(maxsplit=5)
                start, end = (int(part, 16) for part in span.split("-"))
                if start <= address < end:
                    return "".join(name).strip() if inode != "0" else None
    except OSError:
        pass
    return None


def _seen(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


class _Action(ctypes.Structure):
    """sigaction(2) of 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_SA_SIGINFO = 4
_ADDRESS = 16  # byte of siginfo_t where the address stands that could not be read
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


@contextmanager
def bus_errors_told(say: Callable[[str], None]) -> Iterator[None]:
    """Where a page of a file is gone that is read here, `say` which file that was, and end the process with code 1.

    Nothing can go on: the weights are not there, in the middle of a product. What such an end leaves behind is what a
    kill leaves. Python's own handlers come too late, after the instruction that has failed, which fails again for ever.
    """
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        yield
        return
    system, first = ctypes.CDLL(None), threading.Lock()

    def end(number: int, info: int, context: int) -> None:
        path = mapped_file(ctypes.c_size_t.from_address(info + _ADDRESS).value)
        if path is None:  # no page of a file is behind it: the process ends as it would have
            system.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        first.acquire()  # for good: threads that read the same tensor have nothing to add
        with suppress(Exception):
            sys.stdout.flush()
        say(f"{path} became shorter while it was read: put the file back as it was and begin again")
        os._exit(_REFUSED)

    handler, before = _Handler(end), _Action()
    action = _Action(ctypes.cast(handler, ctypes.c_void_p), flags=_SA_SIGINFO)
    system.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(before))
    try:
        yield
    finally:
        system.sigaction(signal.SIGBUS, ctypes.byref(before), None)
