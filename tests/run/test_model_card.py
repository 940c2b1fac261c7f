"""The section of README.md, and the front matter that the Hub reads."""

import re

import pytest
from huggingface_hub import ModelCard

from sparsegpt.run.model_card import Card

TAGS = ["sparsegpt", "pruned", "2:4"]


def card(**changes):
    fields = {
        "base": "org/base",
        "patterns": ("2:4",),
        "method": "admm",
        "rows": {"preset": "default"},
        "perplexities": {"wikitext2": {"dense": 5.0, "pruned": 6.12345}},
        "command": "sparsegpt run --model org/base",
        "loader": "AutoModelForCausalLM",
    }
    return Card(**{**fields, **changes})


def metadata(text):
    """As the Hub's own client reads it."""
    return ModelCard(text.decode()).data.to_dict()


def test_a_fresh_card_says_all():
    text = card().added_to(None).decode()
    data = metadata(text.encode())
    assert (data["base_model"], data["library_name"], data["tags"]) == ("org/base", "transformers", TAGS)
    for part in ("# org/base, pruned", "| base model | org/base |", "| pattern | 2:4 |", "| method | admm |"):
        assert part in text
    assert "| perplexity | dense | pruned |\n| --- | --- | --- |\n| wikitext2 | 5.0000 | 6.1235 |" in text
    assert "```sh\nsparsegpt run --model org/base\n```" in text
    assert 'AutoModelForCausalLM.from_pretrained(name, dtype="auto")' in text


FRONT_MATTER = {
    "no tags": ("license: mit  # as given\nlanguage: no\n", {"license": "mit"}, TAGS),
    "a list": ("tags:\n- llama\n- pruned\nlicense: mit\n", {"license": "mit"}, ["llama", "pruned", "sparsegpt", "2:4"]),
    "an indented list": ("tags:\n    - llama\n\n# why\nlicense: mit\n", {"license": "mit"}, ["llama", *TAGS]),
    "a list in brackets": ("a: 1\ntags: [llama,\n  chat]\nb: 2\n", {"a": 1, "b": 2}, ["llama", "chat", *TAGS]),
    "one word": ('"tags": llama\n', {}, ["llama", *TAGS]),
    "nothing": ("tags:\nbase_model:\n", {"base_model": "org/base"}, TAGS),
    "a base": (
        "base_model: other/one\nlibrary_name: peft\n",
        {"base_model": "other/one", "library_name": "peft"},
        TAGS,
    ),
    "a block": ("text: |\n  tags: no\n  - x\ndate: 2024-01-01\n", {"text": "tags: no\n- x\n"}, TAGS),
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", FRONT_MATTER)
def test_front_matter_keeps_what_is_there_to_the_letter(kind, newline):
    front, kept, tags = FRONT_MATTER[kind]
    readme = f"---\n{front}---\n# Title\n\ntext\n".replace("\n", newline).encode()
    text = card().added_to(readme)
    data = metadata(text)
    assert {key: data[key] for key in kept} == kept
    assert data["tags"] == tags
    assert data["base_model"] == kept.get("base_model", "org/base")
    assert f"{newline}# Title{newline}{newline}text{newline}{newline}## Pruned".encode() in text
    others = [line for line in front.splitlines() if re.match(r"[^t\"\s\-#][^:]*: .", line)]
    assert all(line.encode() in text for line in others)
    assert (b"\r\n" in text) == (newline == "\r\n")


@pytest.mark.parametrize(
    "start",
    [
        b"---\n: : :\n\t- [\n---\n# Title\n",
        b"---\n- a\n- b\n---\n# Title\n",
        b"---\njust words\n---\ntext\n",
        b"---\nlicense: mit\n# never ends\n",
        b"---\ntags:\n- a\n# why\n- b\n  x: {\n---\n",
        b"\xef\xbb\xbf---\nlicense: mit\n---\n",
        b"---\nname: \xff\xfe\n---\n",
    ],
)
def test_front_matter_that_is_none_is_left_as_it_is(start):
    text = card().added_to(start)
    assert text.startswith(start.rstrip())
    assert b"\n\n## Pruned with sparsegpt\n" in text


def test_text_before_the_section_stays_to_the_byte():
    readme = b"# Title\n\xff\xfe caf\xc3\xa9 \0\n"
    text = card().added_to(readme)
    assert readme.rstrip() in text
    assert metadata(text.replace(b"\xff\xfe", b"").replace(b"\0", b""))["tags"] == TAGS


def test_figures_of_an_earlier_pruning_are_gone():
    once = card(perplexities={"t": {"pruned": 77.5}}).added_to(b"# Title\n")
    twice = card(perplexities={"t": {"pruned": 99.5}}).added_to(once)
    assert b"77.5" in once
    assert b"77.5" not in twice
    assert b"99.5" in twice
    assert b"pruned once more" in twice
    assert twice.count(b"## Pruned with sparsegpt") == 2


def test_what_users_type_is_no_markup():
    text = card(
        base="a|b<script>",
        command="run '```' --only 'a|b'",
        rows={"calibration": "two\nlines | <b>"},
    ).added_to(None)
    assert b"| base model | a\\|b&lt;script> |" in text
    assert b"| calibration | two lines \\| &lt;b> |" in text
    assert b"````sh\nrun '```' --only 'a|b'\n````" in text
    assert "base_model" not in metadata(text)  # that is no id


def test_other_models_are_loaded_otherwise():
    text = card(loader="AutoModelForImageTextToText", trust_remote_code=True, command=None, perplexities={}).section()
    assert 'AutoModelForImageTextToText.from_pretrained(name, dtype="auto", trust_remote_code=True)' in text
    assert "processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)" in text
    assert "command" not in text
    assert "figures" not in text
