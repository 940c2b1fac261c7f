"""What a record of a data file says: text as it is, or a conversation that a tokenizer's chat template writes out.

| fields | read as |
|---|---|
| `text` | the text |
| `messages` | turns with `role` and `content` |
| `conversations`, `conversation` | turns with `from` and `value` (`human`, `gpt`), or with `role` and `content` |
| `prompt` and `completion` or `response` | a user's turn and the answer; also two lists of turns |
| `instruction`, `output` and, if there, `input` | a user's turn and the answer |

The first row that fits counts. A field that is given by name holds text or turns.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sparsegpt.errors import SparseGPTError, first_line

TEXT_FIELD = "text"
# What speakers are called in conversations of `from` and `value`, and by chat templates.
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
# What a turn may call its speaker and its words.
TURNS = (("role", "content"), ("from", "value"))

Turn = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation, which becomes text through a chat template.

    where: its file and line. plain: what it is for a tokenizer without a template; None where that is nothing.
    """

    turns: tuple[Turn, ...]
    where: str
    plain: str | None = None

    def written_by(self, tokenizer: Any) -> str:
        """The conversation as text. Raises SparseGPTError where there is no template, or where it fails."""
        if not getattr(tokenizer, "chat_template", None):
            if self.plain is not None:
                return self.plain
            raise SparseGPTError(
                f"{self.where}: a conversation needs a chat template, and the tokenizer has none; give text, or a "
                "model that was trained to chat"
            )
        try:
            return str(tokenizer.apply_chat_template(list(self.turns), tokenize=False))
        except Exception as error:  # a template is a program of anybody's
            raise SparseGPTError(
                f"{self.where}: the tokenizer's chat template fails on this conversation ({type(error).__name__}: "
                f"{first_line(error)}); change its turns, or leave it out"
            ) from error


Document = str | Chat


def document_of(record: object, where: str, field: str | None) -> Document:
    """The document that a record holds, in `field` or, with None, as the first row of the table above that fits.

    Raises SparseGPTError, naming `where`, for a record without such fields and for values of another kind.
    """
    if isinstance(record, str):
        if field is not None:
            raise SparseGPTError(f"{where}: expected records with a field '{field}', found text alone; leave it out")
        return _text(record, where, TEXT_FIELD)
    if not isinstance(record, Mapping):
        wanted = field or TEXT_FIELD
        raise SparseGPTError(f"{where}: expected a JSON object with a field '{wanted}', found {_kind(record)}")
    names, read = _form(tuple(record), where, field)
    return read(record, where, names)


def fields_read(names: Iterable[str], where: str, field: str | None) -> tuple[str, ...]:
    """Of a table's columns those that `document_of` looks at. Raises SparseGPTError where they are not there."""
    columns = tuple(names)
    wanted, _ = _form(columns, where, field)
    return tuple(name for name in (*wanted, _INPUT) if name in columns)


def is_record(names: Iterable[str], field: str | None) -> bool:
    """Whether an object with these fields is one that `document_of` reads."""
    there = set(names)
    return field in there if field is not None else any(there.issuperset(wanted) for wanted, _ in FORMS)


def _form(names: tuple[str, ...], where: str, field: str | None) -> tuple[tuple[str, ...], "Reader"]:
    if field is not None:
        if field in names:
            return (field,), _named
        raise SparseGPTError(f"{where}: expected a field '{field}', found {_listed(names)}; name one of those")
    for wanted, read in FORMS:
        if all(name in names for name in wanted):
            return wanted, read
    raise SparseGPTError(
        f"{where}: expected a field '{TEXT_FIELD}', found {_listed(names)}; name the one to read, as in FILE:content"
    )


def _named(record: Mapping[str, Any], where: str, names: tuple[str, ...]) -> Document:
    value = record[names[0]]
    return Chat(_turns(value, where, names[0]), where) if isinstance(value, list) else _text(value, where, names[0])


def _pair(record: Mapping[str, Any], where: str, names: tuple[str, ...]) -> Chat:
    """A question and its answer, each as text or as turns."""
    values = [record[name] for name in names]
    if all(isinstance(value, list) for value in values):
        return Chat(tuple(turn for name in names for turn in _turns(record[name], where, name)), where)
    question, answer = (_text(value, where, name) for value, name in zip(values, names, strict=True))
    return _exchange(question, answer, where)


def _instructed(record: Mapping[str, Any], where: str, names: tuple[str, ...]) -> Chat:
    instruction, output = (_text(record[name], where, name) for name in names)
    more = record.get(_INPUT)
    return _exchange(f"{instruction}\n\n{_text(more, where, _INPUT)}" if more else instruction, output, where)


def _exchange(question: str, answer: str, where: str) -> Chat:
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Chat(turns, where, plain=question + answer)


Reader = Callable[[Mapping[str, Any], str, tuple[str, ...]], Document]
FORMS: tuple[tuple[tuple[str, ...], Reader], ...] = (
    ((TEXT_FIELD,), _named),
    (("messages",), _named),
    (("conversations",), _named),
    (("conversation",), _named),
    (("prompt", "completion"), _pair),
    (("prompt", "response"), _pair),
    (("instruction", "output"), _instructed),
)
_INPUT = "input"  # of an instruction, where it has any


def _turns(value: list[Any], where: str, field: str) -> tuple[Turn, ...]:
    if not value:
        raise SparseGPTError(f"{where}: expected turns in '{field}', found none; leave the record out")
    return tuple(_turn(turn, f"{where}, turn {number} of '{field}'") for number, turn in enumerate(value, start=1))


def _turn(turn: object, where: str) -> Turn:
    """A turn as templates take it; what else it says (calls of tools, a name) stays with it."""
    if not isinstance(turn, Mapping):
        raise SparseGPTError(f"{where}: expected role and content, found {_kind(turn)}")
    for speaker, words in TURNS:
        if speaker in turn and words in turn:
            said = turn[words]
            content = _text(said, where, words) if isinstance(said, str) else said
            rest = {name: value for name, value in turn.items() if name not in (speaker, words) and value is not None}
            return {"role": SPEAKERS.get(turn[speaker], turn[speaker]), "content": content, **rest}
    raise SparseGPTError(f"{where}: expected role and content, or from and value, found {_listed(turn)}")


def _text(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise SparseGPTError(f"{where}: expected text in '{field}', found {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair; no tokenizer takes it
        raise SparseGPTError(f"{where}: expected Unicode text in '{field}', found half a surrogate pair") from error
    return value


def _kind(value: object) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"


def _listed(fields: Iterable[object]) -> str:
    return ", ".join(map(str, fields)) or "none"
