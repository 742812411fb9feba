"""What a recipe names outside of itself: said before any work, with the nearest name, and no network is waited for."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import hub
from dpo_cli.cli import app
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.recipe import check, load
from dpo_cli.recipe.paths import PARTS, config_of
from typer.testing import CliRunner, Result

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with data, a model, an adapter, and things that are neither."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, **files: Any) -> None:
        (tmp_path / name).mkdir(parents=True)
        for file, content in files.items():
            (tmp_path / name / file.replace("__", ".")).write_text(json.dumps(content), encoding="utf-8")

    make("models/qwen3", config__json={}, tokenizer__json={})
    make("models/slow", config__json={}, vocab__json={})
    make("models/bare", config__json={})
    make("models/no-config", tokenizer__json={})
    make("sft", adapter_config__json={"base_model_name_or_path": "Qwen/Qwen3-0.6B"}, adapter_model__safetensors={})
    make("unfinished", adapter_config__json={})
    make("data", pairs__jsonl={"prompt": "a", "chosen": "b", "rejected": "c"})
    (tmp_path / "r.yaml").write_text("model: {id: ./models/qwen3}\ndata: {sources: [{id: data/pairs.jsonl}]}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("setting", "key", "says"),
    [
        ("data.sources.0.id=data/pair.jsonl", "data.sources[0].id", "; did you mean ./data/pairs.jsonl?"),
        ("data.sources.0.id=./dta/pairs.jsonl", "data.sources[0].id", "; did you mean ./data?"),
        ("data.contamination=[data/nothing.txt]", "data.contamination[0]", "/data/nothing.txt"),
        ("eval.sets=data/pair.jsonl", "eval.sets[0].id", "; did you mean ./data/pairs.jsonl?"),
        ("model.id=./models/qwen33", "model.id", "no folder ./models/qwen33; did you mean ./models/qwen3?"),
        ("model.id=./models/qwem", "model.id", "did you mean ./models/qwen3?"),
        ("model.id=models/qwen/3", "model.id", "there is no models/qwen/3"),
        ("model.id=data/pairs.jsonl", "model.id", "is a file; name the folder"),
        ("model.id=sft", "model.id", "is a LoRA adapter, not a model: set model.adapter to it and model.id: Qwen/"),
        ("model.id=models/no-config", "model.id", "it has no config.json"),
        ("model.id=models/bare", "model.id", "has no tokenizer.json"),
        ("model.adapter=./stf", "model.adapter", "no folder ./stf; did you mean ./sft?"),
        (
            "model.adapter=models/qwen3",
            "model.adapter",
            "no adapter_config.json; a merged model goes into model.id",
        ),
        ("model.adapter=unfinished", "model.adapter", "has no adapter_model.safetensors"),
        ("model.merge_base=./models/qwn3", "model.merge_base", "did you mean ./models/qwen3?"),
        ("model.merge_base=sft", "model.merge_base", "model.merge_base: Qwen/Qwen3-0.6B"),
        ("eval.judge={kind: reward_model, id: ./rm}", "eval.judge.id", "no folder ./rm"),
        ("model.id=Qwen3 1.7B", "model.id", "no name of a Hub repository"),
        ("model.id=Qwen//Qwen3", "model.id", "no name of a Hub repository"),
    ],
)
def test_check_looks_at_local_paths(folder: Path, invoke: Invoke, setting: str, key: str, says: str) -> None:
    done = invoke("check", "r.yaml", "--set", setting)
    assert (done.exit_code, done.stdout) == (USAGE, "")
    assert f"  {key}\n" in done.stderr
    assert says in done.stderr
    assert invoke("check", "r.yaml").exit_code == 0


def test_a_slow_tokenizer_will_do_where_no_gguf_is_asked_for(folder: Path) -> None:
    recipe = load(folder / "r.yaml", ["model.id=models/slow"])
    assert check(recipe, folder / "r.yaml") == []
    recipe = load(folder / "r.yaml", ["model.id=models/slow", "export.formats=[gguf]"])
    with pytest.raises(DpoError, match=r"no tokenizer\.json, which GGUF needs"):
        check(recipe, folder / "r.yaml")


def test_all_that_is_missing_is_said_at_once(folder: Path, invoke: Invoke) -> None:
    done = invoke("check", "r.yaml", "--set", "model.id=./a", "--set", "data.sources.0.id=./b")
    assert "2 errors" in done.stderr


@pytest.mark.parametrize(
    ("command", "setting", "says"),
    [
        ("prepare", "data.sources.0.id=data/pair.jsonl", "did you mean ./data/pairs.jsonl?"),
        ("prepare", "model.id=./models/qwn3", "did you mean ./models/qwen3?"),
        ("train", "data.sources.0.id=data/pair.jsonl", "did you mean ./data/pairs.jsonl?"),
        ("train", "model.id=sft", "set model.adapter"),
        ("train", "model.adapter=./stf", "did you mean ./sft?"),
    ],
)
def test_a_command_says_it_before_any_work(folder: Path, invoke: Invoke, command: str, setting: str, says: str) -> None:
    done = invoke(command, "r.yaml", "--set", setting)
    assert done.exit_code == 1
    assert not re.sub(r"\Atrain: dpo of .*\n", "", done.stdout), "what it is about to do, at most"
    assert says in done.stderr
    assert "fix:   check the path" in done.stderr
    assert not (folder / "runs" / "r" / "data").exists()


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_a_hub_model_is_asked_for_before_the_data_are_read(folder: Path, invoke: Invoke, command: str) -> None:
    (folder / "data" / "pairs.jsonl").write_text("no JSON at all\n")
    done = invoke(command, "r.yaml", "--set", "model.id=nobody/nothing")
    assert done.exit_code == 1
    assert "nobody/nothing is not in the cache, and HF_HUB_OFFLINE is set" in done.stderr
    assert "fix:   unset HF_HUB_OFFLINE" in done.stderr


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`online(address)`: the Hub is at that address, and may be asked."""
    from huggingface_hub import constants

    def go(address: str) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)

    return go


