"""Bases with something odd about them: exported all the same, or refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import chat
from dpo_cli.errors import DpoError
from dpo_cli.export import card, gguf, merge, ollama, outputs, parity
from dpo_cli.recipe import Recipe
from tests.export.made import copy, edit
from transformers import AutoTokenizer

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "<|im_start|>system\n{{ strftime_now('%d %B %Y') }}<|im_end|>\n" + NO_SYSTEM


def recipe(base: Path, **model: Any) -> Recipe:
    return Recipe.model_validate({"model": {"id": str(base), **model}, "data": {"sources": [{"id": "nobody/none"}]}})


@pytest.mark.parametrize(
    ("content", "licence"),
    [
        (b"---\nlicense: apache-2.0: see below\nlanguage:\n\t- en\n---\n# My model\n", None),
        ("---\nlicense: mit\n---\n# Modèle\n".encode("latin-1"), None),
        (b"---\nlicense: mit\nmodel-index: nonsense\n---\n", "mit"),
    ],
    ids=["no YAML", "not UTF-8", "nonsense beside it"],
)
def test_a_card_that_cannot_be_read_costs_its_licence_only(base: Path, content: bytes, licence: str | None) -> None:
    (base / "README.md").write_bytes(content)
    assert card._licence(str(base), None).get("license") == licence


def test_what_a_template_refuses_is_left_out_of_the_comparison(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    for thinking in (False, True):
        ollama.require(tokenizer, recipe(base, thinking=thinking))
    assert outputs.fixtures(tokenizer) == list(outputs.FIXTURES)
    tokenizer.chat_template = NO_SYSTEM
    assert [one[0]["role"] for one in outputs.fixtures(tokenizer)] == ["user"] * 2
    assert all(check["ok"] for check in parity.check_template("merged", tokenizer, tokenizer))
    ollama.require(tokenizer, recipe(base))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (DATED, "writes the date"),
        (NO_SYSTEM.replace("<|im_start|>", "[INST]"), "can't say this model's chat template as"),
    ],
)
def test_a_template_that_ollama_cannot_say_is_refused_before_work(base: Path, template: str, words: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    with pytest.raises(DpoError, match=words):
        ollama.require(tokenizer, recipe(base))


def test_the_end_of_a_turn_is_an_end_wherever_an_export_names_one(base: Path, tmp_path: Path) -> None:
    """Of a model made for text: its files say <|endoftext|>, its chat template ends a turn in <|im_end|>."""
    known: Any = AutoTokenizer.from_pretrained(base)
    text, turn = known.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    edit(base / "tokenizer_config.json", eos_token="<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        edit(base / name, eos_token_id=text)
    tokenizer, files, fields = exported(base, tmp_path)
    ends = sorted([fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]])
    assert sorted(json.loads(files["generation_config.json"])["eos_token_id"]) == sorted([text, turn]) == ends
    modelfile = ollama.modelfile("x-f32.gguf", tokenizer, recipe(base))
    assert all(f'PARAMETER stop "{end}"\n' in modelfile for end in ("<|endoftext|>", "<|im_end|>"))


def test_a_base_without_generation_config_has_its_ends_in_its_config(base: Path, tmp_path: Path) -> None:
    (base / "generation_config.json").unlink()
    tokenizer, files, fields = exported(base, tmp_path)
    assert "generation_config.json" not in files
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def exported(base: Path, folder: Path) -> tuple[Any, dict[str, bytes], dict[str, Any]]:
    """Training's tokenizer, the tokenizer files of an export, and the metadata of its GGUF."""
    tokenizer = chat.load_tokenizer(recipe(base))
    tokenizer.save_pretrained(str(folder / "adapter"))
    files = merge.tokenizer_files(base, folder / "adapter")
    merge.name_turn_end(files, base, tokenizer)
    merged = copy(base, folder / "merged")
    merge.write_files(files, merged)
    return tokenizer, files, gguf.metadata(merged, "f32", "x")
