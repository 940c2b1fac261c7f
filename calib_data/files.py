"""Files of text: their forms by suffix, and the records in each."""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path

from sparsegpt.errors import SparseGPTError, first_line

from .records import Document, document_of, fields_read, is_record

COMPRESSED = ".gz"
CARD = "readme.md"  # tells of a folder of texts, and is none of them
# Where a record stands, and what it is: text, or the fields of an object.
Record = tuple[str, object]
# An open file, its name and the field asked for -> its records.
Reader = Callable[[BufferedIOBase, str, str | None], Iterable[Record]]


def read_documents(path: Path, field: str | None) -> list[Document]:
    """The documents of one file; field: the one to read of each record, None for the usual ones.

    Raises SparseGPTError for what is not as the suffix says, with the line or row.
    """
    reader = reader_of(path)
    try:
        with path.open("rb") as stored:
            file = gzip.GzipFile(fileobj=stored) if path.suffix.lower() == COMPRESSED else stored
            return [document_of(record, where, field) for where, record in reader(file, str(path), field)]
    except UnicodeDecodeError as error:
        raise SparseGPTError(
            f"{path}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x} at offset {error.start}; "
            "convert the file to UTF-8"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SparseGPTError(
            f"{path}: expected gzip data, found what is damaged or cut short ({first_line(error)}); copy it again"
        ) from error


def reader_of(path: Path) -> Reader:
    """How a file is read. Raises SparseGPTError for a suffix that is not known."""
    found = _suffix(path)
    if found not in READERS:
        raise SparseGPTError(
            f"{path}: expected one of {', '.join(READERS)}, found {found or 'no suffix'}; save the text as one of them"
        )
    return READERS[found]


def is_text_file(path: Path) -> bool:
    """Whether the suffix, under .gz too, is one that is read."""
    return _suffix(path) in READERS


def text_files(path: Path) -> list[Path]:
    """A file alone, or all files of text in a folder, in sorted order. Raises SparseGPTError where there is none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SparseGPTError(f"{path}: expected a file or a folder of text, found neither; give one of them")
    of_model = (path / "config.json").is_file()  # its .json files are settings
    found = sorted(file for file in path.rglob("*") if is_text_file(file) and file.name.lower() != CARD)
    files = [] if of_model else [file for file in found if file.is_file()]
    if not files:
        model = ", and it is a model folder" if of_model else ""
        raise SparseGPTError(
            f"{path}: expected {', '.join(READERS)} files in the folder, found none{model}; give a folder of texts"
        )
    return files


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == COMPRESSED else suffix


def _whole(file: BufferedIOBase, name: str, field: str | None) -> Iterator[Record]:
    yield name, _decoded(file)


def _lines(file: BufferedIOBase, name: str, field: str | None) -> Iterator[Record]:
    return _records_of_lines(_decoded(file), name)


def _records_of_lines(text: str, name: str) -> Iterator[Record]:
    # Split at "\n" alone: other line separators of Unicode may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{name}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SparseGPTError(
                    f"{where}: expected one JSON object a line, found what is not JSON: {_reason(error)}"
                ) from error


def _json(file: BufferedIOBase, name: str, field: str | None) -> Iterator[Record]:
    """A list of records, an object that holds one such list, or, as many name them so, one object a line."""
    text = _decoded(file)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise SparseGPTError(f"{name}: expected JSON, found what is not: {error}") from error
        yield from _records_of_lines(text, name)
        return
    except (ValueError, RecursionError) as error:
        raise SparseGPTError(f"{name}: expected JSON, found what cannot be read: {_reason(error)}") from error
    for number, record in enumerate(_listed_records(found, name, field), start=1):
        yield f"{name}, record {number}", record


def _listed_records(found: object, name: str, field: str | None) -> list[object]:
    if isinstance(found, list):
        return found
    if not isinstance(found, dict):
        raise SparseGPTError(f"{name}: expected a list of records, found a value of type {type(found).__name__}")
    lists = [value for value in found.values() if isinstance(value, list)]
    return lists[0] if len(lists) == 1 and not is_record(found, field) else [found]


def _csv(file: BufferedIOBase, name: str, field: str | None) -> Iterator[Record]:
    limit = csv.field_size_limit(sys.maxsize)  # a field may be a whole document
    try:
        rows = csv.DictReader(io.StringIO(_decoded(file), newline=""), strict=True)
        for row in rows:
            yield f"{name}, line {rows.line_num}", row
    except csv.Error as error:
        raise SparseGPTError(f"{name}: expected comma-separated values: {first_line(error)}") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(file: BufferedIOBase, name: str, field: str | None) -> Iterator[Record]:
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = list(fields_read(table.schema_arrow.names, name, field))
            rows = table.read(columns=columns).to_pylist()
    except ArrowException as error:
        raise SparseGPTError(f"{name}: expected a parquet file: {first_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


READERS: dict[str, Reader] = {
    ".txt": _whole,
    ".md": _whole,
    ".jsonl": _lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _decoded(file: BufferedIOBase) -> str:
    # Line ends as text files are read anywhere: one "\n" for each.
    return file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
