"""What leaves this machine names no folder of it, no server and no key's variable; all else arrives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from dpo_cli import recipe
from dpo_cli.published import clean, recipe_yaml, without_paths


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/alice/models/Qwen3-1.7B", "Qwen3-1.7B"),
        ("/home/alice smith/模型/", "模型"),
        ("~/models/base", "base"),
        ("~alice/models/base", "base"),
        (r"C:\Users\alice\models\base", "base"),
        ("D:/models/alice/base", "base"),
        (r"\\server\alice\base", "base"),
        ("file:///home/alice/base", "base"),
        ("can't read /home/alice/base/config.json: gone", "can't read config.json: gone"),
        (r"at C:\Users\alice\base, line 3", "at base, line 3"),
        ('{"path": "/srv/alice/base"}', '{"path": "base"}'),
    ],
)
def test_local_paths_go_by_their_last_part(text: str, shown: str) -> None:
    assert without_paths(text) == shown
    assert clean({"a": [text, 1, None]}) == {"a": [shown, 1, None]}


@pytest.mark.parametrize(
    "text",
    [
        "Qwen/Qwen3-1.7B", "https://example.org/a/b", "/think", "either/or", "1/2", r"\d+\s", "user/name/file.gguf",
        "用三句话/两句话介绍", "</think>", "<|im_end|>", "", "a: b", "builtin:tiny-qwen3",
        "hf://datasets/a/b", "./data/x",
    ],
)  # fmt: skip
def test_anything_else_stays(text: str) -> None:
    assert without_paths(text) == text


def test_the_published_recipe_loads_and_names_neither_server_nor_key(tmp_path: Path) -> None:
    server = {"base_url": "http://10.0.0.7:8123/v1", "model": "/data/alice/judge", "api_key_env": "ALICES_KEY"}
    judge = {"kind": "openai", **server}
    source = {"id": r"\\server\alice\pairs.jsonl", "sample": {"server": server}}
    settings = {
        "model": {"id": "/home/alice/models/base", "merge_base": r"C:\Users\alice\base16"},
        "data": {"sources": [source], "rater": judge},
        "eval": {"judge": judge},
    }
    known = recipe.Recipe.model_validate({"name": "r", **settings})
    text = recipe_yaml(known)
    assert not [word for word in ("alice", "ALICES", "10.0.0.7", "8123", "server\\") if word in text]
    again = recipe.Recipe.model_validate(yaml.safe_load(text))
    assert again.eval.judge and again.train == known.train
    assert "judge" in json.dumps(again.model_dump(mode="json")["eval"]["judge"]["model"])
