"""Jobs of the command line that are run, disturbed, resumed and compared."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sparsegpt.files.results import MARKER, new_result
from tests.forked import Server
from tests.support import CHILD_ENVIRONMENT

ROOT = Path(__file__).parents[2]
NOBODY = 65534
OLD = {"precious": b"old"}
# What is done to a command before it has ended, see `Forker.finish`.
ENDING = ("kill_after", "when", "disturb")


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code, negative for a signal; what it printed; how long it took."""

    code: int
    out: str
    err: str
    seconds: float

    def refused(self, *fragments: str) -> None:
        """Exit code 1, and one line on stderr with every fragment."""
        assert self.code == 1, (self.code, self.err)
        assert self.err.startswith("sparsegpt: "), self.err
        assert self.err.count("\n") == 1, self.err
        for fragment in fragments:
            assert fragment in self.err

    def refused_or_done(self) -> bool:
        """One line, or nothing to complain of; never a traceback. Whether it was done."""
        if self.code == 0:
            assert self.err == ""
        elif self.code == 2:  # the command line's own refusal of a value
            assert "Traceback" not in self.err
        else:
            self.refused()
        return self.code == 0


class Forker(Server):
    """The other end of `forker.py`. first: commands that it runs itself."""

    def __init__(self, folder: Path, first: list[list[object]]) -> None:
        environment = CHILD_ENVIRONMENT | {"HF_DATASETS_OFFLINE": "1"}
        super().__init__(folder, environment, "-m", "tests.faults.forker", cwd=ROOT)
        self.first = [[str(argument) for argument in job] for job in first]

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.send(self.first)
            assert self.answer() == 0  # it has imported everything
        except BaseException:
            self.server.kill()
            self.__exit__()
            raise
        return self

    def start(self, arguments: list[object], **job: Any) -> int:
        """Begin a command; its process id. Every start is followed by one `finish`."""
        self.began = time.perf_counter()
        return self.begin({"argv": [str(argument) for argument in arguments], **job})

    def finish(
        self,
        process: int,
        kill_after: float | None = None,
        when: Callable[[], bool] = lambda: True,
        disturb: Callable[[], object] | None = None,
    ) -> Outcome:
        """Wait for its end, and meanwhile, as soon as `when` is true, do something to it.

        kill_after: end it by SIGKILL so many seconds later. disturb: call this while it stands still.
        """
        code = None
        if kill_after is not None or disturb is not None:
            while code is None and not when():
                code = self.answer(0.003)
        if kill_after is not None:
            code = self.answer(kill_after) if code is None else code
            if code is None:
                os.kill(process, signal.SIGKILL)
        elif disturb is not None and code is None:
            os.kill(process, signal.SIGSTOP)
            disturb()
            os.kill(process, signal.SIGCONT)
        if code is None:
            code = self.end(process)
        return Outcome(code, self.printed(), self.printed("err"), time.perf_counter() - self.began)

    def run(self, arguments: list[object], **job: Any) -> Outcome:
        """Start a command and wait for its end; `kill_after`, `when` and `disturb` as in `finish`."""
        ending = {name: job.pop(name) for name in ENDING if name in job}
        return self.finish(self.start(arguments, **job), **ending)


class Job:
    """One `sparsegpt run` with the result that an undisturbed process reaches."""

    def __init__(self, forker: Forker, flags: dict[str, object], reference: Path) -> None:
        self.forker, self.flags = forker, flags
        outcome = self.run(reference)
        assert (outcome.code, outcome.err) == (0, ""), outcome.err
        self.seconds = outcome.seconds
        self.result = contents(reference)
        self.report = json.loads((reference / "report.json").read_text())

    def arguments(self, out: Path, *extra: object, **flags: object) -> list[object]:
        """The command line; keyword arguments replace flags, None takes one away."""
        chosen = {**self.flags, "out": out, **{name.replace("_", "-"): value for name, value in flags.items()}}
        return [
            "run",
            *(part for key, value in chosen.items() if value is not None for part in (f"--{key}", value)),
            *extra,
        ]

    def run(self, out: Path, *extra: object, **options: Any) -> Outcome:
        """Run it; `fault`, `user` and ENDING are for the server, other keyword arguments are flags."""
        job = {name: options.pop(name) for name in ("fault", "user", *ENDING) if name in options}
        return self.forker.run(self.arguments(out, *extra, **options), **job)

    def resume(self, out: Path) -> None:
        """Go on after a fault, and end as an undisturbed run does.

        Where the fault came before anything was begun, nobody has allowed yet to replace an old result.
        """
        outcome = self.run(out, "--resume")
        if outcome.code == 1 and finished_blocks(out) is None and everything(out) == OLD:
            outcome.refused("not empty", "--overwrite")
            outcome = self.run(out, "--resume", "--overwrite")
        assert (outcome.code, outcome.err) == (0, ""), outcome.err
        self.check(out)

    def untouched(self, out: Path) -> bool:
        """Nothing is there, or all of the old result, or all of the new one."""
        return not out.exists() or everything(out) == OLD or contents(out) == self.result

    def check(self, out: Path) -> None:
        """The folder is what the undisturbed run wrote, bit by bit, with the same report; nothing lies beside it."""
        found = contents(out)
        assert found.keys() == self.result.keys()
        differing = [name for name in found if found[name] != self.result[name]]
        assert not differing, f"{differing} differ from the undisturbed run"
        assert "## Pruned with sparsegpt" in (out / "README.md").read_text()
        report = json.loads((out / "report.json").read_text())
        assert [without_seconds(row) for row in report["layers"]] == [
            without_seconds(row) for row in self.report["layers"]
        ]
        assert len(report["blocks"]) == len(self.report["blocks"])
        assert report["epochs"] == self.report["epochs"]
        assert report["warnings"] == self.report["warnings"]
        assert not leftovers(out)


def put_old_result(out: Path) -> None:
    """An older result that is in the way, and must not get lost before there is a new one."""
    shutil.rmtree(out, ignore_errors=True)
    with new_result(out, "test", overwrite=True) as draft:
        for name, content in OLD.items():
            (draft / name).write_bytes(content)


# They tell when a result was made and how long it took, and the marker has their checksums.
DATED = ("report.json", "report.html", "README.md", MARKER)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a model folder but those that hold times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in DATED}


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the marker."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "seconds"}


def leftovers(out: Path) -> list[str]:
    """What lies beside an output folder and belongs to it."""
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}."))


def work_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.unfinished")


def finished_blocks(out: Path) -> int | None:
    """How many blocks the work folder has, None without one."""
    try:
        return len(json.loads((work_folder(out) / "state.json").read_text()).get("blocks", []))
    except FileNotFoundError:
        return None
