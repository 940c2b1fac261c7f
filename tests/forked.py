"""Processes forked off one that has heavy libraries imported: a new one needs seconds for them.

`serve` is the loop of the one that forks, `Server` its other end. Run as a script with the names of modules to import,
this file serves Python itself: `Forked`.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Self, TextIO

# Seconds until a child that has not ended is ended.
TIMEOUT = 300.0
# Torch refuses large tensors in new threads of a forked process: the loader must do without threads.
WITHOUT_THREADS = {"HF_DEACTIVATE_ASYNC_LOAD": "1", "TOKENIZERS_PARALLELISM": "false"}


class Server:
    """The other end of a script that calls `serve`. words: what Python is called with for it."""

    def __init__(self, folder: Path, environment: dict[str, str], *words: str, cwd: Path | str = "/") -> None:
        self.files = {name: str(folder / name) for name in ("out", "err")}
        self.environment, self.words, self.cwd = environment | WITHOUT_THREADS, words, cwd

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        command = [sys.executable, *self.words]
        self.server = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=self.environment, cwd=self.cwd, bufsize=0)
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=TIMEOUT)
        self.server.stdout.close()

    def send(self, content: object) -> None:
        """A line of JSON."""
        self.server.stdin.write(json.dumps(content).encode() + b"\n")

    def answer(self, timeout: float = TIMEOUT) -> int | None:
        """A number that the server says; None where it says none for so many seconds."""
        ready, _, _ = select.select([self.server.stdout], [], [], timeout)
        if not ready:
            return None
        line = self.server.stdout.readline()
        assert line, "the forking server is gone"
        return int(line)

    def begin(self, job: dict[str, Any]) -> int:
        """Start a child on a job; its process id. Every one is followed by one `end`."""
        Path(self.files["out"]).write_text("")  # of a child before
        self.send({**job, **self.files})
        return self.answer()

    def end(self, process: int) -> int:
        """The child's exit code, negative for a signal, once it has ended."""
        code = self.answer()
        if code is None:
            os.kill(process, signal.SIGKILL)
            self.answer()
            raise AssertionError("the child did not end")
        return code

    def printed(self, name: str = "out") -> str:
        """What the child has printed so far."""
        return Path(self.files[name]).read_text()


class Forked(Server):
    """Runs Python as `subprocess` does with `sys.executable`, in children that have these modules."""

    def __init__(self, folder: Path, environment: dict[str, str], *modules: str) -> None:
        super().__init__(folder, environment, __file__, *modules)

    def start(self, *words: object, cwd: Path | str = "/") -> int:
        """Begin `python WORDS`, with "-c", "-m" or a script in front; its process id. One `finish` follows."""
        self.process = self.begin({"words": [str(word) for word in words], "cwd": str(cwd)})
        return self.process

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end."""
        code = self.end(self.process)
        return subprocess.CompletedProcess(self.words, code, self.printed(), self.printed("err"))

    def run(self, *words: object, cwd: Path | str = "/") -> subprocess.CompletedProcess[str]:
        """`start` and `finish`."""
        self.start(*words, cwd=cwd)
        return self.finish()

    def python(self, *words: object, cwd: Path | str = "/") -> str:
        """What it prints; it has to end well."""
        ended = self.run(*words, cwd=cwd)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout


def serve(work: Callable[[dict[str, Any]], int], answers: TextIO) -> None:
    """Fork a child for each line of JSON on standard input, which ends with the code that `work` returns for it.

    The answers to a line are the child's process id and then, when it has ended, its exit code, negative for a signal.
    A line names files for what the child prints ("out", "err"), and where it works ("cwd").
    """
    gc.collect()
    gc.freeze()  # what is here for good need not be copied into a child that looks for what can go
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            _child(work, json.loads(line))
        print(process, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answers)


def _child(work: Callable[[dict[str, Any]], int], job: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout.reconfigure(line_buffering=True)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(job.get("cwd", "."))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = work(job)
    except SystemExit as ended:
        code = exit_code(ended)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(ended: SystemExit) -> int:
    """The code with which the interpreter would end."""
    return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def execute(job: dict[str, Any]) -> int:
    """As the interpreter does with these words."""
    how, *rest = words = job["words"]
    sys.path.insert(0, "" if how in ("-c", "-m") else str(Path(how).resolve().parent))
    if how == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif how == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(how, run_name="__main__")
    return 0


def main(modules: list[str]) -> None:
    """Serve Python until the other end closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    sys.path.pop(0)  # this file's folder
    for name in modules:
        importlib.import_module(name)
    serve(execute, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
