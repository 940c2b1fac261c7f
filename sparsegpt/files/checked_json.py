"""JSON files: read with one clear line for what is wrong, and report.json and its kin with a checksum of the whole."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.files.folders import write_atomically

REPORT_NAME = "report.json"
CHECKSUM = "sha256"
_UNKNOWN_TO_JSON = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def read_json(path: Path) -> Any:
    """Content of a JSON file; SparseGPTError naming it where it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SparseGPTError(
            f"{path} is damaged, it cannot be read as JSON ({first_line(error)}): copy or create it again"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write plain data as readable JSON; numbers that JSON does not know (inf, nan) become strings."""
    write_atomically(path, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def write_checked(path: Path, value: dict[str, Any]) -> None:
    """`write_json` with a checksum of it all under one more key."""
    write_json(path, {**value, CHECKSUM: _digest(_plain(value))})


def read_checked(path: Path) -> dict[str, Any]:
    """What `write_checked` wrote, inf and nan as numbers; SparseGPTError for anything else, such as a flipped bit."""
    content = read_json(path)
    try:
        whole = content.pop(CHECKSUM) == _digest(content)
    except (AttributeError, KeyError, TypeError) as error:
        raise SparseGPTError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if not whole:
        raise SparseGPTError(f"{path} is damaged (its checksum does not match)")
    numbers: dict[str, Any] = _with_numbers(content)
    return numbers


def _digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (not math.isfinite(value)):
        return str(value)
    return value


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return _UNKNOWN_TO_JSON.get(value, value) if isinstance(value, str) else value
