"""Text that a model writes: the likeliest token each time, by a loop without any cache; what it cannot, it refuses."""

import json
import shutil

import pytest
import torch

from sparsegpt.calib_data import load_text
from sparsegpt.eval import generation
from sparsegpt.eval.generation import Drawing, greedy, openings_of, prompt_tokens, write
from sparsegpt.kernels.checkpoint.archive import pack_folder
from sparsegpt.model.loading import load_model
from sparsegpt.solvers.masks import layer_mask
from sparsegpt.sparsity import NM
from tests.support import block_linears, logits_of, prose, refused, save_tokenizer

PROMPT = "the cat sat on"


@pytest.fixture(scope="module")
def loaded(llama_folder):
    return load_model(str(llama_folder))


def likeliest(model, tokens, count):
    """One whole forward pass a token, without a cache."""
    ends = model.generation_config.eos_token_id
    for _ in range(count):
        new = logits_of(model, tokens)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, new], dim=1)
        if int(new) == ends:
            break
    return tokens


def test_the_likeliest_token_is_taken_each_time(loaded):
    tokens = prompt_tokens(loaded.tokenizer, PROMPT, chat=False)
    assert torch.equal(greedy(loaded.model, tokens, 20, 0), likeliest(loaded.model, tokens, 20))


def test_pieces_make_up_the_text_and_tokens_are_counted(loaded):
    pieces = []
    found = write(loaded.model, loaded.tokenizer, PROMPT, 12, pieces.append)
    expected = likeliest(loaded.model, prompt_tokens(loaded.tokenizer, PROMPT, chat=False), 12)[0]
    assert found.text == "".join(pieces) == loaded.tokenizer.decode(expected, skip_special_tokens=True)
    assert found.prompt_tokens + found.tokens == len(expected)
    assert found.text.startswith(PROMPT)


def test_a_seed_draws_the_same_tokens_and_another_does_not(loaded):
    texts = [
        write(loaded.model, loaded.tokenizer, PROMPT, 20, lambda piece: None, drawing=Drawing(2.0, 0.9, seed)).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_what_takes_no_effect_is_refused():
    with refused("temperature", settings=["seed"]):
        Drawing(seed=3)
    with refused("temperature", settings=["top_p"]):
        Drawing(top_p=0.5)


def test_prompts_that_do_not_fit_are_refused(loaded):
    with refused("64 positions", settings=["new_tokens"]):
        write(loaded.model, loaded.tokenizer, PROMPT, 64, print)
    with refused("no tokens"):
        write(loaded.model, loaded.tokenizer, "", 4, print)


def test_a_chat_goes_through_the_template(llama_folder, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(llama_folder, folder)
    tokenizer = load_model(str(folder)).tokenizer
    with refused("no chat template"):
        prompt_tokens(tokenizer, PROMPT, chat=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %} and"
    expected = tokenizer("user the cat and", add_special_tokens=False)["input_ids"]
    assert prompt_tokens(tokenizer, "the cat", chat=True)[0].tolist() == expected
    tokenizer.chat_template = "{{ raise_exception('only systems may speak') }}"
    with refused("chat template fails", "only systems may speak"):
        prompt_tokens(tokenizer, PROMPT, chat=True)


def test_openings_are_parts_of_the_text_in_their_order(loaded, tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(prose(60, seed) for seed in range(20)))
    source = load_text(str(text), "evaluation")
    [found] = openings_of({"lines": source}, loaded.tokenizer, "llama", 32, 40, "never")
    assert found.tokens.shape == (3, 16)
    places = [source.text.index(sample.opening + sample.text) for sample in found.samples]
    assert places == sorted(set(places))
    assert all(place == 0 or source.text[place - 1] == "\n" for place in places)
    assert openings_of({"short": source}, loaded.tokenizer, "llama", 32, 0, "never") == []


def test_a_model_that_cannot_write_costs_a_run_nothing(llama_folder, text_file, tmp_path, monkeypatch, run_cli):
    def fail(*arguments, **options):
        raise NotImplementedError("no cache of this kind")

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", fail)
    options = ["--calib", text_file, "--eval", text_file, "--samples", 2, "--seqlen", 16, "--eval-windows", 2]
    outcome = run_cli(
        "run", "--model", llama_folder, "--sparsity", "2:4", *options, "--preset", "paper", "--out", tmp_path / "out"
    )
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["samples"] == []
    assert any("no cache of this kind" in warning for warning in report["warnings"])


def test_the_command_writes_the_same_from_a_packed_folder(loaded, llama_folder, tmp_path, run_cli):
    model = load_model(str(llama_folder)).model
    with torch.no_grad():
        for linear in block_linears(model).values():
            linear.weight.masked_fill_(~layer_mask(linear.weight.abs(), NM(2, 4)), 0)
    model.save_pretrained(tmp_path / "pruned")
    save_tokenizer(tmp_path / "pruned")
    pack_folder(tmp_path / "pruned", tmp_path / "packed")
    options = ["--prompt", PROMPT, "--new-tokens", 8, "--model"]
    plain, packed = (run_cli("generate", *options, tmp_path / name) for name in ("pruned", "packed"))
    assert plain.code == packed.code == 0, packed.err
    assert plain.out == packed.out
    assert plain.out.startswith(PROMPT)
    assert "tokens/s" in packed.err
    found = json.loads(run_cli("generate", *options, tmp_path / "packed", "--json").out)
    assert found["text"] + "\n" == packed.out
    assert found["tokens"] <= 8
    run_cli("generate", *options, llama_folder, "--kernels", "dense").refused("prune it first")
    run_cli("generate", *options, tmp_path / "nowhere").refused("does not exist")


def test_the_letters_of_a_token_suffice(loaded):
    assert max(map(len, loaded.tokenizer.get_vocab())) <= generation.LETTERS
