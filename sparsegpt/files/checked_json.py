"""JSON files: read with one clear line for what is wrong, and report.json and its kin with a checksum of the whole."""

import hashlib
import json
import math
import stat
from pathlib import Path
from typing import Any

from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.files.folders import write_atomically

REPORT_NAME = "report.json"
PAGE_NAME = "report.html"  # the same for people
CHECKSUM = "sha256"
_UNKNOWN_TO_JSON = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
# No honest file comes near: the index of a model of a million tensors has 100 MB, and is three levels deep.
_LARGEST, _DEEPEST = 1 << 30, 100


def read_json(path: Path) -> Any:
    """Content of a JSON file, all of its text Unicode; SparseGPTError naming it where it cannot be read or is no JSON.

    Whoever goes through the content level by level finds at most _DEEPEST of them.
    """
    try:
        content = json.loads(_text_of(path))
        _check_content(content)
        return content
    except OSError as error:
        raise SparseGPTError(f"{path} cannot be read ({error.strerror or error}): copy or create it again") from error
    except (ValueError, RecursionError) as error:
        raise SparseGPTError(
            f"{path} is damaged, it cannot be read as JSON ({first_line(error)}): copy or create it again"
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """Content of a file that holds one JSON object; SparseGPTError as `read_json`, and for JSON of another kind."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise SparseGPTError(f"{path} is damaged: expected a JSON object; found {type(content).__name__}")
    return content


def write_json(path: Path, value: Any) -> None:
    """Write plain data as readable JSON; numbers that JSON does not know (inf, nan) become strings."""
    write_atomically(path, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def write_checked(path: Path, value: dict[str, Any]) -> None:
    """`write_json` with a checksum of it all under one more key."""
    write_json(path, {**value, CHECKSUM: _digest(_plain(value))})


def read_checked(path: Path) -> dict[str, Any]:
    """What `write_checked` wrote, inf and nan as numbers; SparseGPTError for anything else, such as a flipped bit."""
    content = read_json(path)
    if not isinstance(content, dict) or CHECKSUM not in content:
        raise SparseGPTError(f"{path} is damaged (it has no checksum)")
    if content.pop(CHECKSUM) != _digest(content):
        raise SparseGPTError(f"{path} is damaged (its checksum does not match)")
    numbers: dict[str, Any] = _with_numbers(content)
    return numbers


def _text_of(path: Path) -> str:
    """OSError where it cannot be read; ValueError for what is no file, too large or no UTF-8."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would never end
        raise ValueError("it is no regular file")
    if found.st_size > _LARGEST:
        raise ValueError(f"it has {found.st_size} bytes")
    return path.read_text(encoding="utf-8")


def _check_content(content: Any) -> None:
    """ValueError for half a surrogate pair, which no file and no terminal takes, and for levels without end."""
    level = [content]
    for _ in range(_DEEPEST):
        objects = [part for part in level if isinstance(part, dict)]
        "".join(part for part in level if isinstance(part, str)).encode()  # UnicodeEncodeError is a ValueError
        "".join(key for part in objects for key in part).encode()
        level = [item for part in level if isinstance(part, list) for item in part]
        level += [item for part in objects for item in part.values()]
        if not level:
            return
    raise ValueError(f"more than {_DEEPEST} levels")


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
