"""Many processes at one prune, started by torchrun: the one file that knows about them.

Each rank carries its share of the calibration windows and solves its share of the weights. What they sum up is
all-reduced, what they solve goes to all of them, so that every rank goes on with the same bits. Rank 0 speaks and
writes. `Ranks` is the only process of its prune, for which all of this is the identity; `Group` is one of several.
"""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sparsegpt.errors import SparseGPTError
from sparsegpt.recovery.training import Trainers
from sparsegpt.settings.machine import pick_device

T = TypeVar("T")
# Minutes that a rank waits for the others.
PATIENCE = 30.0
# Seconds in which a rank that ends is missed by the others; torchrun needs a part of one to see it.
GRACE = 5.0
_MISSING = object()


class Sum(Protocol):
    """Something that adds up what it is given."""

    def over(self, total: Callable[[Tensor], Tensor]) -> None:
        """Become the sum over all ranks; total: that of a tensor, in its place."""


@dataclass(frozen=True)
class Share:
    """Who works on which rows of a matrix. parts: by rank; own: of this rank; team: who works on it at one moment."""

    parts: tuple[slice, ...]
    own: slice
    team: "Ranks"

    @property
    def rows(self) -> int:
        """How many rows are this rank's."""
        return int(self.own.stop - self.own.start)


class Told(NamedTuple):
    """A matrix [R, C] of which this rank has solved its share, in place, and what it has to tell of it."""

    matrix: Tensor
    share: Share
    words: Any


class RankError(SparseGPTError):
    """The others cannot go on, because of another rank."""


class Ranks(Trainers):
    """The only process of a prune: it has all windows, solves everything, and asks nobody.

    rank: its number, world: how many there are, neighbours: how many of them on this machine.
    """

    rank, world, neighbours = 0, 1, 1

    @property
    def speaks(self) -> bool:
        """Whether this rank tells people what happens."""
        return self.rank == 0

    @staticmethod
    def here() -> "Ranks":
        """Those of the process group that a program has set up, if it has."""
        joined = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return Group() if joined else ONE_RANK

    @property
    def alone(self) -> "Ranks":
        """This process for itself."""
        return self

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's share: dealt one by one, so that any number of ranks has the first so many together."""
        return list(items)

    def in_turn(self, items: Sequence[T]) -> list[T]:
        """The shares of all ranks as they were before `share`."""
        return list(items)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank."""
        return [value]

    def first(self, act: Callable[[], T]) -> T:
        """What rank 0 returns from `act`, which no other rank calls, or the SparseGPTError that it raises."""
        return act()

    def add_up(self, *sums: Sum) -> None:
        """Turn sums of each rank into those of all, the same bits everywhere."""

    def split(self, rows: int) -> Share:
        """Rows of a matrix in equal parts, on which the ranks work together."""
        return self.whole(rows, 0)

    def whole(self, rows: int, owner: int) -> Share:
        """A matrix on which one rank works for itself."""
        return Share((slice(0, rows),), slice(0, rows), self)

    def exchange(self, solved: Iterable[Told]) -> Iterator[Any]:
        """What was told of each matrix, by rank 0 or its owner; the matrices are whole by then, on every rank.

        solved: on every rank the same matrices in the same order.
        """
        for told in solved:
            yield told.words

    def agree(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Raise SparseGPTError, with the difference, unless every rank knows the same."""

    def check_sees(self, path: Path) -> None:
        """Raise SparseGPTError unless what rank 0 has written is there for every rank."""

    def give_up(self, error: Exception) -> None:
        """Before another try: raise SparseGPTError where the other ranks do not try again."""

    def place(self, device: str) -> str:
        """The device of this rank where all are told `device`: of GPUs, each rank has one. Raises SparseGPTError."""
        return device


ONE_RANK = Ranks()


