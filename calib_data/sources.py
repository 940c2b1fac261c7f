"""Where text comes from: published data sets by name, local files, the topics that CPython carries.

| name | calibration | evaluation |
|---|---|---|
| `wikitext2` | train split, joined by blank lines | test split, joined by blank lines |
| `ptb` | train split, joined by spaces | test split, joined by spaces |
| `c4` | first train shard, windows within documents | validation's first 1100 documents, 256 windows |
| `pydoc` | `pydoc_data.topics`, training side | the held-out topics |
| a `.txt`, `.jsonl`, `.parquet` or a folder of them | the whole text | the whole text |

The splits and joins are those of the published SparseGPT evaluation.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsegpt.errors import SparseGPTError, did_you_mean, first_line, nearest
from sparsegpt.incoming.hub import ask_hub, hub_reason

from . import pydoc_topics

Split = Literal["calibration", "evaluation"]

TEXT_FIELD = "text"  # of a .jsonl line, column of a .parquet file
LOCAL_ALTERNATIVE = "FILE.txt|FILE.jsonl|FILE.parquet, or pydoc"


@dataclass(frozen=True)
class TextSource:
    """A named text, read."""

    name: str  # as given: "wikitext2", "pydoc", a path
    documents: tuple[str, ...]
    separator: str = "\n\n"  # between documents, where they become one text
    evaluation_windows: int | None = None  # perplexity looks at so many windows from the start; None: at all
    windows_within_documents: bool = False  # a calibration window never crosses from one document into the next

    @property
    def text(self) -> str:
        """All documents as one text."""
        return self.separator.join(self.documents)


@dataclass(frozen=True)
class HubData:
    """One data set on the Hub: which file holds which split. Plain parquet and json files, never a script."""

    repository: str
    files: dict[Split, str]
    column: str
    separator: str
    revision: str = "main"
    evaluation_documents: int | None = None
    evaluation_windows: int | None = None
    windows_within_documents: bool = False


HUB_DATA = {
    "wikitext2": HubData(
        repository="Salesforce/wikitext",
        files={
            "calibration": "wikitext-2-raw-v1/train-00000-of-00001.parquet",
            "evaluation": "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        },
        column="text",
        separator="\n\n",
    ),
    "ptb": HubData(
        repository="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",  # its main branch holds a loading script, which datasets 4 no longer runs
        files={
            "calibration": "penn_treebank/train/0000.parquet",
            "evaluation": "penn_treebank/test/0000.parquet",
        },
        column="sentence",
        separator=" ",
    ),
    "c4": HubData(
        repository="allenai/c4",
        files={
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
        column="text",
        separator=" ",
        evaluation_documents=1100,
        evaluation_windows=256,
        windows_within_documents=True,
    ),
}

KNOWN_SOURCES: tuple[str, ...] = (*HUB_DATA, "pydoc")


def load_text(name_or_path: str, split: Split) -> TextSource:
    """The text that `name_or_path` means for calibration or for evaluation.

    Raises `SparseGPTError` for an unknown name, an unreadable or empty file, and for a data set of the Hub that is
    neither cached nor reachable.
    """
    with _naming(split):
        if name_or_path in HUB_DATA:
            return _hub_source(name_or_path, split)
        if name_or_path == "pydoc":
            return _pydoc_source(split)
        return _local_source(name_or_path)


def check_text(name_or_path: str, split: Split) -> None:
    """Look whether `load_text` can begin: a known name, or files that are there, can be opened and are not all empty.

    Raises SparseGPTError.
    """
    if name_or_path in KNOWN_SOURCES:
        return
    with _naming(split), _reading(name_or_path):
        sizes = []
        for path in _text_files(_there(name_or_path)):
            _reader(path)
            with path.open("rb") as file:
                sizes.append(file.seek(0, os.SEEK_END))
        if not any(sizes):
            raise _without_text(name_or_path)


@contextmanager
def _naming(split: Split) -> Iterator[None]:
    """Let refusals name the setting that the text was given as."""
    try:
        yield
    except SparseGPTError as error:
        error.settings = error.settings or ("calibration" if split == "calibration" else "evaluate",)
        raise


def _pydoc_source(split: Split) -> TextSource:
    side = pydoc_topics.training_topics if split == "calibration" else pydoc_topics.held_out_topics
    return TextSource("pydoc", tuple(side().values()))


# Local files


def _local_source(name: str) -> TextSource:
    with _reading(name):
        documents = tuple(document for file in _text_files(_there(name)) for document in _read_file(file))
    if not any(document.strip() for document in documents):
        raise _without_text(name)
    return TextSource(name, documents)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what the system refuses into one line; RuntimeError is for the home of somebody who is not there."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SparseGPTError(f"{name}: cannot be read: {reason or error}") from error


def _without_text(name: str) -> SparseGPTError:
    return SparseGPTError(f"{name}: expected text, found none; give a file with some")


def _there(name: str) -> Path:
    """The file or folder of this name. Raises SparseGPTError where there is none, with the nearest name that exists."""
    path = Path(name)
    if name and not path.exists():
        path = path.expanduser()
    if not name or not path.exists():
        raise SparseGPTError(_not_found(name, path))
    return path


def _not_found(name: str, path: Path) -> str:
    beside = [each.name for each in path.parent.iterdir()] if name and path.parent.is_dir() else []
    if path.suffix.lower() in READERS or os.sep in name:
        near = nearest(path.name, beside)
        question = f"; did you mean {path.with_name(near)}?" if near else ""
        return f"{name}: no such file or folder; check the path, or give one of {', '.join(KNOWN_SOURCES)}{question}"
    return (
        f"'{name}': unknown text; expected one of {', '.join(KNOWN_SOURCES)}, or a path to {', '.join(READERS)} files"
        f"{did_you_mean(name, (*KNOWN_SOURCES, *beside))}"
    )


def _text_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SparseGPTError(f"{path}: expected a file or a folder of text, found neither; give one of them")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file())
    if not files:
        model = ", and it is a model folder" if (path / "config.json").is_file() else ""
        raise SparseGPTError(
            f"{path}: expected {', '.join(READERS)} files in the folder, found none{model}; give a folder of texts"
        )
    return files


def _reader(path: Path) -> Callable[[Path], list[str]]:
    """How a file is read, by its suffix."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        found = path.suffix or "no suffix"
        raise SparseGPTError(
            f"{path}: expected one of {', '.join(READERS)}, found {found}; save the text as one of them"
        )
    return reader


