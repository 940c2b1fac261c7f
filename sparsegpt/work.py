"""The unfinished run: finished blocks and what was learnt so far, in a folder beside the output.

    .<output name>.unfinished/
        lock                          held by the process that works here
        state.json                    what decides the result, reports of the finished blocks, scores
        block-00000.safetensors ...   the stored tensors of finished blocks, each with checksums

A block counts once state.json says so. Every file appears whole or not at all, so a run killed at any moment goes on
behind its last finished block. When the output folder is in its place, this one goes.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor

from sparsegpt.checkpoint import REPORT_NAME, write_json
from sparsegpt.errors import SparseGPTError
from sparsegpt.folders import check_target, flush, is_full_disk, recover
from sparsegpt.kernels.tensor_files import WEIGHTS, ShardedWriter, header_room, read_json, verify_checksums
from sparsegpt.pipeline import Progress
from sparsegpt.reports import BlockReport, LayerReport, PruneReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1
# Of each tensor, this many bytes at its beginning, middle and end go into the model's fingerprint.
SAMPLE_BYTES = 4096


class WorkFolder(Progress):
    """Keeps finished blocks for `target`. Use as a context manager: it holds the lock."""

    def __init__(self, target: Path, *, resume: bool, overwrite: bool) -> None:
        self.target, self.resume, self.overwrite = target.absolute(), resume, overwrite
        self.folder = _folder_for(target)
        self.lock = FileLock(self.folder / "lock")
        self.state: dict[str, Any] = {}

    def __enter__(self) -> "WorkFolder":
        check_target(self.target, overwrite=self.overwrite or self.resume)
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise SparseGPTError(
                f"another process is writing {self.target}: wait for it, or choose another --out"
            ) from error
        try:
            recover(self.target)
            self._open_state()
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.finished:
            self.discard()
        self.lock.release()

    @property
    def finished(self) -> int:  # type: ignore[override]
        """Number of finished blocks."""
        return len(self.state.get("blocks", []))

    def begin(self, identity: dict[str, Any], report: PruneReport) -> bool:
        """Compare what decides the result with the run that is to go on, and fill the report with what it did.

        Returns whether the target is the finished result of this very run already.
        """
        identity = json.loads(json.dumps(identity))
        known = self.state.get("identity")
        if known is not None and known != identity:
            raise SparseGPTError(
                f"the unfinished run of {self.target} was another one ({_differences(known, identity)}): give the same "
                "settings, or --overwrite instead of --resume to start again"
            )
        if known is None and self.resume and self._target_identity() == identity:
            return True
        if not self.overwrite and not (known is not None and self.resume):
            check_target(self.target, overwrite=False)
        self._drop_damaged()
        self.state.setdefault("identity", identity)
        report.layers += [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in self.state.get("layers", [])]
        report.blocks += [BlockReport(**row) for row in self.state.get("blocks", [])]
        report.seconds.update(self.state.get("seconds", {}))
        report.warnings += self.state.get("warnings", [])
        return False

    def load(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block, mapped from its file."""
        with safe_open(self._block(index), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping

    def keep(self, index: int, tensors: dict[str, Tensor], report: PruneReport) -> dict[str, Tensor]:
        """Write a finished block, then say that it is finished; returns its tensors mapped from the file."""
        draft = self.folder / "block.writing"
        with _writing(self.folder):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            with ShardedWriter(draft, header_room(tensors)) as writer:
                writer.add(*tensors.items())
            flush(draft / WEIGHTS)
            (draft / WEIGHTS).replace(self._block(index))
            draft.rmdir()
        self.save_state(
            layers=[asdict(layer) for layer in report.layers],
            blocks=[asdict(block) for block in report.blocks],
            seconds=report.seconds,
            warnings=report.warnings,
        )
        return self.load(index)

    def save_state(self, **changes: Any) -> None:
        """Write the state with these entries changed."""
        self.state |= {"version": VERSION, **changes}
        with _writing(self.folder):
            write_json(self.folder / "state.json", self.state)

    def discard(self) -> None:
        """Remove everything: the output is in its place, or nothing was finished."""
        self.state = {}
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open_state(self) -> None:
        path = self.folder / "state.json"
        if not path.exists():
            return
        if self.overwrite and not self.resume:
            self._start_over()
            return
        state = read_json(path)
        if not isinstance(state, dict) or state.get("version") != VERSION:
            raise SparseGPTError(f"{path} is not of this version: give --overwrite to start again")
        if not self.resume and state.get("blocks"):
            raise SparseGPTError(
                f"an unfinished run of {self.target} has {len(state['blocks'])} finished blocks: give --resume to go "
                "on, or --overwrite to start again"
            )
        self.state = state if self.resume else {}

    def _start_over(self) -> None:
        for path in self.folder.glob("*"):
            if path.name != "lock":
                path.unlink()

    def _drop_damaged(self) -> None:
        """Forget blocks from the first damaged file on: they are pruned again."""
        for index in range(self.finished):
            try:
                verify_checksums(self._block(index))
            except (SparseGPTError, OSError):
                kept = sum(row["linears"] for row in self.state["blocks"][:index])
                self.state["layers"] = self.state["layers"][:kept]
                self.state["blocks"] = self.state["blocks"][:index]
                return

    def _target_identity(self) -> Any:
        with suppress(SparseGPTError, OSError, AttributeError):
            return read_json(self.target / REPORT_NAME).get("identity")
        return None

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"


def unfinished_blocks(target: Path) -> int:
    """How many blocks an unfinished run of this output folder has finished."""
    with suppress(SparseGPTError, OSError, AttributeError, TypeError):
        return len(read_json(_folder_for(target) / "state.json").get("blocks", []))
    return 0


def _folder_for(target: Path) -> Path:
    return target.absolute().with_name(f".{target.absolute().name}.unfinished")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn the system's refusals into one line; finished blocks are safe by then."""
    try:
        yield
    except Exception as error:
        if is_full_disk(error):
            raise SparseGPTError(
                f"no space left while writing {folder}: finished blocks are kept; free space and go on with --resume"
            ) from error
        if isinstance(error, OSError):
            raise SparseGPTError(f"{folder} cannot be written ({error.strerror}): choose another --out") from error
        raise


def fingerprint(model: "PreTrainedModel") -> str:
    """sha256 over every tensor's name, shape, dtype and samples of its bytes, and over the configuration."""
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.reshape(-1).view(torch.uint8)
        for start in {0, max(0, len(flat) // 2 - SAMPLE_BYTES), max(0, len(flat) - SAMPLE_BYTES)}:
            digest.update(memoryview(flat[start : start + SAMPLE_BYTES].clone().numpy()))
    return digest.hexdigest()


def _differences(then: Any, now: Any, name: str = "") -> str:
    """Which entries of two nested dictionaries differ, and how."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return f"{name}: {then} then, {now} now"
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return "; ".join(_differences(then.get(key), now.get(key), key) for key in keys)
