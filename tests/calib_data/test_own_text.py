"""`--calib self`: text that the model writes, against what the model says of it."""

import pytest
import torch
from transformers import AutoTokenizer

from sparsegpt.calib_data import draw_mixture, load_text, load_texts
from sparsegpt.calib_data.own_text import with_own_text
from tests.support import refused, save_tokenizer, tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_tokens_are_drawn_from_the_model_itself(tokenizer):
    """Of one token after the start, shares are the model's probabilities, within 4.5 standard deviations."""
    model = tiny_model("llama", spread=0.05)
    source = with_own_text(load_text("self", "calibration"), model, tokenizer, 1500, 1, seed=0)
    drawn = [ids[0] for text in source.texts if (ids := tokenizer(text, add_special_tokens=False)["input_ids"])]
    with torch.no_grad():
        chances = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].double().softmax(-1)

    def returns(token):
        """Letters do; of others the text is what another token begins with."""
        return tokenizer(tokenizer.decode([token]), add_special_tokens=False)["input_ids"] == [token]

    plain = [token for token in range(3, 90) if returns(token)]
    assert len(plain) > 40
    count = len(source.texts)
    for token in plain:
        expected = float(chances[token])
        spread = (expected * (1 - expected) / count) ** 0.5
        assert abs(drawn.count(token) / count - expected) < 4.5 * spread


def test_the_same_seed_writes_the_same_and_the_global_generator_stays(tokenizer):
    model, sources = tiny_model("llama"), load_texts("self", "calibration")

    def draw(seed):
        return draw_mixture(sources, tokenizer, 4, 16, seed, model=model).windows

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = draw(0)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))


def test_it_goes_with_other_texts_and_packing(tokenizer, text_file):
    sources = load_texts(f"self=1,{text_file}=1", "calibration")
    drawn = draw_mixture(sources, tokenizer, 4, 16, 0, documents="pack", model=tiny_model("llama"))
    assert drawn.windows.shape == (4, 16)
    assert drawn.source == f"self=1, {text_file}=1"


def test_it_is_refused_where_it_makes_no_sense(tokenizer):
    with refused("text to calibrate on", settings=["evaluate"]):
        load_text("self", "evaluation")
    with refused("expected the model that writes the text"):
        draw_mixture(load_texts("self", "calibration"), tokenizer, 2, 8, 0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path, bos_token=None, eos_token=None)
    with refused("no token with which a text begins"):
        draw_mixture(load_texts("self", "calibration"), tokenizer, 2, 8, 0, model=tiny_model("llama"))
