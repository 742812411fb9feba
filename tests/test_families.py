"""The table of families against transformers' own architectures and the chat templates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.families import FAMILIES, Family, Turn, family_of
from dpo_cli.recipe.paths import cached_config
from tests import families

KINDS = sorted(families.CONFIGS)


def row(kind: str) -> Family:
    found = family_of({"model_type": kind})
    assert found
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_names_what_the_architecture_has(kind: str) -> None:
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    family, config = row(kind), families.config(kind)
    text = config.get_text_config()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    linear = {name.rpartition(".")[2] for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    assert linear - {"lm_head"} == set(family.linear)
    norms = [name for name, one in model.named_parameters() if ".layers.1." in name and "norm" in name]
    wide = [name for name in norms if model.get_parameter(name).shape == (text.hidden_size,)]
    assert len(wide) == family.norms
    assert bool([name for name in norms if name.endswith(("q_norm.weight", "k_norm.weight"))]) == family.qk_norm


CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "你好"},
    {"role": "user", "content": "Why?"},
]


def rendered(kind: str, **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    opens, ends = families.CHATS[kind][1:3]
    pages: Any = render_jinja_template(
        [CHAT], chat_template=families.template(kind), bos_token=opens or "", eos_token=ends, **options
    )
    return str(pages[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_writes_turns_as_the_chat_template_does(kind: str) -> None:
    family = row(kind)
    opens, ends = families.CHATS[kind][1:3]
    page = rendered(kind, add_generation_prompt=True, enable_thinking=True)
    if family.turn:
        before, between, after = family.turn.before, family.turn.between, family.turn.after
        turns = [before + one["role"] + between + one["content"] + after for one in CHAT]
        assert "".join(turns) + before + "assistant" + between in page
        assert ends in after or ends == "<|endoftext|>"
    for token in family.tokens:
        page = page.replace(token, "")
    left = page.replace(opens or "", "").replace(ends, "").replace("<think>", "")
    assert "<" not in left and "[" not in left, "a special token of the template that the row lacks"


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_knows_whether_the_chat_template_can_think(kind: str) -> None:
    thinks = row(kind).thinking
    text = families.template(kind)
    assert (thinks is not None) == ("enable_thinking" in text)
    assert all(mark in text for mark in thinks or ())


def test_a_family_is_found_by_the_text_part_of_a_config_and_by_nothing_else() -> None:
    assert row("qwen3_5") is family_of({"model_type": "other", "text_config": {"model_type": "qwen3_5_text"}})
    assert family_of({"model_type": "gpt2"}) is None and family_of({}) is None
    types = [kind for family in FAMILIES for kind in family.types]
    assert len(set(types)) == len(types)
    assert row("qwen3").turn == Turn("<|im_start|>", "\n", "<|im_end|>\n")


def test_a_config_is_found_where_huggingface_hub_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", os.fspath(tmp_path))
    folder = tmp_path / "hub" / "models--a--b"
    for commit in ("1" * 40, "2" * 40):
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1" * 40)
    assert cached_config("a/b", None) == folder / "snapshots" / ("1" * 40) / "config.json"
    assert cached_config("a/b", "2" * 40) == folder / "snapshots" / ("2" * 40) / "config.json"
    assert cached_config("a/b", "3" * 40) is None and cached_config("a/c", None) is None
