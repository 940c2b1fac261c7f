"""Files of every form people keep text in: the tokens are those of an independent reading of each."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

from sparsegpt.calib_data import draw_mixture, evaluation_tokens, load_text, load_texts
from tests.support import refused, save_tokenizer

TEMPLATE = (
    "{% for turn in messages %}{% if turn.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no role ' + turn.role) }}{% endif %}<s>{{ turn.role }}: {{ turn.content }}</s>{% endfor %}"
)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parquet(**columns):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def turns(*said):
    """Turns as a template takes them, in turn of the user and the assistant."""
    return [{"role": ("user", "assistant")[place % 2], "content": words} for place, words in enumerate(said)]


ASK, TELL = "the small dog", "sang about rain."
CHAT = turns(ASK, TELL)
SHARED = [{"from": "human", "value": ASK}, {"from": "gpt", "value": TELL}]
# Name of the file: (its bytes, the field asked for, the documents in it: text, or turns).
FILES = {
    "plain.txt": (b"the old dog\nran.", "", ["the old dog\nran."]),
    "marked.txt": (b"\xef\xbb\xbfthe wind", "", ["the wind"]),
    "line-ends.txt": (b"the\r\nwind\rand rain", "", ["the\nwind\nand rain"]),
    "page.md": (b"# birds\n\nsang", "", ["# birds\n\nsang"]),
    "packed.txt.gz": (gzip.compress(b"seven birds"), "", ["seven birds"]),
    "lines.jsonl": (lines({"text": "one", "id": 1}, {"text": "two"}), "", ["one", "two"]),
    "other.jsonl": (lines({"content": "one", "text": "x"}, {"content": "two"}), "content", ["one", "two"]),
    "lines.jsonl.gz": (gzip.compress(lines({"text": "rain"}, {"text": "wind"})), "", ["rain", "wind"]),
    "list.json": (json.dumps([{"text": "one"}, {"text": "two"}]).encode(), "", ["one", "two"]),
    "strings.json": (json.dumps(["one", "two"]).encode(), "", ["one", "two"]),
    "inside.json": (json.dumps({"version": 1, "data": [{"text": "one"}]}).encode(), "", ["one"]),
    "really-lines.json": (lines({"text": "one"}, {"text": "two"}), "", ["one", "two"]),
    "table.csv": (b'id,text\n1,"small, old"\n2,"two\nlines ""here"""\n', "", ["small, old", 'two\nlines "here"']),
    "named.csv.gz": (gzip.compress(b"text,body\nx,one\ny,two\n"), "body", ["one", "two"]),
    "table.parquet": (parquet(text=["one", "two"], id=[1, 2]), "", ["one", "two"]),
    "named.parquet": (parquet(text=["x"], passage=["one"]), "passage", ["one"]),
    "chat.jsonl": (lines({"messages": CHAT}, {"messages": CHAT[:1]}), "", [CHAT, CHAT[:1]]),
    "shared.json": (json.dumps([{"id": "a", "conversations": SHARED}]).encode(), "", [CHAT]),
    "roles.jsonl": (lines({"conversation": CHAT}), "", [CHAT]),
    "pairs.jsonl": (lines({"prompt": ASK, "completion": TELL}), "", [CHAT]),
    "pairs-of-turns.jsonl": (lines({"prompt": CHAT[:1], "response": CHAT[1:]}), "", [CHAT]),
    "tasks.json": (
        json.dumps([{"instruction": "say", "input": "rain", "output": "rain"}]).encode(),
        "",
        [turns("say\n\nrain", "rain")],
    ),
    "chat.parquet": (parquet(messages=[CHAT, CHAT[:1]]), "", [CHAT, CHAT[:1]]),
    "dialogue.jsonl.gz": (gzip.compress(lines({"text": "x", "dialogue": SHARED})), "dialogue", [CHAT]),
    "mixed.jsonl": (lines({"text": "one"}, {"messages": CHAT}), "", ["one", CHAT]),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    found = AutoTokenizer.from_pretrained(folder)
    found.chat_template = TEMPLATE
    return found


def ids_of(document, tokenizer):
    """The tokens of a document by the tokenizer's own ways."""
    if isinstance(document, str):
        return tokenizer(document, add_special_tokens=False)["input_ids"]
    return tokenizer.apply_chat_template(document, tokenize=True, return_dict=False)


@pytest.mark.parametrize("name", FILES)
def test_tokens_are_those_of_an_independent_reading(name, tokenizer, tmp_path):
    content, field, documents = FILES[name]
    (tmp_path / name).write_bytes(content)
    text = f"{tmp_path / name}:{field}" if field else str(tmp_path / name)
    expected = [ids_of(document, tokenizer) for document in documents]
    rows = draw_mixture(load_texts(text, "calibration"), tokenizer, len(documents), 512, 0, None, "single").rows
    assert sorted(row.tolist() for row in rows) == sorted(expected)
    if all(isinstance(document, list) for document in documents):  # the template ends each conversation
        stream, _ = evaluation_tokens(load_text(text, "evaluation").for_tokenizer(tokenizer), tokenizer)
        assert stream.tolist() == [token for ids in expected for token in ids]


def test_a_folder_holds_all_forms_but_its_card(tokenizer, tmp_path):
    for name, (content, field, _) in FILES.items():
        if not field:
            (tmp_path / name).write_bytes(content)
    (tmp_path / "README.md").write_text("a card")
    found = load_text(str(tmp_path), "calibration").for_tokenizer(tokenizer).texts
    named = {name: documents for name, (_, field, documents) in FILES.items() if not field}
    expected = [document for name in sorted(named) for document in named[name]]
    assert len(found) == len(expected)
    assert [text for text, document in zip(found, expected, strict=True) if isinstance(document, str)] == [
        document for document in expected if isinstance(document, str)
    ]


