"""What a name means: a folder here, a model on the Hub, or a slip, of which the nearest name is asked for."""

from pathlib import Path

import pytest

from sparsegpt.calib_data import demo_folder
from sparsegpt.settings.naming import DEMO, SHORT_NAMES, find_model, local_path, suggestion
from tests.support import refused


@pytest.fixture(autouse=True)
def _somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("my-llama", "home/mine", "org/name"):
        (tmp_path / folder).mkdir(parents=True)


@pytest.mark.parametrize("name", ["my-llama", "./my-llama", "my-llama/", "org/name", "~/mine"])
def test_a_folder_is_found(name):
    assert find_model(name) == Path(name).expanduser()
    assert find_model(name) == local_path(name)


def test_the_demo_and_short_names_are_found():
    assert find_model(DEMO) == demo_folder()
    for short, hub in SHORT_NAMES.items():
        assert find_model(short) == find_model(short.upper()) == find_model(hub) == hub


@pytest.mark.parametrize(
    "name", ["gpt2", "nobody/nothing", "org/other", "facebook/opt-1.3", "opt", "bert-base-uncased"]
)
def test_what_may_be_on_the_hub_is_taken_as_it_is(name):
    assert find_model(name) == name


SLIPS = {"opt-1.3": "opt-1.3b", "opt1.3b": "opt-1.3b", "OPT_6.7B": "opt-6.7b", "llama2-7b": "llama-2-7b", "dmo": "demo"}
SLIPS |= {"qwen-3-8b": "qwen3-8b", "smollm2-135": "smollm2-135m", "mistral7b": "mistral-7b", "Demo": "demo"}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_of_a_short_name_is_no_question_to_the_hub(name):
    with refused(f"{name!r}", "no short name", f"did you mean {SLIPS[name]}?"):
        find_model(name)


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("./my-lama", ("does not exist", "did you mean my-llama?")),
        ("~/mien", ("does not exist", "home/mine?")),
        ("/no/such/folder", ("does not exist", "; / is there, no is not")),
        ("org/names/x", ("does not exist", "; org is there, names is not")),
        ("~nobody-of-this-name/x", ("does not exist",)),
        ("C:\\models\\x", ("does not exist",)),
        ("", ("has no name",)),
        (" ", ("has no name",)),
        ("https://huggingface.co/facebook/opt-1.3b/tree/main", ("give the Hub id facebook/opt-1.3b",)),
        ("huggingface.co/org/name?x=1", ("give the Hub id org/name",)),
        ("hf://org/name", ("give the Hub id org/name",)),
        ("https://example.com/model.zip", ("fetch the model",)),
        ("x" * 300, ("cannot be read",)),
    ],
)
def test_what_can_be_no_model_is_refused(name, fragments):
    with refused(*fragments):
        find_model(name)


def test_a_revision_of_a_folder_is_refused():
    assert find_model("nobody/nothing", "old") == "nobody/nothing"
    with refused("old", "my-llama", "leave it out", settings=["revision"]):
        find_model("my-llama", "old")


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("facebook/opt-1.3", "; did you mean facebook/opt-1.3b?"),
        ("meta-llama/Llama-2-7b", "; did you mean meta-llama/Llama-2-7b-hf?"),
        ("my-lama", "; did you mean my-llama?"),
        ("org/nam", "; did you mean org/name?"),
        ("opt-1.3b", ""),
        ("facebook/opt-1.3b", ""),
        ("gpt2", ""),
    ],
)
def test_after_the_hub_the_nearest_is_asked_for(name, question):
    assert suggestion(name) == question
