"""Bases with something odd about them: exported all the same, or refused before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import chat, smoke
from dpo_cli.errors import DpoError
from dpo_cli.export import card, gguf, merge, ollama, outputs, parity
from dpo_cli.export.gguf_parity import metadata
from dpo_cli.recipe import Recipe
from transformers import AutoTokenizer

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "<|im_start|>system\n{{ strftime_now('%d %B %Y') }}<|im_end|>\n" + NO_SYSTEM


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(smoke.resolve("builtin:tiny-qwen3"), tmp_path / "base"))


def edit(file: Path, **changed: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changed), encoding="utf-8")


def recipe(base: Path, **model: Any) -> Recipe:
    return Recipe.model_validate({"model": {"id": str(base), **model}, "data": {"sources": [{"id": "nobody/none"}]}})


@pytest.mark.parametrize(
    ("content", "licence"),
    [
        (b"---\nlicense: apache-2.0: see below\nlanguage:\n\t- en\n---\n# My model\n", None),
        ("---\nlicense: mit\n---\n# Modèle\n".encode("latin-1"), None),
        (b"---\nlicense: mit\nmodel-index: nonsense\n---\n", "mit"),
        (b"no metadata at all", None),
    ],
    ids=["no YAML", "not UTF-8", "nonsense beside it", "no metadata"],
)
def test_a_card_that_cannot_be_read_costs_its_licence_only(base: Path, content: bytes, licence: str | None) -> None:
    (base / "README.md").write_bytes(content)
    assert card._licence(str(base), None).get("license") == licence


def test_what_a_template_refuses_is_left_out_of_the_comparison(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert outputs.fixtures(tokenizer) == list(outputs.FIXTURES)
    tokenizer.chat_template = NO_SYSTEM
    left = outputs.fixtures(tokenizer)
    assert [one[0]["role"] for one in left] == ["user"] * len(left) and len(left) == 2
    assert all(check["ok"] for check in parity.check_template("merged", tokenizer, tokenizer))
    ollama.require(tokenizer, recipe(base))


def test_a_template_that_ollama_cannot_say_is_refused_before_work(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = DATED
    with pytest.raises(DpoError, match="writes the date"):
        ollama.require(tokenizer, recipe(base))
    tokenizer.chat_template = NO_SYSTEM.replace("<|im_start|>", "[INST]")
    with pytest.raises(DpoError, match="can't say this model's chat template as"):
        ollama.require(tokenizer, recipe(base))


@pytest.mark.parametrize("thinking", [False, True])
def test_qwens_own_template_is_said(base: Path, thinking: bool) -> None:
    ollama.require(AutoTokenizer.from_pretrained(base), recipe(base, thinking=thinking))


@pytest.mark.parametrize("missing", ["tokenizer.json", "tokenizer_config.json"])
def test_a_gguf_without_a_tokenizer_is_refused_before_work(base: Path, missing: str) -> None:
    (base / missing).unlink()
    with pytest.raises(DpoError, match=f"is made of {missing}"):
        gguf.require(base, "f32")


def made_for_text(base: Path) -> None:
    """Its tokenizer and configs say <|endoftext|>, its chat template ends a turn in <|im_end|>."""
    end = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|endoftext|>")
    edit(base / "tokenizer_config.json", eos_token="<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        edit(base / name, eos_token_id=end)


def without_generation_config(base: Path) -> None:
    (base / "generation_config.json").unlink()


@pytest.mark.parametrize("odd", [made_for_text, without_generation_config], ids=lambda odd: odd.__name__)
def test_the_end_of_a_turn_is_an_end_wherever_an_export_names_one(
    base: Path, tmp_path: Path, odd: Callable[[Path], None]
) -> None:
    odd(base)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    tokenizer = chat.load_tokenizer(recipe(base))
    tokenizer.save_pretrained(str(adapter))
    shutil.copytree(base, merged)
    files = merge.tokenizer_files(base, adapter)
    merge.name_turn_end(files, base, tokenizer)
    merge.write_files(files, merged)
    text, turn = (tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>"))
    gguf.write_gguf(merged, "f32", tmp_path / "x-f32.gguf")
    fields = metadata(tmp_path / "x-f32.gguf")
    ends = {fields["tokenizer.ggml.eos_token_id"], fields.get("tokenizer.ggml.eot_token_id")}
    if odd is made_for_text:
        named = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
        assert sorted(named) == sorted([text, turn]) == sorted(ends)
        ollama.write_modelfile(tmp_path / "x-f32.gguf", tokenizer, recipe(base), tmp_path)
        checks = ollama.check_modelfile(tmp_path / "x-f32.gguf", tokenizer, recipe(base), tmp_path)
        assert all(check["ok"] for check in checks)
    else:  # its config.json names the end
        assert not (merged / "generation_config.json").exists() and turn in ends
