"""A process that has everything imported and forks the command line off itself: a run then costs what its work costs.

Run as a module. The first line on its standard input names jobs that it runs itself, so that what libraries prepare
once is there for every child. After that it serves jobs, see `tests.forked.serve`. A job may carry a fault: `at`: the
number of the write-like call at which it begins; `kind`: "full" (this call and all later ones find the disk full),
"kill" (the process ends there) or "count" (nothing happens). The calls made are listed in the file `calls`. Only calls
below `root` count.
"""

import builtins
import errno
import io
import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from tests.forked import exit_code, serve
from tests.support import look_for_bases_quickly, make_commands_once

# Audit events of calls that change a folder, and which of their arguments are paths.
CHANGES = {"os.mkdir": 1, "os.rename": 2}
REMOVALS = ("os.remove", "os.rmdir")
# The exit code of a command that ended by an exception.
CRASHED = 99


class Faults:
    """Counts write-like calls below a folder and lets one of them fail."""

    def __init__(self, root: str, kind: str, at: int, calls: str) -> None:
        self.root, self.kind, self.at = root, kind, at
        self.seen = 0
        self.calls = os.open(calls, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def happen(self, what: str) -> None:
        """A write-like call is about to be made."""
        here, self.seen = self.seen, self.seen + 1
        os.write(self.calls, f"{what}\n".encode())
        if self.kind == "kill" and here == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        # A new name may find its folder full; taking the old name back then needs no space.
        if self.kind == "full" and (here == self.at or (here > self.at and not what.startswith("os.rename"))):
            raise OSError(errno.ENOSPC, "No space left on device", what)

    def concerns(self, path: object) -> bool:
        """Whether a path lies below the folder."""
        return isinstance(path, str | bytes | os.PathLike) and Path(os.fsdecode(path)).absolute().is_relative_to(
            self.root
        )

    def audit(self, event: str, arguments: tuple) -> None:
        """See what the interpreter is about to do."""
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self.concerns(path)
        elif event in CHANGES:
            changes = all(map(self.concerns, arguments[: CHANGES[event]]))
        else:  # a folder's descriptor comes with names inside it; a full disk lets things be removed
            inside = event in REMOVALS and (self.concerns(arguments[0]) or arguments[1] != -1)
            changes = inside and self.kind != "full"
        if changes:
            self.happen(f"{event} {arguments[0]}")

    def install(self) -> None:
        """For the rest of this process."""
        fsync, reserve, open_ = os.fsync, os.posix_fallocate, io.open
        faults = self

        class Raw(io.FileIO):
            def write(self, data: bytes) -> int:
                faults.happen(f"write {self.name}")
                return super().write(data)

        def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            if opener or not set(mode) & set("wax+") or not self.concerns(file):
                return open_(file, mode, buffering, encoding, errors, newline, closefd, opener)
            buffer = io.BufferedWriter(Raw(file, mode.replace("b", "").replace("t", "")))
            return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

        def flushed(descriptor: int) -> None:
            self.happen(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink()}")
            fsync(descriptor)

        def reserved(descriptor: int, offset: int, length: int) -> None:
            self.happen(f"posix_fallocate {length}")
            reserve(descriptor, offset, length)

        os.fsync, os.posix_fallocate = flushed, reserved
        io.open = builtins.open = opened
        sys.addaudithook(self.audit)


def command(arguments: list[str]) -> int:
    """Run the command line; its exit code."""
    from sparsegpt.cli import commands as cli

    sys.argv = ["sparsegpt", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        return exit_code(ended)
    return 0


def disturbed(job: dict) -> int:
    """Run the command line as somebody else, in other surroundings or with a fault; its exit code."""
    try:
        if job.get("user"):
            os.setgid(job["user"])
            os.setuid(job["user"])
        os.environ.update(job.get("environment", {}))
        if job.get("fault"):
            Faults(**job["fault"]).install()
        return command(job["argv"])
    except BaseException:
        traceback.print_exc()
        return CRASHED


def other_threads() -> list[str]:
    """Names of the threads beside this one. They do not survive a fork; pyarrow's allocator can do without its own."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        if task.name != str(os.getpid()):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                names.append((task / "comm").read_text().strip())
    return [name for name in names if name != "jemalloc_bg_thd"]


def main() -> None:
    """Serve until the other end closes."""
    import torch

    torch.set_num_threads(1)
    look_for_bases_quickly()
    make_commands_once()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    codes = [command(arguments) for arguments in json.loads(sys.stdin.readline())]
    until = time.monotonic() + 30
    while (others := other_threads()) and time.monotonic() < until:
        time.sleep(0.05)  # a pool that is going takes its time on a busy machine
    assert (set(codes), others) == ({0}, []), (codes, others)
    print(0, file=answers)
    serve(disturbed, answers)


if __name__ == "__main__":
    main()
