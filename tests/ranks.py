"""Ranks of a process group, forked from the tests' own process: what it has imported costs them nothing."""

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(world: int, work: Callable[[int], Any], *, seconds: float = 120) -> list[Any]:
    """What work(rank) returns in each of `world` processes that form a process group; None from one that left early.

    seconds: how long they wait for one another.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(rank, world, Path(folder), work, seconds) for rank in range(world)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        told = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        assert codes == [0] * world, "\n".join(told)
        results = [Path(folder) / f"result-{rank}" for rank in range(world)]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in results]


def _fork(rank: int, world: int, folder: Path, work: Callable[[int], Any], seconds: float) -> int:
    child = os.fork()
    if child:
        return child
    try:
        store, limit = dist.FileStore(str(folder / "store"), world), timedelta(seconds=seconds)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        torch.save(work(rank), folder / f"result-{rank}")
        os._exit(0)
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(1)
