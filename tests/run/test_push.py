"""Pushing, against a stub that speaks as the Hub does: what arrives there is what lies in the folder."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from sparsegpt.run.push import check_push, push_folder
from tests.support import refused

TOKEN = "hf_of_nobody"
# Of the client's own call of its transport, where files go without hf_xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


class Stub(BaseHTTPRequestHandler):
    """The Hub's endpoints that an upload needs. server: what has arrived, and which status to answer with."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def do_GET(self):
        self.answer({"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def do_PUT(self):
        self.server.stored[self.path.rpartition("/")[2]] = self.content()
        self.answer({})

    def do_POST(self):
        self.server.asked.append(self.path)
        content = self.content()
        if self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(content))
            self.answer({"url": f"{self.address()}/org/name", "name": "org/name", "id": "org/name"})
        elif "/preupload/" in self.path:
            modes = [
                {"path": file["path"], "shouldIgnore": False, "uploadMode": self.mode(file["path"])}
                for file in json.loads(content)["files"]
            ]
            self.answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.address()}/lfs/{one['oid']}"}}}
                for one in json.loads(content)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self.commit([json.loads(line) for line in content.splitlines()])
        else:
            self.answer({"errors": [], "warnings": []})

    def commit(self, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.stored[value["oid"]]
        self.answer({"commitUrl": f"{self.address()}/org/name/commit/1", "commitOid": "1" * 40})

    def mode(self, path):
        return "lfs" if path.endswith(".safetensors") else "regular"

    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def content(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def answer(self, value):
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.command == "PUT"
        status = self.server.status if self.server.status != 200 else 200 if known else 401
        body = json.dumps(value if status == 200 else {"error": "no"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    """A stub in the place of the Hub, for one who is logged in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.files, server.stored, server.created, server.asked, server.status = {}, {}, [], [], 200
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def local(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_pushed_whole_and_private_with_its_card(hub, run_cli, llama_folder, text_file, tmp_path):
    out = tmp_path / "out"
    options = ["--calib", text_file, "--eval", "none", "--samples", 2, "--seqlen", 16, "--preset", "paper"]
    command = ["run", "--model", llama_folder, "--sparsity", "2:4", *options, "--out", out]
    outcome = run_cli(*command, "--push-to-hub", "org/name")
    assert outcome.code == 0, outcome.err
    expected = local(out)
    del expected[".sparsegpt.json"]
    assert hub.files == expected
    assert {"README.md", "report.html", "report.json", "model.safetensors"} <= hub.files.keys()
    assert b"Pruned with sparsegpt" in hub.files["README.md"]
    assert list(hub.stored) == [hashlib.sha256(expected["model.safetensors"]).hexdigest()]
    assert [(made["organization"], made["name"], made["visibility"]) for made in hub.created] == [
        ("org", "name", "private")
    ]


def test_the_command_pushes_to_a_branch_for_all_to_see(hub, run_cli, llama_folder):
    outcome = run_cli("push", llama_folder, "org/name", "--public", "--branch", "old")
    assert outcome.code == 0, outcome.err
    assert "org/name/tree/old" in outcome.out
    assert hub.files == local(llama_folder)
    assert hub.created[0]["visibility"] == "public"
    assert any(path.endswith("/commit/old") for path in hub.asked)


@pytest.mark.parametrize(("status", "said"), [(401, "hf auth login"), (403, "may not write there")])
def test_what_the_hub_refuses_is_said_in_words(hub, status, said, llama_folder):
    hub.status = status
    with refused("org/name", said):
        check_push("org/name")
    with refused("org/name", said):
        push_folder(llama_folder, "org/name")


def test_a_result_that_the_hub_refuses_is_whole_here(hub, run_cli, llama_folder, text_file, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        hub.status = 403
        return real(*arguments, **options)

    from sparsegpt.run import job

    real = job.push_folder
    monkeypatch.setattr(job, "push_folder", fail)
    options = ["--calib", text_file, "--eval", "none", "--samples", 2, "--seqlen", 16, "--preset", "paper"]
    out = tmp_path / "out"
    outcome = run_cli(
        "run", "--model", llama_folder, "--sparsity", "2:4", *options, "--out", out, "--push-to-hub", "org/name"
    )
    assert outcome.code == 1
    assert f"`sparsegpt push {out} org/name`" in outcome.err
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["name", "a/b/c", "", "org/na me", "../x", "org/", "-/x"])
def test_names_that_no_repository_has_are_refused_before_anything_is_asked(hub, name):
    with refused("expected ORG/NAME", settings=["push_to_hub"]):
        check_push(name)
    assert hub.asked == []


def test_nobody_is_asked_offline_or_without_a_token(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with refused("hf auth login"):
        check_push("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused("HF_HUB_OFFLINE"):
        check_push("org/name")


def test_a_folder_that_is_no_model_is_not_pushed(hub, tmp_path):
    with refused(str(tmp_path)):
        push_folder(tmp_path, "org/name")
    assert hub.asked == []
