"""Text sources, the split of the pydoc topics, and token windows, against their definitions."""

import gzip
import hashlib
import json
import re
import struct
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from sparsegpt.calib_data import KNOWN_SOURCES, TextSource, draw_windows, evaluation_tokens, load_text
from sparsegpt.calib_data import sources as sources_module
from sparsegpt.calib_data.pydoc_topics import held_out_topics, is_held_out, training_topics
from sparsegpt.errors import SparseGPTError


class ByteTokenizer:
    """One token a byte: what a window must contain can be read off the text."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        assert not verbose
        return {"input_ids": list(text.encode())}


def write_parquet(path: Path, **columns: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def refusal(name: str | Path) -> str:
    with pytest.raises(SparseGPTError) as caught:
        load_text(str(name), "calibration")
    message = str(caught.value)
    assert "\n" not in message
    return message


# Local files


def test_txt_is_one_document(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("one\n\ntwo \N{SNOWMAN}\n", encoding="utf-8")
    for split in ("calibration", "evaluation"):
        source = load_text(str(path), split)
        assert source.name == str(path)
        assert source.documents == ("one\n\ntwo \N{SNOWMAN}\n",)
        assert source.evaluation_windows is None


def test_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfplain")
    assert load_text(str(path), "calibration").documents == ("plain",)


def test_jsonl_takes_the_text_field_and_skips_blank_lines(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "first", "id": 1}\n\n{"text": "second\u2028line"}\n', encoding="utf-8")
    assert load_text(str(path), "calibration").documents == ("first", "second\u2028line")


def test_parquet_takes_the_text_column(tmp_path):
    path = write_parquet(tmp_path / "documents.parquet", text=["first", "second"], id=[1, 2])
    assert load_text(str(path), "evaluation").documents == ("first", "second")


def test_folder_is_read_in_sorted_order_recursively(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "b.txt").write_text("b")
    write_jsonl(tmp_path / "deep" / "a.jsonl", {"text": "a1"}, {"text": "a2"})
    write_parquet(tmp_path / "z.parquet", text=["z"])
    (tmp_path / "README.md").write_text("not a text of the corpus")
    source = load_text(str(tmp_path), "calibration")
    assert source.documents == ("a1", "a2", "b", "z")
    assert source.text == "a1\n\na2\n\nb\n\nz"


# Refusals: one clear line each


@pytest.mark.parametrize("name", ["wikitext3", ""])
def test_unknown_name_lists_the_known_ones(name):
    message = refusal(name)
    assert all(name in message for name in (*KNOWN_SOURCES, ".txt", ".jsonl", ".parquet"))


@pytest.mark.parametrize("name", ["absent.txt", "no/such/folder"])
def test_missing_path(name, tmp_path):
    assert f"{tmp_path / name}: no such file" in refusal(tmp_path / name)


def test_name_that_the_file_system_refuses():
    assert "cannot be read: File name too long" in refusal("a" * 5000 + ".txt")


def test_unsupported_suffix(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_text("text\nhello\n")
    assert "expected one of .txt, .md, .jsonl, .json, .csv, .parquet, found .tsv" in refusal(path)


@pytest.mark.parametrize("content", ["", " \n\n\t"])
def test_empty_text(content, tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    assert "expected text, found none" in refusal(path)


def test_empty_jsonl_parquet_and_folder(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    write_parquet(tmp_path / "empty.parquet", text=[])
    (tmp_path / "folder").mkdir()
    assert "found none" in refusal(tmp_path / "empty.jsonl")
    assert "found none" in refusal(tmp_path / "folder")
    assert "found none" in refusal(tmp_path / "empty.parquet")


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_text_that_is_not_utf8_names_the_byte(suffix, tmp_path):
    path = tmp_path / f"latin.{suffix}"
    path.write_bytes('{"text": "caf\xe9"}'.encode("latin-1"))
    message = refusal(path)
    assert "expected UTF-8" in message
    assert "0xe9 at offset 13" in message


def test_malformed_jsonl_names_the_line(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "cut\n')
    message = refusal(path)
    assert f"{path}, line 2: expected one JSON object a line" in message
    assert "line 1" not in message


def test_jsonl_without_the_field_names_those_found(tmp_path):
    path = write_jsonl(tmp_path / "other.jsonl", {"content": "hello", "id": 3})
    assert "line 1: expected a field 'text', found content, id" in refusal(path)


@pytest.mark.parametrize(
    ("record", "found"),
    [(["hello"], "type list"), ({"text": None}, "null"), ({"text": 3}, "type int"), ({"text": "\ud800"}, "surrogate")],
)
def test_jsonl_with_a_wrong_type(record, found, tmp_path):
    assert found in refusal(write_jsonl(tmp_path / "typed.jsonl", record))


def test_parquet_without_the_column_names_those_found(tmp_path):
    path = write_parquet(tmp_path / "other.parquet", sentence=["hello"], id=[1])
    assert "expected a field 'text', found sentence, id" in refusal(path)


def test_parquet_with_a_null_names_the_row(tmp_path):
    path = write_parquet(tmp_path / "holes.parquet", text=["hello", None])
    assert "row 2: expected text in 'text', found null" in refusal(path)


def test_file_that_is_not_parquet(tmp_path):
    path = tmp_path / "fake.parquet"
    path.write_bytes(b"PAR1 but not really")
    assert f"{path}: expected a parquet file" in refusal(path)


# The Hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty Hub cache and no network, as a machine without internet has it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "hub"


def cached_file(cache: Path, name: str, split: str) -> Path:
    """Where the Hub client keeps this split's file once it was downloaded."""
    data = sources_module.HUB_DATA[name]
    return cached(cache, data.repository, data.revision, data.files[split])