def test_without_a_template_prompt_and_completion_are_one_text(tmp_path):
    save_tokenizer(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "pairs.jsonl").write_bytes(lines({"prompt": "the wind", "completion": " sang"}))
    text = load_text(str(tmp_path / "pairs.jsonl"), "calibration").for_tokenizer(plain)
    assert text.texts == ("the wind sang",)


SIXTEEN = [{"text": "fine"}] * 16
BAD = {
    "no field in line 17": (
        "a.jsonl",
        lines(*SIXTEEN, {"body": "x", "id": 1}),
        "",
        "line 17: expected a field 'text', found body, id",
    ),
    "no such field": ("a.jsonl", lines(*SIXTEEN), "body", "line 1: expected a field 'body', found text"),
    "null in line 17": ("a.jsonl", lines(*SIXTEEN, {"text": None}), "", "line 17: expected text in 'text', found null"),
    "text has no fields": ("a.txt", b"text", "body", "expected records with a field 'body', found text alone"),
    "no JSON": ("a.json", b'{"text": ', "", "expected JSON"),
    "a number": ("a.json", b"3", "", "expected a list of records, found a value of type int"),
    "cut": ("a.txt.gz", gzip.compress(b"some text")[:-9], "", "expected gzip data"),
    "no gzip": ("a.txt.gz", b"some text", "", "expected gzip data"),
    "open quote": ("a.csv", b'text\n"never ends\n', "", "expected comma-separated values"),
    "short row": ("a.csv", b"id,text\n1\n", "", "line 2: expected text in 'text', found null"),
    "no turns": ("a.jsonl", lines({"messages": []}), "", "line 1: expected turns in 'messages', found none"),
    "no turn": ("a.jsonl", lines({"messages": ["x"]}), "", "turn 1 of 'messages': expected role and content"),
    "half a turn": ("a.jsonl", lines({"messages": [{"role": "user"}]}), "", "from and value, found role"),
    "half a pair": ("a.jsonl", lines({"prompt": "x", "completion": 3}), "", "expected text in 'completion'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_their_line(case, tmp_path):
    name, content, field, said = BAD[case]
    (tmp_path / name).write_bytes(content)
    with refused(name, said, settings=["calibration"]):
        load_text(f"{tmp_path / name}{field and ':'}{field}", "calibration")


def test_a_template_that_fails_names_the_line(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"messages": CHAT}, {"messages": [{"role": "king", "content": "x"}]}))
    text = load_text(str(tmp_path / "a.jsonl"), "calibration")
    with refused("line 2: the tokenizer's chat template fails", "no role king"):
        text.for_tokenizer(tokenizer)


def test_a_conversation_needs_a_template(tmp_path):
    save_tokenizer(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(lines({"messages": CHAT}))
    text = load_text(str(tmp_path / "a.jsonl"), "calibration")
    with refused("line 1: a conversation needs a chat template"):
        text.for_tokenizer(AutoTokenizer.from_pretrained(tmp_path))
    with refused("conversations become text by a tokenizer's template"):
        _ = text.text


def test_packed_windows_hold_whole_documents_behind_a_boundary(tokenizer, tmp_path):
    """Every document of a round is there, in one piece or going on in the next window."""
    texts = ["the dog", "seven small birds sang", "rain", "old wind and rain and birds and wind"]
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": text} for text in texts)))
    source = load_text(str(tmp_path / "a.jsonl"), "calibration")
    documents = [ids_of(text, tokenizer) for text in texts]
    drawn = draw_mixture([source], tokenizer, 6, 10, seed=1, documents="pack")
    assert drawn.boundary == tokenizer.bos_token_id
    assert drawn.windows.shape == (6, 10)
    pieces = []
    for window in drawn.windows.tolist():
        assert window[0] == drawn.boundary
        parts = [[]]
        for token in window[1:]:
            parts.append([]) if token == drawn.boundary else parts[-1].append(token)
        pieces.append(parts)
    stream = [token for parts in pieces for part in parts for token in part]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1)).tolist()
    first_round = [token for index in order for token in documents[index]]
    assert stream[: len(first_round)] == first_round
    starts = {tuple(part) for parts in pieces for part in parts[1:-1]}  # neither cut nor a rest
    assert starts <= {tuple(document) for document in documents}
    assert starts


def test_packed_boundaries_are_in_no_document(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"messages": CHAT}))
    source = load_text(str(tmp_path / "a.jsonl"), "calibration")
    with refused("a special token before each that is in none of them", settings=["documents"]):
        draw_mixture([source], tokenizer, 2, 8, seed=0, documents="pack")
    with refused(f"token {tokenizer.bos_token_id}, with which windows begin"):
        draw_mixture([source], tokenizer, 2, 8, seed=0, bos=tokenizer.bos_token_id, documents="pack")


def test_a_document_that_begins_by_itself_gets_no_second_boundary(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("<s>the wind")
    source = load_text(str(tmp_path / "a.txt"), "calibration")
    words = ids_of("the wind", tokenizer)
    (row,) = draw_mixture([source], tokenizer, 1, len(words) + 1, seed=0, documents="pack").rows
    assert row.tolist() == [tokenizer.bos_token_id, *words]


def test_another_choice_of_documents_is_refused(tokenizer):
    with refused("documents 'packed' is not known", "did you mean pack?", settings=["documents"]):
        draw_mixture(load_texts("pydoc", "calibration"), tokenizer, 1, 8, seed=0, documents="packed")