def test_a_hub_that_does_not_answer_is_said_within_seconds(
    folder: Path, online: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket that takes a connection and never says a word."""
    monkeypatch.setattr(hub, "SECONDS", 1)
    recipe = load(folder / "r.yaml", ["model.id=nobody/nothing"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        online(f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(DpoError, match=r"can't get nobody/nothing from http.*: no answer") as caught:
            hub.require(recipe, ["model"])
        assert time.monotonic() - start < 4 * hub.SECONDS
    assert "HF_ENDPOINT" in str(caught.value)
    assert "model.id" in str(caught.value)


def test_a_hub_that_can_not_be_reached(folder: Path, online: Callable[[str], None]) -> None:
    online("http://127.0.0.1:9")  # discard: nobody listens
    recipe = load(folder / "r.yaml", ["model.id=nobody/nothing"])
    with pytest.raises(DpoError, match="can't get nobody/nothing"):
        hub.require(recipe, ["model"])
    hub.require(load(folder / "r.yaml"), ["model"])  # a local one asks nobody


@pytest.mark.parametrize(("status", "says"), [(404, "has no a/b with a config.json"), (401, "gated"), (302, None)])
def test_what_the_hub_answers(
    folder: Path, online: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, status: int, says: str | None
) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    recipe = load(
        folder / "r.yaml",
        [
            "model={id: a/b, revision: v1, adapter: a/c, adapter_revision: v2, merge_base: a/b}",
            "eval.judge={kind: reward_model, id: a/d, revision: v3}",
            "data.rater={kind: reward_model, id: a/e, revision: v4}",
            "data.sources=[{id: data/pairs.jsonl, rate: true}]",
        ],
    )
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online(f"http://127.0.0.1:{server.server_port}")
        if says is None:
            hub.require(recipe, PARTS)
        else:
            with pytest.raises(DpoError) as caught:
                hub.require(recipe, PARTS)
            assert says in str(caught.value)
        server.shutdown()
    base = "b/resolve/v1/config"  # asked for as the model, and as what is merged
    each = [base, "c/resolve/v2/adapter_config", base, "d/resolve/v3/config", "e/resolve/v4/config"]
    assert asked == [f"/a/{one}.json" for one in (each if says is None else each[:1])]


def test_the_config_of_a_hub_id_is_that_of_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--a--b"
    (kept / "refs").mkdir(parents=True)
    for branch, commit in (("main", "c0"), ("v1", "c1")):
        (kept / "refs" / branch).write_text(commit)
        (kept / "snapshots" / commit).mkdir(parents=True)
        (kept / "snapshots" / commit / "config.json").write_text(json.dumps({"of": commit}))
    found = [config_of("a/b", revision) for revision in (None, "v1", "c1", "v2")]
    assert found == [{"of": "c0"}, {"of": "c1"}, {"of": "c1"}, {}]


def test_weights_are_here_once_all_their_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--a--b"
    (kept / "snapshots" / "c0").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("c0")
    (kept / "snapshots" / "c0" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"first": "1.safetensors", "second": "2.safetensors"}})
    )
    for file, here in (("1.safetensors", False), ("2.safetensors", True)):
        (kept / "snapshots" / "c0" / file).touch()
        assert hub.weights_are_here("a/b", None) is here


# --------------------------------------------------------------------------------------------- the recipe file itself


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data", None, "data is a folder, not a recipe"),
        ("x.bin", b"\x7fELF\0\0\1", "not valid YAML"),
        ("x.yaml", "model: {}".encode("utf-16"), "not UTF-8 text"),
        ("x.yaml", "a: 1\nb: \u4f60\u597d\n".encode("gbk"), "x.yaml:2"),
        ("x.yaml", b"a: [" + b"1, " * 600_000, "too large for a recipe"),
        ("x.yaml", b"# nothing", "model\n    is missing"),
        ("x.yaml", b"- a\n", "a recipe is a map of keys"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe(folder: Path, invoke: Invoke, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (folder / name).write_bytes(content)
    done = invoke("check", name)
    assert (done.exit_code, done.stdout) == (USAGE, "")
    assert says in done.stderr
    assert "Errno" not in done.stderr


def test_a_recipe_that_is_not_there_names_the_three_nearest(folder: Path, invoke: Invoke) -> None:
    (folder / "recipes").mkdir()
    for number in range(30):
        (folder / "recipes" / f"other-{number}.yaml").touch()
    for name in ("smoke", "smoke2", "smoky", "unlike"):
        (folder / "recipes" / f"{name}.yaml").touch()
    (folder / ".venv").mkdir()
    (folder / ".venv" / "smokee.yaml").touch()
    done = invoke("check", "recipes/smokee.yaml")
    assert ".venv" not in invoke("check", "smokee.yaml").stderr
    assert "no recipe at recipes/smokee.yaml" in done.stderr
    assert "did you mean recipes/smoke.yaml, " in done.stderr
    assert done.stderr.count(".yaml") == 4
    assert "did you mean recipes/smoke.yaml, " in invoke("check", "smoke.yml").stderr, "also from the folder above"
