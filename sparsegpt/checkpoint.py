"""report.json: what a run leaves beside the weights."""

import json
import math
from pathlib import Path
from typing import Any

from sparsegpt.folders import write_atomically

REPORT_NAME = "report.json"


def write_json(path: Path, value: Any) -> None:
    """Write plain data as readable JSON; numbers that JSON does not know (inf, nan) become strings."""
    write_atomically(path, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (not math.isfinite(value)):
        return str(value)
    return value
