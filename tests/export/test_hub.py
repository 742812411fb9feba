"""The push, against a server that speaks the Hub's API: what is sent, what is refused, what an error says."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from dpo_cli import recipe
from dpo_cli.errors import DpoError
from dpo_cli.export import hub
from tests.export.made import SMOKE

TOKEN = "hf_secretsecretsecret"
FORMATS = ["adapter", "merged", "gguf", "ollama", "hub"]


class FakeHub(ThreadingHTTPServer):
    """As much of the Hub as a commit needs: create, info, preupload, LFS batch and upload, commit."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.fail: dict[str, tuple[int, str]] = {}  # part of a path -> status and message
        self.private = True
        self.there: list[str] = []  # files that the repository has already
        self.asked: list[tuple[str, str]] = []
        self.created: dict[str, Any] = {}
        self.blobs: dict[str, bytes] = {}  # sha256 -> what was uploaded to LFS
        self.committed: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()


class Answers(BaseHTTPRequestHandler):
    server: FakeHub

    def _answer(self) -> None:
        hub_, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub_.asked.append((self.command, path))
        if not path.startswith("/lfs/"):  # whose addresses are signed, and a token is no business of theirs
            hub_.tokens.add(self.headers.get("Authorization"))
        for part, (status, message) in hub_.fail.items():
            if part in path:
                return self._send({"error": message}, status)
        if path == "/api/repos/create":
            hub_.created = json.loads(body)
            self._send({"url": f"{hub_.address}/me/model"})
        elif path == "/api/models/me/model":
            files = [{"rfilename": name} for name in hub_.there]
            self._send({"id": "me/model", "private": hub_.private, "sha": "0" * 40, "siblings": files})
        elif path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith((".safetensors", ".gguf")) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            self._send({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub_.address}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._send({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        elif path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            hub_.blobs[path.removeprefix("/lfs/")] = body
            self._send({})
        elif "/commit/" in path:
            for line in body.splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    hub_.committed[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
                elif one["key"] == "lfsFile":
                    hub_.committed[one["value"]["path"]] = hub_.blobs[one["value"]["oid"]]
            self._send({"commitUrl": f"{hub_.address}/me/model/commit/1", "commitOid": "1" * 40})
        else:
            self._send({"error": f"unknown: {path}"}, 404)

    do_GET = do_POST = do_PUT = _answer

    def _send(self, value: Any, status: int = 200, kind: str = "application/json") -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if "error" in value:
            self.send_header("X-Error-Message", value["error"])
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub on this machine, logged in to."""
    from huggingface_hub import constants

    running = FakeHub()
    thread = Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    # huggingface_hub reads its environment once, when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", running.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """The folder of a finished export with every format."""
    contents = {
        "merged/README.md": b"---\nlanguage: en\n---\n# merged\n",
        "merged/config.json": b"{}",
        "merged/model.safetensors": bytes(range(256)) * 9,
        "adapter/README.md": b"---\nlanguage: en\n---\n# adapter\n",
        "adapter/adapter_config.json": b'{"r": 8}',
        "adapter/adapter_model.safetensors": b"adapter weights",
        "gguf/README.md": b"# gguf\n",
        "gguf/demo-q8_0.gguf": b"GGUF weights",
        "ollama/README.md": b"# ollama\n",
        "ollama/Modelfile": b"FROM ./demo-q8_0.gguf\n",
        "ollama/demo-q8_0.gguf": b"GGUF weights",
        "verify.json": json.dumps([{"name": "merged.effect", "value": 0.1, "limit": 0.05, "ok": True}]).encode(),
    }
    folder = tmp_path / "export"
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def to(name: str = "me/model", private: bool = True, formats: list[str] = FORMATS) -> recipe.Recipe:
    settings = [f"export.hub={name}", f"export.hub_private={str(private).lower()}"]
    return recipe.load(SMOKE, [*settings, f"export.formats={json.dumps(formats)}"])


def refusal(wanted: recipe.Recipe, folder: Path) -> DpoError:
    with pytest.raises(DpoError) as caught:
        hub.push(wanted, folder, quiet=True)
    return caught.value


def test_what_is_listed_arrives_in_one_commit_with_one_model_at_the_root(
    server: FakeHub, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = hub.push(to(), export, quiet=False)
    assert address == f"{server.address}/me/model"
    assert server.created == {"name": "model", "organization": "me", "visibility": "private"}
    assert server.committed == {
        "README.md": (export / "merged/README.md").read_bytes(),
        "config.json": b"{}",
        "model.safetensors": (export / "merged/model.safetensors").read_bytes(),
        "adapter/README.md": (export / "adapter/README.md").read_bytes(),
        "adapter/adapter_config.json": b'{"r": 8}',
        "adapter/adapter_model.safetensors": b"adapter weights",
        "demo-q8_0.gguf": b"GGUF weights",
        "Modelfile": b"FROM ./demo-q8_0.gguf\n",
        "verify.json": (export / "verify.json").read_bytes(),
    }
    assert sum("/commit/" in path for _, path in server.asked) == 1
    assert server.tokens - {None} == {f"Bearer {TOKEN}"}
    assert len(server.blobs) == 3, "the GGUF that two formats share goes up once"

    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    total = sum(len(data) for data in server.committed.values())
    assert lines[0] == f"hub: me/model (private), 9 files, {total:,} bytes"
    found = {name: int(size.replace(",", "")) for size, name in (line.split() for line in lines[1:])}
    assert found == {name: len(data) for name, data in server.committed.items()}
    assert TOKEN not in shown.out + shown.err


@pytest.mark.parametrize("kind", ["adapter", "merged", "gguf"])
def test_a_format_by_itself_stands_at_the_root(kind: str, export: Path) -> None:
    assert hub.contents(export, [kind, "hub"]).keys() == {
        *(one.name for one in (export / kind).iterdir()),
        "verify.json",
    }


def test_the_folder_of_a_local_base_stays_private(server: FakeHub, export: Path) -> None:
    config = {"base_model_name_or_path": "/home/jane/models/Qwen3-1.7B", "r": 8, "revision": None}
    (export / "adapter/adapter_config.json").write_text(json.dumps(config))
    hub.push(to(), export, quiet=True)
    sent = json.loads(server.committed["adapter/adapter_config.json"])
    assert sent == {**config, "base_model_name_or_path": "Qwen3-1.7B"}
    assert json.loads((export / "adapter/adapter_config.json").read_text()) == config
    check = {"name": "merged.shards", "value": "/home/jane/models/x: cut short", "limit": None, "ok": True}
    (export / "verify.json").write_text(json.dumps([check]))
    hub.push(to(), export, quiet=True)
    assert b"jane" not in server.committed["verify.json"] and b"x: cut short" in server.committed["verify.json"]
    hub_id = {**config, "base_model_name_or_path": "Qwen/Qwen3-1.7B"}
    (export / "adapter/adapter_config.json").write_text(json.dumps(hub_id))
    hub.push(to(), export, quiet=True)
    assert json.loads(server.committed["adapter/adapter_config.json"]) == hub_id


def test_public_only_where_that_is_said(server: FakeHub, export: Path) -> None:
    server.private = False
    error = refusal(to(), export)
    assert "public" in error.message and error.exit_code == 1 and not server.committed
    assert "export.hub_private" in str(error.where)
    hub.push(to(private=False), export, quiet=True)
    assert server.created["visibility"] == "public" and server.committed


def test_weights_of_another_push_are_not_mixed_in(server: FakeHub, export: Path) -> None:
    """An adapter_config.json left at the root would make transformers load the old adapter for the new model."""
    server.there = [".gitattributes", "README.md", "adapter_config.json", "model.safetensors", "old-q4_k_m.gguf"]
    error = refusal(to(), export)
    assert "adapter_config.json" in error.message and not server.committed
    assert "model.safetensors" not in error.message and "q4_k_m" not in error.message
    server.there.remove("adapter_config.json")
    server.there.append("before/adapter_model.safetensors")  # not at the root, where nobody loads it
    hub.push(to(), export, quiet=True)
    assert "model.safetensors" in server.committed


RIGHTS = "You don't have the rights to create a model under me"


@pytest.mark.parametrize(
    "fail",
    [
        {"/": (401, "Invalid username or password.")},
        {"repos/create": (403, RIGHTS), "models/me/model": (404, "Repository not found")},
        {"/commit/": (500, f"Internal Error of a request by {TOKEN}")},
        {"objects/batch": (413, "The storage of me is full")},
    ],
)
def test_what_the_hub_refuses_is_said(server: FakeHub, export: Path, fail: dict[str, tuple[int, str]]) -> None:
    server.fail = fail
    status, message = next(iter(fail.values()))
    before = {path: path.read_bytes() for path in export.rglob("*") if path.is_file()}
    error = refusal(to(), export)
    assert error.exit_code == 1
    assert f"HTTP {status}" in error.message and message.replace(TOKEN, "***") in error.message
    assert "may write to me's" in str(error.hint) and str(export) in str(error.hint)
    assert TOKEN not in str(error)
    assert not server.committed
    assert before == {path: path.read_bytes() for path in export.rglob("*") if path.is_file()}


def test_without_a_login_or_a_network(server: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        error = refusal(to(), export)
        assert "hf auth login" in str(error.hint) and error.exit_code == 1 and not server.asked
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "offline" in refusal(to(), export).message
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port, which nobody listens on
    error = refusal(to(), export)
    assert "check the network" in str(error.hint) and error.exit_code == 1
