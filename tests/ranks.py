"""Ranks of a process group, forked from the tests' own process: what it has imported costs them nothing."""

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def on_ranks(world: int, work: Callable[[int], T]) -> list[T]:
    """What work(rank) returns in each of `world` processes that form a process group."""
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(rank, world, Path(folder), work) for rank in range(world)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        told = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        assert codes == [0] * world, "\n".join(told)
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world)]


def _fork(rank: int, world: int, folder: Path, work: Callable[[int], T]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world)
        torch.save(work(rank), folder / f"result-{rank}")
        dist.barrier()
        os._exit(0)
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(1)