def cached(cache: Path, repository: str, revision: str, file: str) -> Path:
    """The same for any file of a data set."""
    folder, commit = cache / f"datasets--{repository.replace('/', '--')}", "0" * 40
    reference, path = folder / "refs" / revision, folder / "snapshots" / commit / file
    for parent in (reference.parent, path.parent):
        parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    return path


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4"])
def test_offline_names_the_data_set_and_the_local_alternative(name, split, hub_cache):
    with pytest.raises(SparseGPTError) as caught:
        load_text(name, split)
    message = str(caught.value)
    assert "\n" not in message
    for part in (name, sources_module.HUB_DATA[name].repository, "FILE.txt|FILE.jsonl|FILE.parquet, or pydoc"):
        assert part in message


def test_wikitext2_and_ptb_come_from_cached_parquet_joined_as_published(hub_cache):
    write_parquet(cached_file(hub_cache, "wikitext2", "evaluation"), text=["", " = Title = \n", " Some text . \n"])
    write_parquet(cached_file(hub_cache, "ptb", "calibration"), sentence=["no it was n't", "black <unk>"])
    assert load_text("wikitext2", "evaluation").text == "\n\n = Title = \n\n\n Some text . \n"
    assert load_text("ptb", "calibration").text == "no it was n't black <unk>"


def test_c4_evaluates_on_1100_documents_and_256_windows(hub_cache):
    lines = "".join(json.dumps({"text": f"document {i}", "url": "u"}) + "\n" for i in range(1200))
    for split in ("calibration", "evaluation"):
        cached_file(hub_cache, "c4", split).write_bytes(gzip.compress(lines.encode()))
    evaluation, calibration = load_text("c4", "evaluation"), load_text("c4", "calibration")
    assert evaluation.text == " ".join(f"document {i}" for i in range(1100))
    assert evaluation.evaluation_windows == 256
    assert len(calibration.documents) == 1200
    assert calibration.windows_within_documents


CONVERTED = "refs/convert/parquet"


def test_any_data_set_of_the_hub_by_its_id(hub_cache):
    """Configuration, split and field after colons; without them the default ones and the usual fields."""
    for file, columns in {
        "default/train/0000.parquet": {"text": ["plain"]},
        "default/test/0000.parquet": {"text": ["held out"]},
        "en/partial-train/0000.parquet": {"text": ["part"], "body": ["large"]},
        "default/chats/0000.parquet": {"messages": [[{"role": "user", "content": "hello"}]]},
    }.items():
        write_parquet(cached(hub_cache, "org/some-data", CONVERTED, file), **columns)
    assert load_text("org/some-data", "calibration").documents == ("plain",)
    assert load_text("org/some-data", "evaluation").documents == ("held out",)
    assert load_text("org/some-data:en:train:body", "calibration").documents == ("large",)
    assert load_text("org/some-data:en", "calibration").documents == ("part",)
    (chat,) = load_text("org/some-data::chats", "calibration").documents
    assert [dict(turn) for turn in chat.turns] == [{"role": "user", "content": "hello"}]
    with pytest.raises(SparseGPTError, match="expected a field 'body', found text"):
        load_text("org/some-data:default:train:body", "calibration")


def test_an_id_that_is_not_to_be_had_says_what_else_it_could_be(hub_cache):
    message = refusal("org/other-data:en")
    for part in ("org/other-data", "neither in the local cache nor reachable", "no folder org/other-data is here"):
        assert part in message
    assert "org/other-data:config:split:field" in message


def test_a_local_folder_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "data").mkdir()
    (tmp_path / "org" / "data" / "a.txt").write_text("here")
    assert load_text("org/data", "calibration").documents == ("here",)
    assert "no such file" in refusal("org/absent.txt")


# pydoc


def word_runs(text: str, length: int) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_pydoc_sides_share_no_topic_and_no_sentence():
    from pydoc_data.topics import topics

    held_out, training = held_out_topics(), training_topics()
    assert not held_out.keys() & training.keys()
    assert held_out.keys() == {name for name in topics if is_held_out(name)}
    assert all(held_out[name] == topics[name] for name in held_out)
    forbidden = set().union(*(word_runs(text, 16) for text in held_out.values()))
    for text in training.values():
        for paragraph in text.split("\n\n"):
            assert not word_runs(paragraph, 16) & forbidden


