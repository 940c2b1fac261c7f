"""What `shrink` is told besides how small: the options of `run` that mean the same, and its own."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from sparsegpt.settings.option import Group, option
from sparsegpt.shrinking.settings import BUDGETS, PARTS, ShrinkSettings

# Fields of RunOptions that `shrink` has too.
SHARED = (
    "model",
    "calibration",
    "evaluate",
    "samples",
    "sequence_length",
    "seed",
    "eval_windows",
    "bos",
    "revision",
    "trust_remote_code",
    "device",
    "dtype",
    "batch_size",
    "micro_batch",
    "overwrite",
)


@dataclass(frozen=True)
class ShrinkCall:
    """What the command alone is told."""

    out: Path | None = field(
        default=None,
        metadata=option("Folder to write.", Group.OUTPUT, unset="pruned/<model>-smaller-<size>"),
    )
    speed: bool = field(
        default=True,
        metadata=option("Measure tokens per second before and after.", Group.OUTPUT, flag="--speed/--no-speed"),
    )
    quiet: bool = field(default=False, metadata=option("Print nothing but warnings and errors.", Group.OUTPUT))


def default_smaller_folder(model: str, settings: ShrinkSettings) -> Path:
    """Where the smaller model goes when nothing is named: pruned/demo-smaller-keep-75pct."""
    said = [f"{name}-{getattr(settings, name)}" for name in (*BUDGETS, *PARTS) if getattr(settings, name) is not None]
    name = "-".join([Path(model.rstrip("/")).name, "smaller", *said]).replace("%", "pct")
    return Path("pruned") / re.sub(r"[^\w.\-]", "-", name)
