"""Tasks: what a model knows, by EleutherAI's lm-evaluation-harness (the extra `tasks`).

The model is given as it is loaded, dense, pruned or packed. Each task's own data, prompts and metrics count.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsegpt.counting import Counted, unheard
from sparsegpt.errors import SparseGPTError, did_you_mean, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Whether lm-eval puts a beginning-of-sequence token first, by our setting; None: as it does itself.
_BOS = {"auto": None, "always": True, "never": False}
_WINDOWS_AT_ONCE = 8
# What the harness asks of a model.
_REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


@dataclass(frozen=True)
class TaskScore:
    """A model's score in one metric of a task, with its standard error; None where the task gives none."""

    task: str
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Tasks:
    """Tasks that are loaded, with their data. limit: score at most so many questions of each."""

    names: tuple[str, ...]
    limit: int | None
    loaded: Any


def load_tasks(names: Sequence[str], include_path: Path | None = None, limit: int | None = None) -> Tasks | None:
    """Tasks or groups by their lm-eval names, before any model is loaded; None for no names.

    include_path: a folder of task files.
    Raises SparseGPTError without lm-eval, for a name that is not known, for files that cannot be read, and for a task
    whose data set is neither in the cache nor to be had.
    """
    if not names:
        return None
    if include_path is not None and not include_path.is_dir():
        raise SparseGPTError(
            f"{include_path}: expected a folder of task files, found none; check the path", settings=("include_path",)
        )
    with _quiet():
        manager = _manager(tuple(names), include_path)
        _check_known(names, manager.all_tasks)
        try:
            loaded = manager.load(list(names))
        except Exception as error:  # anything, as a task file is anybody's
            raise SparseGPTError(
                f"tasks {', '.join(names)} cannot be loaded ({type(error).__name__}: {first_line(error)}): a task "
                "needs its data set, in the cache or from the Hub; go online once, or give local task files",
                settings=("tasks", "eval_tasks", "include_path"),
            ) from error
    return Tasks(tuple(names), limit, loaded)


def score_tasks(
    model: "PreTrainedModel",
    tokenizer: Any,
    tasks: Tasks | None,
    *,
    batch_size: int | None = None,
    bos: str = "auto",
    counted: Counted = unheard,
) -> tuple[TaskScore, ...]:
    """Every metric of every task, groups included. batch_size: questions a forward pass; bos: as for perplexity.
    counted: is told of every answer that a task asks for, of each kind of them in turn.

    Raises SparseGPTError where the harness or the model fails on a task.
    """
    if tasks is None:
        return ()
    from lm_eval.evaluator import evaluate

    with _quiet():
        try:
            wrapped = _wrapped(model, tokenizer, batch_size or _WINDOWS_AT_ONCE, _BOS[bos])
            found = evaluate(_Counting(wrapped, counted), tasks.loaded, limit=tasks.limit, log_samples=False)
        except (SparseGPTError, MemoryError):
            raise
        except Exception as error:
            raise SparseGPTError(
                f"tasks {', '.join(tasks.names)} cannot be scored ({type(error).__name__}: {first_line(error)})",
                settings=("tasks", "eval_tasks"),
            ) from error
    return tuple(_scores(found["results"]))


def _wrapped(model: "PreTrainedModel", tokenizer: Any, batch_size: int, add_bos: bool | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=add_bos)


class _Counting:
    """The harness's model, as the harness wraps it to remember answers: it hears of each answer, and counts it."""

    def __init__(self, wrapped: Any, counted: Counted) -> None:
        self._wrapped, self._counted = wrapped, counted
        self._done = self._total = 0
        wrapped.set_cache_hook(self)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._wrapped, name)
        return functools.partial(self._ask, found) if name in _REQUESTS else found

    def _ask(self, answer: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        self._count(0, len(requests))
        answers = answer(requests)
        self._count(len(requests), len(requests))
        return answers

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """An answer is known, those to the same question at once."""
        self._count(min(self._done + 1, self._total), self._total)

    def _count(self, done: int, total: int) -> None:
        if (done, total) != (self._done, self._total):
            self._done, self._total = done, total
            self._counted(done, total)


def _manager(names: tuple[str, ...], include_path: Path | None) -> Any:
    """Of local files alone where they hold all that is asked for: the harness's own 10,000 take seconds to find."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SparseGPTError(
            "tasks need lm-eval, which is not installed: pip install 'sparsegpt[tasks]'", settings=("tasks",)
        ) from error
    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
        return TaskManager(include_path=str(include_path))
    return _harness_tasks()


@functools.cache
def _harness_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise SparseGPTError(
                f"task {name!r} is not known: expected one of lm-eval's {len(known)} names, or of your own task files"
                f"{did_you_mean(name, known, 0.8)}",
                settings=("tasks", "eval_tasks", "include_path"),
            )


def _scores(results: dict[str, dict[str, Any]]) -> Iterator[TaskScore]:
    """lm-eval's rows {"acc,none": 0.5, "acc_stderr,none": 0.1} as scores; the name keeps a filter other than none."""
    for task, row in results.items():
        for key, value in row.items():
            metric, _, kept_by = key.partition(",")
            if not kept_by or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = row.get(f"{metric}_stderr,{kept_by}")
            name = metric if kept_by == "none" else f"{metric} ({kept_by})"
            yield TaskScore(task, name, float(value), float(stderr) if isinstance(stderr, int | float) else None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's bars and advice on stderr; what goes wrong is raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logger.setLevel(level)
