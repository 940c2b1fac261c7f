"""Where text comes from: published data sets by name, any data set of the Hub, local files, what CPython carries.

| name | calibration | evaluation |
|---|---|---|
| `wikitext2` | train split, joined by blank lines | test split, joined by blank lines |
| `ptb` | train split, joined by spaces | test split, joined by spaces |
| `c4` | first train shard, windows within documents | validation's first 1100 documents, 256 windows |
| `pydoc` | `pydoc_data.topics`, training side | the held-out topics |
| `self` | what the dense model writes itself (`own_text`) | refused |
| a file or a folder of files, see `files.READERS` | the whole text | the whole text |
| `FILE:field` | that field of every record | that field of every record |
| `org/name:config:split:field`, the last three if wanted | the train split | the test split |

The splits and joins of the first three are those of the published SparseGPT evaluation.
"""

import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sparsegpt.errors import SparseGPTError, did_you_mean, nearest
from sparsegpt.incoming.hub import ask_hub, hub_reason

from . import pydoc_topics
from .files import READERS, is_text_file, read_documents, reader_of, text_files
from .records import Chat, Document, document_of, fields_read

Split = Literal["calibration", "evaluation"]
LOCAL_ALTERNATIVE = "FILE.txt|FILE.jsonl|FILE.parquet, or pydoc"
OWN_TEXT = "self"
# An id of the Hub, and after it, if wanted, configuration, split and field.
_HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([^:/]*))?(?::([^:/]*))?(?::([^:/]*))?")
# What the Hub makes of every public data set, whatever its files are: plain parquet, in shards.
_CONVERTED = "refs/convert/parquet"
_USUAL_SPLIT: dict[Split, str] = {"calibration": "train", "evaluation": "test"}


@dataclass(frozen=True)
class TextSource:
    """A named text, read."""

    name: str  # as given: "wikitext2", "pydoc", a path
    documents: tuple[Document, ...]
    separator: str = "\n\n"  # between documents, where they become one text
    evaluation_windows: int | None = None  # perplexity looks at so many windows from the start; None: at all
    windows_within_documents: bool = False  # a calibration window never crosses from one document into the next
    weight: float | None = None  # its share of a mixture, where shares were given

    @property
    def text(self) -> str:
        """All documents as one text. Raises SparseGPTError where there are conversations: `for_tokenizer` first."""
        return self.separator.join(self.texts)

    @property
    def texts(self) -> tuple[str, ...]:
        """The documents, each as text. Raises SparseGPTError as `text` does."""
        for document in self.documents:
            if isinstance(document, Chat):
                raise SparseGPTError(f"{self.name}: conversations become text by a tokenizer's template: give it first")
        return tuple(document for document in self.documents if isinstance(document, str))

    def for_tokenizer(self, tokenizer: Any) -> "TextSource":
        """The same with every conversation written out by the tokenizer's chat template.

        Raises SparseGPTError, with file and line, where there is no template or it fails.
        """
        if not any(isinstance(document, Chat) for document in self.documents):
            return self
        written = (each.written_by(tokenizer) if isinstance(each, Chat) else each for each in self.documents)
        return replace(self, documents=tuple(written))


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

KNOWN_SOURCES: tuple[str, ...] = (*HUB_DATA, "pydoc", OWN_TEXT)


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
        if name_or_path == OWN_TEXT:
            return _own_source(split)
        if hub := _hub_name(name_or_path):
            return _hub_source_by_id(name_or_path, hub, split)
        return _local_source(name_or_path)


def check_text(name_or_path: str, split: Split) -> None:
    """Look whether `load_text` can begin: a known name, or files that are there, can be opened and are not all empty.

    Raises SparseGPTError.
    """
    with _naming(split), _reading(name_or_path):
        if name_or_path == OWN_TEXT:
            _own_source(split)
        if name_or_path in KNOWN_SOURCES or _hub_name(name_or_path):
            return
        sizes = []
        for path in text_files(_there(name_or_path)[0]):
            reader_of(path)
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


def _own_source(split: Split) -> TextSource:
    """A place for what the model will write."""
    if split == "evaluation":
        raise SparseGPTError(f"{OWN_TEXT} is text to calibrate on: score the model on text that it has not written")
    return TextSource(OWN_TEXT, ())


# Local files


def _local_source(name: str) -> TextSource:
    with _reading(name):
        path, field = _there(name)
        documents = tuple(document for file in text_files(path) for document in read_documents(file, field))
    return _source(name, documents)