def _read_file(path: Path) -> list[str]:
    reader = _reader(path)
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise SparseGPTError(
            f"{path}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x} at offset {error.start}; "
            "convert the file to UTF-8"
        ) from error


def _read_txt(path: Path) -> list[str]:
    return [path.read_text("utf-8-sig")]


def _read_jsonl(path: Path) -> list[str]:
    # Split at "\n" alone: other line separators of Unicode may stand inside a JSON string.
    lines = enumerate(path.read_text("utf-8-sig").split("\n"), start=1)
    return [_jsonl_text(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _jsonl_text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise SparseGPTError(f"{where}: expected one JSON object a line, found what is not JSON: {reason}") from error
    if not isinstance(record, dict):
        raise SparseGPTError(f"{where}: expected a JSON object with a field '{TEXT_FIELD}', found {_kind(record)}")
    if TEXT_FIELD not in record:
        raise SparseGPTError(f"{where}: expected a field '{TEXT_FIELD}', found {_names(record)}; rename the field")
    return _checked_text(record[TEXT_FIELD], where)


def _read_parquet(path: Path) -> list[str]:
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if TEXT_FIELD not in columns:
                raise SparseGPTError(
                    f"{path}: expected a column '{TEXT_FIELD}', found {_names(columns)}; rename the column"
                )
            values = file.read(columns=[TEXT_FIELD]).column(TEXT_FIELD).to_pylist()
    except ArrowException as error:
        raise SparseGPTError(f"{path}: expected a parquet file: {first_line(error)}") from error
    return [_checked_text(value, f"{path}, row {row}") for row, value in enumerate(values, start=1)]


READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _checked_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise SparseGPTError(f"{where}: expected text in '{TEXT_FIELD}', found {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair; no tokenizer takes it
        raise SparseGPTError(
            f"{where}: expected Unicode text in '{TEXT_FIELD}', found half a surrogate pair"
        ) from error
    return value


def _kind(value: object) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"


def _names(fields: Iterable[object]) -> str:
    return ", ".join(map(str, fields)) or "none"


# The Hub


def _hub_source(name: str, split: Split) -> TextSource:
    data = HUB_DATA[name]
    documents = _read_column(_fetch(name, data, split), data.column)
    if split == "evaluation":
        documents = documents[: data.evaluation_documents]
    return TextSource(name, tuple(documents), data.separator, data.evaluation_windows, data.windows_within_documents)


def _fetch(name: str, data: HubData, split: Split) -> Path:
    """The split's file in the local Hub cache, downloaded at its first use."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(cached: bool) -> Path:
        return Path(
            hf_hub_download(
                data.repository,
                data.files[split],
                repo_type="dataset",
                revision=data.revision,
                local_files_only=cached,
            )
        )

    try:
        with _quiet_hub():
            try:
                return download(cached=True)  # a published file does not change: no need to ask again
            except LocalEntryNotFoundError:
                ask_hub(data.repository, data.files[split], data.revision, kind="dataset")
                return download(cached=False)
    except Exception as error:
        if not isinstance(error, OSError) and hub_reason(error, data.files[split], data.revision) is None:
            raise
        raise SparseGPTError(
            f"{name}: the data set {data.repository} is neither in the local cache nor reachable on the Hugging Face "
            f"Hub; go online once, or give {LOCAL_ALTERNATIVE} instead"
        ) from error


def _read_column(path: Path, column: str) -> list[str]:
    """One column of a parquet or json file, through `datasets` and its cache."""
    from datasets import load_dataset

    with _no_bars():
        rows = load_dataset("parquet" if path.suffix == ".parquet" else "json", data_files=str(path), split="train")
    return list(rows[column])


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the Hub client's lines about retries: the one line of the error says what matters."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of `datasets`, which come in number and last a second."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
