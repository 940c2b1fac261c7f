"""Why something was not to be had from the Hub, in words; where nobody answers, nobody waits."""

import pytest
from huggingface_hub import constants, errors

from sparsegpt.incoming import hub
from sparsegpt.incoming.hub import ask_hub, hub_reason
from sparsegpt.model.loading import load_config
from tests.support import refused


def of_client(kind):
    """An error of the client, without the request that it comes from."""
    error = kind.__new__(kind)
    error.args = ("404 Client Error. (Request ID: x)\n\nmore",)
    return error


REASONS = {
    errors.GatedRepoError: "gated",
    errors.RevisionNotFoundError: "no revision old",
    errors.RepositoryNotFoundError: "none of this name, or it is private",
    errors.RemoteEntryNotFoundError: "no config.json, so it is an adapter",
    errors.LocalEntryNotFoundError: "nobody answers",
    errors.OfflineModeIsEnabled: "nobody answers",
}


@pytest.mark.parametrize("kind", REASONS)
def test_the_reason_is_told_of_what_an_error_was_raised_from(kind):
    outer = OSError("We couldn't connect to the Hub\nor something else")
    outer.__cause__ = of_client(kind)
    for error in (outer, of_client(kind)):
        assert REASONS[kind] in (hub_reason(error, "config.json", "old") or "")


def test_other_errors_have_no_reason():
    assert hub_reason(ValueError("x"), "config.json") is None
    assert hub_reason(OSError("disk"), "config.json") is None


def test_an_error_of_the_transport_is_one():
    kind = type("ConnectError", (Exception,), {"__module__": "httpx"})
    assert hub_reason(kind("x"), "config.json") == "nobody answers"


def test_nothing_is_asked_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", pytest.fail)
    ask_hub("org/name", "config.json")


def test_one_question_is_asked_and_its_answer_counts(monkeypatch):
    asked = []

    def answer(place):
        asked.append(place)
        raise of_client(errors.GatedRepoError)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", answer)
    with refused("'nobody/no-such-model'", "gated", "hf auth login", settings=["model"]):
        load_config("nobody/no-such-model", revision="old")
    assert len(asked) == 1
    assert asked[0].endswith("/nobody/no-such-model/resolve/old/config.json")


def test_the_table_of_transports_is_that_of_the_client():
    """Whatever it speaks through, its errors derive from that."""
    bases = {base.__module__.partition(".")[0] for base in errors.HfHubHTTPError.__mro__}
    assert any(base.startswith(hub._TRANSPORT) for base in bases)
