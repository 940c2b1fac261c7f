"""The embedded demo model and the script that trains it."""

import math
import textwrap

import pytest
import safetensors.torch
import torch

from sparsegpt.calib_data import demo_folder, demo_text, draw_windows, evaluation_tokens, load_text, train_demo
from sparsegpt.calib_data.pydoc_topics import held_out_topics


@pytest.fixture(scope="module")
def demo():
    """Model in float32 and tokenizer, loaded the way a user does, from the folder alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo_folder(), dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(demo_folder(), local_files_only=True)


@torch.no_grad()
def nats(model, tokens: torch.Tensor, length: int) -> float:
    """Mean over predicted tokens of -log p(token | the tokens before it in its window)."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start : start + length]
        probabilities = model(input_ids=window[None]).logits[0, :-1].double().softmax(-1)
        total -= probabilities.gather(1, window[1:, None]).log().sum().item()
        count += len(window) - 1
    return total / count


def magnitude_2_of_4(weight: torch.Tensor) -> torch.Tensor:
    """The definition, group by group: of four neighbours the two smallest become zero."""
    groups = weight.reshape(-1, 4)
    smallest = groups.abs().argsort(dim=1)[:, :2]
    return groups.scatter(1, smallest, 0.0).reshape(weight.shape)


# The folder


def test_folder_is_small_and_half_precision():
    assert sum(file.stat().st_size for file in demo_folder().iterdir()) <= 12_000_000
    weights = safetensors.torch.load_file(demo_folder() / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert all(weight.isfinite().all() for weight in weights.values())


def test_model_is_an_opt_of_a_size_that_every_pattern_divides(demo):
    model, tokenizer = demo
    assert model.config.model_type == "opt"
    assert 3e6 <= model.num_parameters() <= 8e6
    assert model.config.tie_word_embeddings
    blocks = model.model.decoder.layers
    linears = [module for module in blocks.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 6 * len(blocks)
    assert all(linear.in_features % 64 == 0 for linear in linears)
    assert len(tokenizer) <= model.config.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (model.config.bos_token_id, model.config.eos_token_id)


@pytest.mark.parametrize(
    "text", ["plain words", " spaces  and\n\n\ttabs ", "\N{SNOWMAN} \u00e9\u4e2d\U0001f600", "\x00\x7f"]
)
def test_tokenizer_knows_every_byte(demo, text):
    _, tokenizer = demo
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *ids]


# Its quality


def test_bits_per_byte_on_held_out_topics_and_after_magnitude_pruning(demo):
    model, tokenizer = demo
    tokens, size = evaluation_tokens(load_text("pydoc", "evaluation"), tokenizer)
    assert size == len("\n\n".join(held_out_topics().values()).encode())
    dense = nats(model, tokens, model.config.max_position_embeddings)
    assert dense * len(tokens) / math.log(2) / size < 1.9
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for block in model.model.decoder.layers:
            for linear in (module for module in block.modules() if isinstance(module, torch.nn.Linear)):
                linear.weight.copy_(magnitude_2_of_4(linear.weight))
    part = tokens[: 2 * 512]
    pruned = nats(model, part, 512)
    model.load_state_dict(weights)
    assert pruned > nats(model, part, 512) + 0.1


def test_default_calibration_fits_the_model(demo):
    model, tokenizer = demo
    drawn = draw_windows(load_text("pydoc", "calibration"), tokenizer, 4, model.config.max_position_embeddings, seed=0)
    assert drawn.windows.min() >= 0
    assert drawn.windows.max() < model.config.vocab_size
    assert not (drawn.windows == tokenizer.bos_token_id).any()


# The training text


def write_module(folder, name: str, docstring: str, comment: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'"""{docstring}"""\nx = 1\n{comment}', encoding="utf-8")


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """A Python installation of two folders."""
    folders = {"stdlib": tmp_path / "lib", "purelib": tmp_path / "site-packages"}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setattr(demo_text.sysconfig, "get_path", lambda name: str(folders[name]))
    return folders


def test_training_text_leaves_out_what_a_held_out_topic_says(installation):
    quoted = max(held_out_topics().values(), key=len).replace("\\", "").replace('"', "'")
    rewrapped = textwrap.fill(" ".join(quoted.split())[:2000], width=50)
    own = "This sentence about gardens and rivers stands in no chapter of the reference."
    write_module(installation["stdlib"], "copied.py", f"{own}\n\n{rewrapped}")
    gathered = demo_text.gather_text()
    assert gathered.standard_library == (own,)
    assert gathered.packages == ()
    assert len(gathered.topics) > 30


def test_training_text_takes_docstrings_and_comments_once(installation):
    prose = "Read the configuration from the given folder and return what it says."
    remark = "Nothing here is imported; the text\nof a comment is read as it stands."
    comment = "".join(f"    # {line}\n" for line in remark.splitlines())
    write_module(installation["purelib"], "a.py", f"{prose}\n\n>>> code(x) == {{1: [2]}}  # no prose at all", comment)
    write_module(installation["purelib"], "b.py", prose)
    (installation["purelib"] / "broken.py").write_text("def (:\n")
    assert demo_text.gather_text().packages == (f"{prose}\n\n{remark}",)


# The training script


def test_training_runs_saves_and_resumes(tmp_path, monkeypatch, capsys):
    text = demo_text.DemoText(*(("The words of a small text for a small test. " * 60,),) * 3)
    monkeypatch.setattr(train_demo, "gather_text", lambda: text)
    monkeypatch.setattr(train_demo, "held_out_topics", lambda: {"one": "A few words that nobody learned from."})
    monkeypatch.setattr(train_demo, "HIDDEN", 64)
    monkeypatch.setattr(train_demo, "FEED_FORWARD", 64)
    monkeypatch.setattr(train_demo, "LAYERS", 1)
    threads = torch.get_num_threads()
    arguments = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--vocabulary", "300"]
    arguments += ["--context", "16", "--batch", "2", "--threads", "1"]
    train_demo.main([*arguments, "--minutes", "0.01"])
    train_demo.main([*arguments, "--minutes", "0.02"])  # goes on from the checkpoint
    torch.set_num_threads(threads)
    progress = torch.load(tmp_path / "work" / "checkpoint.pt")["progress"]
    assert progress["seconds"] >= 1.2
    assert progress["tokens"] == progress["step"] * 32
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }
    assert "bits_per_byte" in capsys.readouterr().out


def test_schedule_warms_up_and_decays():
    assert train_demo.schedule(step=0, spent=0.0, warm_up=100) == pytest.approx(0.01)
    assert train_demo.schedule(step=200, spent=0.0, warm_up=100) == pytest.approx(1.0)
    assert train_demo.schedule(step=200, spent=0.5, warm_up=100) == pytest.approx(0.51)
    assert train_demo.schedule(step=200, spent=1.0, warm_up=100) == pytest.approx(0.02)
