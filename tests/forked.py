"""Python in a process of its own, forked off one that has heavy libraries imported: a new one needs seconds for them.

Run as a script with the names of the modules to import. After that it reads one JSON line a job, answers with the
child's process id and then, when the child has ended, with its exit code (negative: killed by that signal).
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

# Torch refuses large tensors in new threads of a forked process: the loader must do without threads.
WITHOUT_THREADS = {"HF_DEACTIVATE_ASYNC_LOAD": "1", "TOKENIZERS_PARALLELISM": "false"}


class Forked:
    """The other end: runs Python as `subprocess` does with `sys.executable`, in children of one server."""

    def __init__(self, folder: Path, environment: dict[str, str], *modules: str) -> None:
        self.files = {name: str(folder / name) for name in ("out", "err")}
        self.environment, self.modules = environment | WITHOUT_THREADS, modules

    def __enter__(self) -> "Forked":
        self.server = subprocess.Popen(
            [sys.executable, __file__, *self.modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
            cwd="/",
            text=True,
            bufsize=1,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=60)
        self.server.stdout.close()

    def start(self, *words: object, cwd: Path | str = "/") -> int:
        """Begin `python WORDS`, with "-c", "-m" or a script in front; its process id. One `finish` follows."""
        Path(self.files["out"]).write_text("")  # of a child before
        job = {"words": [str(word) for word in words], "cwd": str(cwd), **self.files}
        print(json.dumps(job), file=self.server.stdin)
        return self._answer()

    def printed(self) -> str:
        """What the child has printed so far."""
        return Path(self.files["out"]).read_text()

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end."""
        code = self._answer()
        return subprocess.CompletedProcess(self.modules, code, self.printed(), Path(self.files["err"]).read_text())

    def _answer(self) -> int:
        line = self.server.stdout.readline()
        assert line, "the forking server is gone"
        return int(line)

    def run(self, *words: object, cwd: Path | str = "/") -> subprocess.CompletedProcess[str]:
        """`start` and `finish`."""
        self.start(*words, cwd=cwd)
        return self.finish()

    def python(self, *words: object, cwd: Path | str = "/") -> str:
        """What it prints; it has to end well."""
        ended = self.run(*words, cwd=cwd)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout


def execute(words: list[str]) -> None:
    """As the interpreter does with these words."""
    how, *rest = words
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


def child(job: dict[str, Any]) -> None:
    """Do a job as a process of its own; never returns."""
    code = 1
    try:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout.reconfigure(line_buffering=True)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(job["cwd"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        execute(job["words"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(modules: list[str]) -> None:
    """Serve until the other end closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    sys.path.pop(0)  # this file's folder
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is here for good need not be copied into a child that looks for what can go
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            child(json.loads(line))
        print(process, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answers)


if __name__ == "__main__":
    main(sys.argv[1:])