def _source(name: str, documents: tuple[Document, ...]) -> TextSource:
    """Documents joined by blank lines; conversations by nothing, as a template ends them itself."""
    if not any(isinstance(document, Chat) or document.strip() for document in documents):
        raise _without_text(name)
    only_chats = all(isinstance(document, Chat) for document in documents)
    return TextSource(name, documents, separator="" if only_chats else "\n\n")


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


def _there(name: str) -> tuple[Path, str | None]:
    """The file or folder of this name, and the field that stands behind it, if any.

    Raises SparseGPTError where there is none, with the nearest name that exists.
    """
    front, colon, field = name.rpartition(":")
    for found, wanted in ((name, None), *([(front, field)] if colon and field else [])):
        path = Path(found)
        if found and not path.exists():
            path = path.expanduser()
        if found and path.exists():
            return path, wanted
    if colon and is_text_file(Path(front)):
        name = front
    raise SparseGPTError(_not_found(name, Path(name).expanduser()))


def _not_found(name: str, path: Path) -> str:
    beside = [each.name for each in path.parent.iterdir()] if name and path.parent.is_dir() else []
    if is_text_file(path) or os.sep in name:
        near = nearest(path.name, beside)
        question = f"; did you mean {path.with_name(near)}?" if near else ""
        return f"{name}: no such file or folder; check the path, or give one of {', '.join(KNOWN_SOURCES)}{question}"
    return (
        f"'{name}': unknown text; expected one of {', '.join(KNOWN_SOURCES)}, or a path to {', '.join(READERS)} files"
        f"{did_you_mean(name, (*KNOWN_SOURCES, *beside))}"
    )


# The Hub


def _hub_name(name: str) -> "re.Match[str] | None":
    """The parts of an id of the Hub; None for a name of local files, there or not."""
    found = _HUB_NAME.fullmatch(name)
    if found is None or is_text_file(Path(found[1])) or Path(found[1]).exists():
        return None
    return found


def _hub_source(name: str, split: Split) -> TextSource:
    data = HUB_DATA[name]
    path = _fetch(name, data.repository, data.revision, [data.files[split]], LOCAL_ALTERNATIVE)
    documents = _read_table(path, data.column)
    if split == "evaluation":
        documents = documents[: data.evaluation_documents]
    return TextSource(name, documents, data.separator, data.evaluation_windows, data.windows_within_documents)


def _hub_source_by_id(name: str, parts: "re.Match[str]", split: Split) -> TextSource:
    """The first shard of a split of any public data set."""
    repository, config, part, field = parts.groups()
    part = part or _USUAL_SPLIT[split]
    folder = config or "default"
    # Of what is larger than 5 GB the Hub converts the first 5 GB, and says so.
    files = [f"{folder}/{kind}{part}/0000.parquet" for kind in ("", "partial-")]
    advice = f"a local file; no folder {repository} is here, and an id goes on as {repository}:config:split:field"
    return _source(name, _read_table(_fetch(name, repository, _CONVERTED, files, advice), field or None))


def _fetch(name: str, repository: str, revision: str, files: Sequence[str], alternative: str) -> Path:
    """The first of these files that there is, in the local Hub cache, downloaded at its first use."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    failure: Exception | None = None
    # A published file does not change: no need to ask again for one that is in the cache.
    for cached, file in itertools.product((True, False), files):
        try:
            with _quiet_hub():
                if not cached:
                    ask_hub(repository, file, revision, kind="dataset")
                found = hf_hub_download(
                    repository, file, repo_type="dataset", revision=revision, local_files_only=cached
                )
                return Path(found)
        except EntryNotFoundError as error:  # also of the cache: the next file may be there
            failure = error
        except Exception as error:
            if not isinstance(error, OSError) and hub_reason(error, file, revision) is None:
                raise
            failure = error
            break
    assert failure is not None
    reason = hub_reason(failure, files[0], revision)
    raise SparseGPTError(
        f"{name}: the data set {repository} is neither in the local cache nor reachable on the Hugging Face Hub"
        f"{f' ({reason})' if reason else ''}; go online once, or give {alternative} instead"
    ) from failure


def _read_table(path: Path, field: str | None) -> tuple[Document, ...]:
    """The documents of a parquet or json file, through `datasets` and its cache."""
    from datasets import load_dataset

    with _no_bars():
        rows = load_dataset("parquet" if path.suffix == ".parquet" else "json", data_files=str(path), split="train")
    rows = rows.select_columns(list(fields_read(rows.column_names, path.name, field)))
    return tuple(document_of(row, f"{path.name}, row {number}", field) for number, row in enumerate(rows, start=1))


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
