"""Perplexity against a plain loop in float64, one token at a time."""

import copy
import dataclasses
import math
import sys

import pytest
import torch

from sparsegpt import perplexity
from sparsegpt.calib_data import load_text
from sparsegpt.eval import perplexity as script
from sparsegpt.eval.perplexity import ABSURD_PERPLEXITY, Score, TextScore, score, score_text
from tests.support import VOCABULARY, random_windows, refused, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@torch.no_grad()
def plain_nats(model, tokens, length, bos=None, max_windows=None) -> float:
    """Mean of -log p(token | its window so far), window after window, from a float64 copy of the model."""
    model = copy.deepcopy(model).double()
    losses = []
    for start in range(0, len(tokens) - length + 1, length)[:max_windows]:
        window = tokens[start : start + length].tolist()
        prefix = [] if bos is None else [bos]
        logits = model(input_ids=torch.tensor([prefix + window])).logits[0, len(prefix) :]
        for place in range(1, length):
            losses.append(-float(logits[place - 1].log_softmax(0)[window[place]]))
    return sum(losses) / len(losses)


TOKENS = random_windows(1, 173).flatten()


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 7, 100])
def test_perplexity_is_the_plain_loops(model, batch_size):
    expected = plain_nats(model, TOKENS, 16)
    found = score(model, TOKENS, 16, batch_size=batch_size)
    assert found.nats == pytest.approx(expected, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert (found.windows, found.tokens) == (10, 150)
    assert perplexity(model, TOKENS, 16) == pytest.approx(math.exp(expected), rel=1e-5)


@pytest.mark.parametrize("length", [2, 5, 64, 173])
def test_windows_of_any_length(model, length):
    assert score(model, TOKENS, length).nats == pytest.approx(plain_nats(model, TOKENS, length), rel=1e-6)


def test_logits_are_scored_in_pieces(model, monkeypatch):
    whole = score(model, TOKENS, 16).nats
    monkeypatch.setattr(script, "LOGIT_POSITIONS", 7)
    assert score(model, TOKENS, 16).nats == pytest.approx(whole, rel=1e-6)


def test_a_batch_dimension_and_a_remainder_change_nothing(model):
    assert score(model, TOKENS[None], 16) == score(model, TOKENS[:160], 16)


def test_max_windows_takes_the_first_ones(model):
    found = score(model, TOKENS, 16, max_windows=3)
    assert found.nats == pytest.approx(plain_nats(model, TOKENS, 16, max_windows=3), rel=1e-6)
    assert found.windows == 3


@pytest.mark.parametrize("batch_size", [1, 3])
def test_bos_stands_before_every_window_and_is_not_scored(model, batch_size):
    found = score(model, TOKENS, 16, bos=5, batch_size=batch_size)
    assert found.nats == pytest.approx(plain_nats(model, TOKENS, 16, bos=5), rel=1e-6)
    assert found.nats != pytest.approx(score(model, TOKENS, 16).nats, rel=1e-4)
    assert found.tokens == 150


def test_half_precision_models_are_scored_in_float32(model):
    half = copy.deepcopy(model).bfloat16()
    assert score(half, TOKENS, 16).nats == pytest.approx(plain_nats(half, TOKENS, 16), rel=1e-2)


def test_the_mode_of_the_model_comes_back(model):
    for training in (True, False):
        score(model.train(training), TOKENS, 16)
        assert model.training == training
    model.eval()


@pytest.mark.parametrize(
    ("tokens", "length", "fragments"),
    [
        (TOKENS[:15], 16, ("15 tokens", "16", "a shorter sequence length")),
        (TOKENS[:0], 16, ("0 tokens",)),
        (TOKENS, 1, ("1", "at least 2")),
        (TOKENS, 0, ("0", "at least 2")),
        (TOKENS, -3, ("-3",)),
        (torch.full((20,), VOCABULARY), 10, (f"token {VOCABULARY}", "vocabulary", "tokenizer")),
    ],
)
def test_what_cannot_be_scored_is_refused(model, tokens, length, fragments):
    with refused(*fragments):
        score(model, tokens, length)


# Named texts


class Tokenizer:
    """One token a byte, modulo the vocabulary."""

    bos_token_id = 5

    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": [byte % VOCABULARY for byte in text.encode()]}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Caf\u00e9 and rain, " * 20, encoding="utf-8")
    return path


