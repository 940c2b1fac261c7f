"""The scripts of examples/ run as they are, on the demo."""

import json
import runpy
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sparsegpt.kernels.checkpoint.archive import pack_folder
from tests.support import CHILD_ENVIRONMENT, prune_model, random_windows, save_tokenizer, tiny_model

EXAMPLES = Path(__file__).parents[1] / "examples"
# What each prints, in its own lines.
SAID = {
    "prune_and_compare.py": ("dense", "magnitude", "wanda", "sparsegpt"),
    "own_method.py": ("relative error",),
    "own_calibration.py": ("8 windows of", "50% zeros"),
}
SERVER = "serve_packed.py"
PROMPT = "the state of the"


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAID, SERVER}


@pytest.mark.parametrize("name", SAID)
def test_an_example_runs(name, forked, tmp_path):
    said = forked.python(EXAMPLES / name, cwd=tmp_path)
    assert all(text in said for text in SAID[name])


def test_the_server_is_that_of_transformers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SERVER, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / SERVER))
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "transformers serve" in shown
    assert "/v1/completions" in shown


@pytest.fixture
def served(tmp_path):
    """The pruned model, and the address under which its packed folder is served."""
    for library in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(library, reason="transformers[serving] is not installed")
    model = tiny_model("llama")
    prune_model(model, random_windows(), "2:4", preset="paper")
    model.save_pretrained(tmp_path / "plain")
    save_tokenizer(tmp_path / "plain")
    pack_folder(tmp_path / "plain", tmp_path / "packed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / SERVER), str(tmp_path / "packed"), "--port", str(port)]
    with subprocess.Popen(
        command, env=CHILD_ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        address = f"http://localhost:{port}"
        wait_for(f"{address}/health", server)
        yield model, tmp_path / "packed", address
        server.kill()


def wait_for(url, server):
    while server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(url, timeout=60):
            return
        time.sleep(0.2)
    raise AssertionError("the server has ended")


def answer(url, **question):
    request = urllib.request.Request(url, json.dumps(question).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as found:
        return json.load(found)


def test_a_packed_folder_is_served(served):
    """The server answers as the pruned model itself does, which was never packed."""
    model, folder, address = served
    found = answer(f"{address}/v1/completions", model=str(folder), prompt=PROMPT, max_tokens=8)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    written = model.generate(tokens, max_new_tokens=8, do_sample=False)[0, tokens.shape[1] :]
    assert found["choices"][0]["text"] == tokenizer.decode(written, skip_special_tokens=True)