class Group(Ranks):
    """One rank of a process group. store: where ranks leave word of their end; None: in a program of somebody else.

    Raises RankError, from every method, for ranks that are gone or do not answer.
    """

    def __init__(self, store: Any = None, patience: float = PATIENCE) -> None:
        self.store, self.patience = store, patience
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._where: list[tuple[str, int]] = []
        self._where = self.gather((socket.gethostname(), os.getpid()))
        self.neighbours = sum(host == self._where[self.rank][0] for host, _ in self._where)

    @property
    def alone(self) -> Ranks:
        """This process, as if it were the only one."""
        return ONE_RANK

    def share(self, items: Sequence[T]) -> list[T]:
        """Every so many-th item; none where there are too few."""
        return list(items[self.rank :: self.world])

    def in_turn(self, items: Sequence[T]) -> list[T]:
        """One of each rank, then the next of each."""
        rounds = zip_longest(*self.gather(list(items)), fillvalue=_MISSING)
        return [item for item in chain.from_iterable(rounds) if item is not _MISSING]  # type: ignore[misc]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, pickled."""
        found: list[Any] = [None] * self.world
        with self._together():
            dist.all_gather_object(found, value)
        return found

    def first(self, act: Callable[[], T]) -> T:
        """What rank 0 returns or raises goes to all."""
        result: list[Any] = [None, None]
        if self.rank:
            with self._together():
                dist.broadcast_object_list(result, src=0)
        else:
            error: Exception | None = None
            try:
                result[0] = act()
            except Exception as raised:
                error, result[1] = raised, (str(raised), getattr(raised, "settings", ()))
            with self._together():
                dist.broadcast_object_list(result, src=0)
            if error is not None:
                raise error
        if result[1] is not None:
            message, settings = result[1]
            raise SparseGPTError(message, settings=settings)
        return result[0]  # type: ignore[no-any-return]

    def add_up(self, *sums: Sum) -> None:
        """All-reduce them one after the other."""
        for each in sums:
            each.over(self._total)

    def split(self, rows: int) -> Share:
        """Equal parts of the rows; fewer rows than ranks are for rank 0 alone."""
        if rows < self.world:
            return self.whole(rows, 0)
        bounds = [rows * rank // self.world for rank in range(self.world + 1)]
        parts = tuple(map(slice, bounds, bounds[1:]))
        return Share(parts, parts[self.rank], self)

    def whole(self, rows: int, owner: int) -> Share:
        """All rows to their owner, none to the others."""
        parts = tuple(slice(0, rows if rank == owner else 0) for rank in range(self.world))
        return Share(parts, parts[self.rank], self.alone)

    def exchange(self, solved: Iterable[Told]) -> Iterator[Any]:
        """Solve everything first; then each owner of rows gives them to all."""
        everything = list(solved)
        words = self.gather([told.words for told in everything])
        for told, by_rank in zip(everything, zip(*words, strict=True), strict=True):
            for owner, rows in enumerate(told.share.parts):
                if rows.start < rows.stop:
                    self._spread(told.matrix[rows], owner)
            yield next(word for word in by_rank if word is not None)

    def average(self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """The mean over ranks of each gradient [...], None where no rank has one; like: tensors of their shapes."""
        known = [any(has) for has in zip(*self.gather([g is not None for g in gradients]), strict=True)]
        found: list[Tensor | None] = []
        for gradient, place, anywhere in zip(gradients, like, known, strict=True):
            mine = torch.zeros_like(place) if gradient is None else gradient
            found.append(self._total(mine.contiguous()).div_(self.world) if anywhere else None)
        return found

    def mean(self, value: float) -> float:
        """The mean over ranks of a number."""
        return sum(self.gather(value)) / self.world

    def agree(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Compare with what rank 0 knows."""
        first, *others = self.gather({name: str(value) for name, value in facts().items()})
        for rank, theirs in enumerate(others, start=1):
            told = [
                f"{name}: {known} on rank 0, {theirs.get(name)} on rank {rank}"
                for name, known in first.items()
                if theirs.get(name) != known
            ]
            if told:
                raise SparseGPTError(f"the ranks differ ({'; '.join(told)}): start all of them with the same")

    def check_sees(self, path: Path) -> None:
        """Raises SparseGPTError, with the ranks that do not see the path."""
        blind = [rank for rank, sees in enumerate(self.gather(path.exists())) if not sees]
        if blind:
            raise SparseGPTError(
                f"{self._named(blind)} on {self._where[blind[0]][0]} cannot see {path}, which rank 0 has written: give "
                "a folder of a file system that all machines share",
                settings=("out",),
            )

    def give_up(self, error: Exception) -> None:
        """Raises SparseGPTError: the others are in the middle of something else."""
        raise SparseGPTError(
            f"{error}: among several ranks a run does not go on by itself with smaller steps; resume it with fewer "
            "windows in one forward pass",
            settings=("resume", "micro_batch"),
        ) from error

    def place(self, device: str) -> str:
        """The GPU of its number on this machine. Raises SparseGPTError where there are too few, or one is named."""
        found = pick_device(device)
        if found.type != "cuda":
            return device
        if ":" in device:
            raise SparseGPTError(
                f"device {device!r} is one GPU for {self.world} ranks: give cuda, of which each has one"
            )
        rank, ranks, gpus = _local("LOCAL_RANK"), _local("LOCAL_WORLD_SIZE"), torch.cuda.device_count()
        if ranks > gpus:
            raise SparseGPTError(
                f"{ranks} ranks of this machine need as many GPUs, and torch finds {gpus}: start {gpus} processes, "
                "or compute on the CPU",
                settings=("device",),
            )
        torch.cuda.set_device(rank)
        return f"cuda:{rank}"

    # How one line comes about, whoever fails.

    def has_the_word(self) -> bool:
        """Whether this is the first rank that has something to say about the end of all."""
        if self.store is None:
            return True
        try:
            return bool(self.store.add("the word", 1) == 1)
        except RuntimeError:  # the store is gone too
            return True

    def loss(self) -> RankError:
        """What is known of the rank because of which the others cannot go on."""
        if gone := self._soon_gone():
            return RankError(f"{gone} has ended, and with it the job")
        far = [rank for rank, (host, _) in enumerate(self._where) if host != self._where[self.rank][0]]
        beyond = f"; no process of this machine is gone, look at {self._named(far)}" if far else ""
        return RankError(
            f"{self._named(self._silent())} did not answer: the time limit is {self.patience:g} minutes{beyond}",
            settings=("rank_timeout",),
        )

    def told_to_stop(self) -> RankError:
        """Why a signal ends this rank: because another one has ended, or because somebody wants it."""
        gone = self._soon_gone()
        return RankError(f"{gone} has ended, and with it the job" if gone else "told to stop by SIGTERM")

    def _soon_gone(self) -> str:
        """Ranks of this machine that have ended, in words; "" for none."""
        deadline, host = time.monotonic() + GRACE, self._where[self.rank][0]
        while time.monotonic() < deadline:
            processes = [(rank, process) for rank, (where, process) in enumerate(self._where) if where == host]
            if gone := [rank for rank, process in processes if not _lives(process)]:
                return f"{self._named(gone)} on {host}"
            time.sleep(0.05)
        return ""

    def _silent(self) -> list[int]:
        """Ranks that are not waiting, as this one was."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        if self.store is None:
            return others
        try:
            self.store.set(f"waited {self.rank}", "")
            time.sleep(GRACE)
            return [rank for rank in others if not self.store.check([f"waited {rank}"])] or others
        except RuntimeError:
            return others

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self.loss() from error

    def _total(self, tensor: Tensor) -> Tensor:
        with self._together():
            wire = _on_wire(tensor)
            dist.all_reduce(wire)
        return tensor if wire is tensor else tensor.copy_(wire)

    def _spread(self, rows: Tensor, owner: int) -> None:
        """Give rows [R, C] of one rank to all, bit by bit."""
        with self._together():
            wire = _on_wire(rows.contiguous())
            dist.broadcast(wire.flatten().view(torch.uint8), src=owner)
        if wire.data_ptr() != rows.data_ptr():
            rows.copy_(wire)

    def _named(self, ranks: Sequence[int]) -> str:
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


@contextmanager
def started(patience: float | None) -> Iterator[Ranks]:
    """The ranks that torchrun has started; without it, the only one. patience: minutes to wait for one another.

    Whatever ends them, one of them has a line for it: the others raise a SparseGPTError that says nothing.
    Raises SparseGPTError for a patience that nobody needs.
    """
    if _local("WORLD_SIZE") == 1:
        if patience is not None:
            raise SparseGPTError("ranks that wait for one another are started by torchrun", settings=("rank_timeout",))
        yield ONE_RANK
        return
    group = _join(PATIENCE if patience is None else patience)
    former = signal.signal(signal.SIGTERM, lambda number, frame: _stop(group))
    try:
        yield group
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not group.has_the_word():
            raise SparseGPTError from None
        if isinstance(error, SparseGPTError) and not {type(error), type(error.__cause__)} & {RankError}:
            raise SparseGPTError(f"rank {group.rank}: {error}") from error
        raise
    signal.signal(signal.SIGTERM, former)
    dist.destroy_process_group()


def refuse_ranks(what: str) -> None:
    """Raise SparseGPTError where torchrun has started several processes for what is the work of one."""
    if _local("WORLD_SIZE") > 1:
        told = f"{what} is the work of one process: start it without torchrun"
        raise SparseGPTError(told if _local("RANK", 0) == 0 else "")


def is_restart() -> bool:
    """Whether torchrun has started these processes anew, after some of them had ended."""
    return _local("TORCHELASTIC_RESTART_COUNT", 0) > 0


def _join(patience: float) -> Group:
    """Meet the other ranks. torchrun keeps the store, so that it outlives them."""
    limit = timedelta(minutes=patience)
    store, rank, world = next(rendezvous("env://", timeout=limit))
    # What those before a restart have left in it would keep these waiting.
    store = PrefixStore(f"start {_local('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=world, timeout=limit
    )
    return Group(store, patience)


def _stop(group: Group) -> None:
    raise group.told_to_stop()


def _local(name: str, otherwise: int = 1) -> int:
    """A number that torchrun has left for its processes."""
    return int(os.environ.get(name, otherwise)) if dist.is_torchelastic_launched() else otherwise


def _on_wire(tensor: Tensor) -> Tensor:
    """The tensor where the process group can carry it: nccl alone takes none of a CPU."""
    return tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor


def _lives(process: int) -> bool:
    """Whether a process of this machine runs still; one that has ended and was not asked for does not."""
    try:
        os.kill(process, 0)
        state = (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
        )
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return state not in ("Z", "X")
