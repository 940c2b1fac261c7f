"""The unfinished run: finished blocks and what was learnt so far, in a folder beside the output.

    .<output name>.unfinished/
        lock                          held by the process that works here
        state.json                    what decides the result, reports of the finished blocks, scores
        beside/                       the result but for its weights, which comes first
        bases.safetensors             bases in which the model is written
        outside-exit.safetensors ...  what of the model is in no block, in these bases, written anew by every run
        plain-abcdefgh/               weights that were integers, as plain numbers, while a run reads them
    block-00000.safetensors ...   the stored tensors of finished blocks, each with checksums
        training-00001.safetensors    what distillation knows after its last finished epoch
        distilled-00000.safetensors ...  blocks that it has changed, written anew by every run that gets so far

A block counts once state.json says so. Every file appears whole or not at all, so a run killed at any moment goes on
after its last finished block. When the output folder is there, this one goes.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Required, TypedDict, TypeVar

from torch import Tensor

from sparsegpt.driver.progress import Progress
from sparsegpt.driver.ranks import ONE_RANK, Ranks
from sparsegpt.driver.reports import BlockReport, EpochReport, LayerReport, PruneReport, RotationReport
from sparsegpt.errors import SparseGPTError
from sparsegpt.eval.perplexity import TextScore
from sparsegpt.eval.tasks import TaskScore
from sparsegpt.files.checked_json import REPORT_NAME, read_checked, write_checked
from sparsegpt.files.folders import flush
from sparsegpt.files.model_files import weight_files
from sparsegpt.files.results import check_target, claimed, filled, is_whole, unfinished_folder, writing
from sparsegpt.files.tensor_files import WEIGHTS, OpenTensors, ShardedWriter, header_room, verify_checksums
from sparsegpt.files.typed_json import misfit
from sparsegpt.incoming.dequantise import MADE

T = TypeVar("T")
VERSION = 1
STATE = "state.json"
# Names of what runs write into this folder.
_OWN = re.compile(
    r"state\.json|\.state\.json\.writing|tensors\.writing|(block|training|distilled)-\d{5}\.safetensors"
    r"|bases\.safetensors|outside-[a-z0-9-]+\.safetensors"
    r"|beside|\.sparsegpt-\w+"
)
# A model's weights made plain while it is loaded: there before a run begins.
_MADE = re.compile(rf"{MADE}\w+")


class State(TypedDict, total=False):
    """What state.json holds."""

    version: Required[int]
    identity: dict[str, Any]
    replaces: bool
    micro_batch: int
    rotation: RotationReport
    layers: list[LayerReport]
    blocks: list[BlockReport]
    epochs: list[EpochReport]
    warnings: list[str]
    seconds: dict[str, float]
    run_seconds: dict[str, float]
    surroundings: dict[str, str]
    evaluation: dict[str, Any]
    scores: dict[str, dict[str, TextScore]]
    task_scores: list[TaskScore]


class ResumeError(SparseGPTError):
    """A refusal that tells what becomes of the finished blocks."""


class WorkFolder(Progress):
    """Keeps finished blocks for `target`. Use as a context manager: it holds the lock.

    What an earlier run has finished stays until a run that may replace it has begun. Among several ranks, rank 0 writes
    and all of them read.
    """

    def __init__(
        self,
        target: Path,
        *,
        resume: bool,
        overwrite: bool,
        sources: Sequence[Path] = (),
        ranks: Ranks = ONE_RANK,
    ) -> None:
        """sources: folders that the run reads."""
        self.ranks = ranks
        self.target, self.resume, self.overwrite, self.sources = target.absolute(), resume, overwrite, sources
        self.folder = unfinished_folder(target)
        self.state: dict[str, Any] = {}
        self.replaces = False  # an old result, which `begin` decides
        self._done = False
        self._claim = ExitStack()

    def __enter__(self) -> "WorkFolder":
        self._by_first(self._open)
        self.ranks.check_sees(self.folder)
        return self

    def _open(self) -> None:
        check_target(self.target, overwrite=self.overwrite or self.resume, sources=self.sources)
        self._claim.enter_context(claimed(self.target))
        try:
            self._open_state()
        except BaseException:
            self._claim.close()
            raise
        self._claim.callback(self._tidy)

    def _tidy(self) -> None:
        """Whoever holds the lock clears up where nothing is to be kept."""
        if self._done or not unfinished_blocks(self.target):
            with suppress(OSError):
                self._clear()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # As the disk has it: a state can arrive whose writing was refused.
        kept = 0 if self._done else unfinished_blocks(self.target)
        self._claim.close()
        if isinstance(error, SparseGPTError) and kept and self.state and not isinstance(error, ResumeError):
            raise SparseGPTError(f"{error}; {kept} finished blocks are kept, go on with --resume") from error

    @property
    def finished(self) -> int:  # type: ignore[override]
        """Number of finished blocks."""
        return len(self.state.get("blocks", []))

    def begin(self, identity: dict[str, Any], report: PruneReport) -> bool:
        """Compare what decides the result with the run that is to go on, and fill the report with what it did.

        Finished blocks do not depend on identity["distillation"]: where it alone is another, its epochs begin anew.
        Returns whether the target is the finished result of this very run already.
        """
        if self._by_first(lambda: self._begin(json.loads(json.dumps(identity)))):
            return True
        report.layers += [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in self.state.get("layers", [])]
        report.blocks += [BlockReport(**row) for row in self.state.get("blocks", [])]
        report.epochs += [EpochReport(**row) for row in self.state.get("epochs", [])]
        report.rotation = self._rotation
        report.seconds.update(self.state.get("seconds", {}))
        report.warnings += self.state.get("warnings", [])
        return False

    def _begin(self, identity: dict[str, Any]) -> bool:
        known = self.state.get("identity")
        if known != identity:
            same_blocks = known is not None and {**known, "distillation": None} == {**identity, "distillation": None}
            if self.finished and not same_blocks:
                raise ResumeError(
                    f"the unfinished run of {self.target} was another one ({_differences(known, identity)}): give the "
                    "same settings, or --overwrite instead of --resume to start again"
                )
            if self.resume and self._is_result(identity):
                return True
            self.state = {**self.state, "epochs": []} if same_blocks else {}
        self.replaces = self.overwrite or bool(self.state.get("replaces")) or self._is_result(identity)
        if not self.replaces:
            check_target(self.target, overwrite=False, sources=self.sources)
        self._drop_damaged()
        with writing(self.folder):
            if not self.state:
                self._clear(loaded=True)
        self._save(identity=identity, replaces=self.replaces)
        return False

    def _by_first(self, act: Callable[[], T]) -> T:
        """What rank 0 does with the folder; every rank then knows the state as it is."""
        found, self.state = self.ranks.first(lambda: (act(), self.state))
        return found

    def load_bases(self) -> dict[str, Tensor] | None:
        """The bases of the unfinished run, mapped from their file."""
        if self._rotation is None:
            return None
        return _mapped(self._bases) if self._rotation else {}

    def keep_bases(self, tensors: dict[str, Tensor], report: PruneReport) -> None:
        """Write bases, if there are any, then say that they are known."""

        def keep() -> None:
            if tensors:
                self._write(self._bases, tensors)
            self._save_report(report)

        self._by_first(keep)

    def keep_outside(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write a rotated module that is in no block; returns its tensors mapped from the file."""
        path = self.folder / f"outside-{name}.safetensors"
        self._by_first(lambda: self._write(path, tensors))
        return _mapped(path)

    def load(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block, mapped from its file."""
        return _mapped(self._block(index))

    def keep(self, index: int, tensors: dict[str, Tensor], report: PruneReport) -> dict[str, Tensor]:
        """Write a finished block, then say that it is finished; returns its tensors mapped from the file."""

        def keep() -> None:
            self._write(self._block(index), tensors)
            self._save_report(report)

        self._by_first(keep)
        return self.load(index)

    def load_training(self) -> dict[str, Tensor]:
        """The state after the last finished epoch, mapped from its file."""
        epoch = self._epoch()
        return _mapped(self._training(epoch)) if epoch else {}

    def keep_training(self, epoch: int, tensors: dict[str, Tensor], report: PruneReport) -> None:
        """Write the state after an epoch, then say that the epoch is finished; the one before has served."""

        def keep() -> None:
            self._write(self._training(epoch), tensors)
            self._save_report(report)
            with writing(self.folder):
                self._training(epoch - 1).unlink(missing_ok=True)

        self._by_first(keep)

    def keep_distilled(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write a block as distillation left it; returns its tensors mapped from the file."""
        path = self.folder / f"distilled-{index:05d}.safetensors"
        self._by_first(lambda: self._write(path, tensors))
        return _mapped(path)

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write tensors with their checksums into a file that appears whole."""
        draft = self.folder / "tensors.writing"
        with writing(self.folder):
            _remove_path(draft)
            draft.mkdir()
            with ShardedWriter(draft, header_room(tensors)) as writer:
                writer.add(*tensors.items())
            flush(draft / WEIGHTS)
            (draft / WEIGHTS).replace(path)
            draft.rmdir()

    def _save_report(self, report: PruneReport) -> None:
        self._save(
            layers=[asdict(layer) for layer in report.layers],
            blocks=[asdict(block) for block in report.blocks],
            epochs=[asdict(epoch) for epoch in report.epochs],
            seconds=report.seconds,
            warnings=report.warnings,
            **({} if report.rotation is None else {"rotation": asdict(report.rotation)}),
        )

    def save_state(self, **changes: Any) -> None:
        """Write the state with these entries changed, as rank 0 has them."""
        self._by_first(lambda: self._save(**changes))

    def _save(self, **changes: Any) -> None:
        state = {**self.state, "version": VERSION, **changes}
        with writing(self.folder):
            write_checked(self.folder / STATE, state)
        self.state = state

    @contextmanager
    def new_result(self) -> Iterator[Path]:
        """A folder to fill that becomes the target; then everything here goes when the lock is given back."""
        with filled(self.target, "run", overwrite=self.replaces, sources=self.sources) as draft:
            yield draft
        self._done = True

    def _open_state(self) -> None:
        path = self.folder / STATE
        if not path.exists() or (self.overwrite and not self.resume):
            return
        try:
            state = read_checked(path)
        except SparseGPTError as error:
            raise SparseGPTError(f"{error}: give --overwrite instead of --resume to start again") from error
        if state.get("version") != VERSION:
            raise SparseGPTError(f"{path} is not of this version: give --overwrite instead of --resume to start again")
        if wrong := misfit(state, State, "state"):
            raise SparseGPTError(f"{path} is damaged ({wrong}): give --overwrite instead of --resume to start again")
        if self.resume:
            self.state = state
        elif state.get("blocks"):
            raise SparseGPTError(
                f"an unfinished run of {self.target} has {len(state['blocks'])} finished blocks: give --resume to go "
                "on, or --overwrite to start again"
            )

    def _clear(self, *, loaded: bool = False) -> None:
        """Remove what runs have written here; the state first, without which nothing else counts.

        loaded: the model of this run is there already, and its files stay.
        """
        (self.folder / STATE).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if _OWN.fullmatch(path.name) or (_MADE.fullmatch(path.name) and not loaded):
                _remove_path(path)

    def _drop_damaged(self) -> None:
        """Forget blocks from the first damaged file on, and all epochs of a training that began after them.

        Without their bases all blocks are lost.
        """
        try:
            if self._rotation:
                verify_checksums(self._bases)
        except (SparseGPTError, OSError):
            self.state = {}
            return
        for index in range(self.finished):
            try:
                verify_checksums(self._block(index))
            except (SparseGPTError, OSError):
                kept = sum(row["linears"] for row in self.state["blocks"][:index])
                self.state["layers"] = self.state["layers"][:kept]
                self.state["blocks"] = self.state["blocks"][:index]
                self.state["epochs"] = []
                return
        try:
            if epoch := self._epoch():
                verify_checksums(self._training(epoch))
        except (SparseGPTError, OSError):
            self.state["epochs"] = []

    def _is_result(self, identity: dict[str, Any]) -> bool:
        """Whether the target holds what such a run ends with, to the last byte of its weights."""
        try:
            if read_checked(self.target / REPORT_NAME).get("identity") != identity or not is_whole(self.target):
                return False
            for path in set(weight_files(self.target).values()):
                verify_checksums(path)
        except (SparseGPTError, OSError):
            return False
        return True

    @property
    def _rotation(self) -> RotationReport | None:
        """What the unfinished run has found of bases; None where it has not looked for any."""
        known = self.state.get("rotation")
        return None if known is None else RotationReport(**known)

    @property
    def _bases(self) -> Path:
        return self.folder / "bases.safetensors"

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _training(self, epoch: int) -> Path:
        return self.folder / f"training-{epoch:05d}.safetensors"

    def _epoch(self) -> int:
        """The last finished epoch of distillation; 0 before the first."""
        return max(0, len(self.state.get("epochs", [])) - 1)


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, whose pages they are."""
    with OpenTensors.of_file(path) as tensors:
        return {name: tensors.mapped(name) for name in tensors}


def unfinished_blocks(target: Path) -> int:
    """How many blocks an unfinished run of this output folder has finished."""
    with suppress(SparseGPTError):
        return len(read_checked(unfinished_folder(target) / STATE).get("blocks", []))
    return 0


def _remove_path(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _differences(then: Any, now: Any, name: str = "") -> str:
    """Which entries of two nested dictionaries differ, and how."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return f"{name}: {then} then, {now} now"
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return "; ".join(_differences(then.get(key), now.get(key), key) for key in keys)
