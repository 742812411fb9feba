"""Files of prompts, as benchmarks have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import DpoError
from dpo_cli.evaluate.prompt_file import asked, read_prompts

MESSAGES = [{"role": "system", "content": "简短回答。"}, {"role": "user", "content": "为什么？"}]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"instruction": "为什么？", "dataset": "helpful_base"}, [["为什么？"]]),
        ({"question_id": 1, "prompt": "Why?"}, [["Why?"]]),
        ({"question_id": 1, "turns": [{"content": "Why?"}]}, [["Why?"]]),
        ({"question_id": 81, "category": "writing", "turns": ["Why?", "然后呢？"]}, [["Why?"], ["然后呢？"]]),
        ({"prompt": MESSAGES}, [["简短回答。", "为什么？"]]),
    ],
)
@pytest.mark.parametrize("lines", [True, False])
def test_prompts_of_alpaca_eval_arena_hard_and_mt_bench_are_read(
    row: Any, wanted: list[list[str]], lines: bool, tmp_path: Path
) -> None:
    file, text = tmp_path / "prompts.json", json.dumps(row, ensure_ascii=False)
    file.write_text(f"{text}\n{text}\n" if lines else f"[{text}, {text}]", encoding="utf-8-sig")  # as Windows saves it
    rows = read_prompts(file)
    assert len(rows) == 2
    for one in rows:
        assert [[message["content"] for message in turn] for turn in asked(one)] == wanted
        assert [turn[-1]["role"] for turn in asked(one)] == ["user"] * len(wanted)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[3]",
        "no json",
        '[{"instruction": "  "}]',
        '[{"turns": ["Why?", ""]}]',
        '[{"turns": ["a"]}, {"prompt": "b"}]',
    ],
)
def test_a_file_without_prompts_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(text, encoding="utf-8")
    with pytest.raises(DpoError):
        read_prompts(tmp_path / "prompts.json")
    with pytest.raises(DpoError, match="can't read the prompts"):
        read_prompts(tmp_path / "none.json")