def test_pydoc_holds_out_a_fair_share():
    from pydoc_data.topics import topics

    share = sum(map(len, held_out_topics().values())) / sum(map(len, topics.values()))
    assert 0.10 < share < 0.25
    assert sum(map(len, training_topics().values())) > 200_000


def test_pydoc_by_name():
    assert load_text("pydoc", "calibration").documents == tuple(training_topics().values())
    assert load_text("pydoc", "evaluation").documents == tuple(held_out_topics().values())


# Windows


def test_windows_are_slices_of_the_token_stream_and_repeat_with_the_seed():
    source = TextSource("numbers", (" ".join(map(str, range(500))), "the end"))
    stream = source.text.encode()
    first = draw_windows(source, ByteTokenizer(), samples=40, sequence_length=32, seed=7)
    assert first.windows.shape == (40, 32)
    assert first.windows.dtype == torch.long
    assert all(bytes(window.tolist()) in stream for window in first.windows)
    assert torch.equal(first.windows, draw_windows(source, ByteTokenizer(), 40, 32, seed=7).windows)
    assert not torch.equal(first.windows, draw_windows(source, ByteTokenizer(), 40, 32, seed=8).windows)


def test_every_start_position_is_drawn_about_equally_often():
    source = TextSource("letters", ("abcdefgh",))
    windows = draw_windows(source, ByteTokenizer(), samples=6000, sequence_length=6, seed=0).windows
    counts = torch.bincount(windows[:, 0] - ord("a"))
    assert counts.tolist() == pytest.approx([2000, 2000, 2000], abs=150)  # three standard deviations are 110


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    draw_windows(TextSource("t", ("abcdef",)), ByteTokenizer(), 2, 3, seed=0)
    assert torch.equal(torch.rand(2), expected)


def test_description_carries_the_hash_of_the_tokens():
    drawn = draw_windows(TextSource("t", ("some text",)), ByteTokenizer(), samples=3, sequence_length=4, seed=5)
    tokens = drawn.windows.flatten().tolist()
    expected = hashlib.sha256(struct.pack(f"<{len(tokens)}q", *tokens)).hexdigest()
    assert drawn.describe() == {
        "source": "t",
        "samples": 3,
        "sequence_length": 4,
        "seed": 5,
        "bos": None,
        "tokens": 12,
        "documents": "auto",
        "boundary": None,
        "token_hash": expected,
    }
    json.dumps(drawn.describe())


def test_text_of_exactly_one_window_will_do_and_one_token_less_will_not():
    assert draw_windows(TextSource("t", ("abcd",)), ByteTokenizer(), 2, 4, seed=0).windows.shape == (2, 4)
    with pytest.raises(SparseGPTError, match=r"t: expected at least 5 tokens .* found 4; .*sequence length"):
        draw_windows(TextSource("t", ("abcd",)), ByteTokenizer(), 2, 5, seed=0)


@pytest.mark.parametrize(("samples", "length"), [(0, 4), (4, 0), (-1, 4)])
def test_no_windows_asked_for(samples, length):
    with pytest.raises(SparseGPTError, match="at least 1"):
        draw_windows(TextSource("t", ("abcd",)), ByteTokenizer(), samples, length, seed=0)


def test_windows_within_documents_never_cross_and_skip_short_ones():
    documents = ("a" * 50, "b" * 7, "c" * 8)
    source = TextSource("web", documents, separator=" ", windows_within_documents=True)
    windows = draw_windows(source, ByteTokenizer(), samples=64, sequence_length=8, seed=0).windows
    assert {bytes(window.tolist()) for window in windows} == {b"a" * 8, b"c" * 8}


def test_windows_within_documents_refuse_when_all_are_short():
    source = TextSource("web", ("short", "texts"), windows_within_documents=True)
    with pytest.raises(SparseGPTError, match="expected a document of 9 tokens, found none longer than 5"):
        draw_windows(source, ByteTokenizer(), samples=1, sequence_length=9, seed=0)


def test_evaluation_counts_bytes_not_characters():
    tokens, size = evaluation_tokens(
        TextSource("t", ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "x"), " "), ByteTokenizer()
    )
    assert bytes(tokens.tolist()).decode() == "caf\N{LATIN SMALL LETTER E WITH ACUTE} x"
    assert size == len(tokens) == 7


def test_importing_the_package_costs_no_heavy_library(forked_light):
    code = (
        "import sys, sparsegpt; before = set(sys.modules); import sparsegpt.calib_data; "
        "print(*(set(sys.modules) - before) & {'transformers', 'datasets', 'pyarrow', 'tokenizers', 'pydoc_data'})"
    )
    assert forked_light.python("-c", code) == "\n"