def test_bits_per_byte_spread_the_mean_loss_over_the_bytes_of_the_text(model, text):
    tokens = torch.tensor(Tokenizer()(text.read_text("utf-8"), False, False)["input_ids"])
    nats = plain_nats(model, tokens, 16)
    found = score_text(model, Tokenizer(), str(text), 16)
    assert found.data == str(text)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) * len(tokens) / text.stat().st_size, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats), rel=1e-5)


@pytest.mark.parametrize(
    ("choice", "model_type", "token"),
    [
        ("never", "llama", None),
        ("never", "gemma3_text", None),
        ("always", "llama", 5),
        ("auto", "llama", None),
        ("auto", "opt", None),
        ("auto", "gemma", 5),
        ("auto", "gemma3_text", 5),
    ],
)
def test_bos_is_chosen_by_flag_and_family(model, text, monkeypatch, choice, model_type, token):
    monkeypatch.setattr(model.config, "model_type", model_type)
    tokens = torch.tensor(Tokenizer()(text.read_text("utf-8"), False, False)["input_ids"])
    found = score_text(model, Tokenizer(), str(text), 16, bos=choice)
    assert found.perplexity == pytest.approx(math.exp(plain_nats(model, tokens, 16, bos=token)), rel=1e-5)


def test_bos_that_does_not_exist_is_refused(model, text, monkeypatch):
    monkeypatch.setattr(Tokenizer, "bos_token_id", None)
    with refused("beginning-of-sequence", "set bos to never"):
        score_text(model, Tokenizer(), str(text), 16, bos="always")
    with refused("'sometimes'", "auto", "never"):
        score_text(model, Tokenizer(), str(text), 16, bos="sometimes")


def test_only_the_protocols_windows_of_a_data_set_are_scored(model, text, monkeypatch):
    def with_three_windows(name, split):
        assert split == "evaluation"
        return dataclasses.replace(load_text(name, split), evaluation_windows=3)

    monkeypatch.setattr(script, "load_text", with_three_windows)
    assert score_text(model, Tokenizer(), str(text), 16).windows == 3


def test_the_file_runs_as_a_script(llama_folder, text_file, monkeypatch, capsys):
    from transformers import AutoTokenizer

    arguments = ["perplexity.py", "--model", str(llama_folder), "--seqlen", "16", "--data"]
    monkeypatch.setattr(sys, "argv", [*arguments, str(text_file)])
    script.main()
    found = score_text(tiny_model("llama"), AutoTokenizer.from_pretrained(llama_folder), str(text_file), 16)
    assert f"perplexity {found.perplexity:.4f}, {found.bits_per_byte:.4f} bits per byte" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "/no/such.txt"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("perplexity: /no/such.txt")


# The alarm

SCORE = TextScore(data="wikitext2", perplexity=4.0, bits_per_byte=1.0, tokens=10, windows=1, tokens_per_second=1.0)


@pytest.mark.parametrize(
    ("value", "alarmed"),
    [
        (3.9, False),
        (ABSURD_PERPLEXITY * 0.99, False),
        (ABSURD_PERPLEXITY * 1.01, True),
        (math.inf, True),
        (math.nan, True),
    ],
)
def test_a_score_that_no_trained_model_has_raises_the_alarm(value, alarmed):
    alarm = dataclasses.replace(SCORE, perplexity=value).alarm
    assert (alarm is not None) == alarmed
    if alarm:
        assert "wikitext2" in alarm
        assert "\n" not in alarm


def test_a_broken_model_raises_the_alarm_and_a_merely_random_one_does_not(model, text):
    assert score_text(model, Tokenizer(), str(text), 16).alarm is None
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight.mul_(100)
    assert score_text(broken, Tokenizer(), str(text), 16).alarm


def test_perplexity_overflows_to_infinity():
    assert Score(1000.0, 1, 1).perplexity == math.inf
