"""What stands in data/*.jsonl, read as pairs whatever its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_cli.records import read_answers, read_pairs, write_jsonl


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def asked(text: str, language: str = "en") -> dict[str, Any]:
    prompt = [{"role": "user", "content": text}]
    return {"id": text, "prompt": prompt, "language": language, "source": "s", "chat_template_kwargs": {}}


def labelled(text: str, answer: str, label: bool, language: str = "en") -> dict[str, Any]:
    return {**asked(text, language), "completion": said(answer), "label": label}


def pairs_of(folder: Path, *rows: dict[str, Any]) -> list[Any]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return read_pairs(path)


def texts(pair: Any) -> tuple[str, str, str]:
    return pair.prompt[0]["content"], pair.chosen[0]["content"], pair.rejected[0]["content"]


def test_of_a_ranked_list_the_best_and_the_worst(tmp_path: Path) -> None:
    answers = [{"text": text, "score": score} for text, score in (("best", 0.9), ("middle", 0.5), ("worst", 0.2))]
    [pair] = pairs_of(tmp_path, {**asked("q"), "candidates": answers})
    assert texts(pair) == ("q", "best", "worst")
    assert (pair.score_chosen, pair.score_rejected, pair.margin) == (0.9, 0.2, 0.7)


def test_of_labelled_rows_those_of_a_prompt_that_has_both(tmp_path: Path) -> None:
    rows = [
        labelled("one", "good", True), labelled("two", "alone", True), labelled("one", "bad", False),
        labelled("one", "better", True), labelled("three", "alone", False),
    ]  # fmt: skip
    [pair] = pairs_of(tmp_path, *rows)
    assert texts(pair) == ("one", "good", "bad")


def test_where_no_prompt_has_both_there_are_good_answers_and_bad_ones_and_no_pairs(tmp_path: Path) -> None:
    rows = [labelled("a", "good a", True), labelled("甲", "坏", False, "zh"), labelled("b", "bad b", False)]
    assert pairs_of(tmp_path, *rows) == []
    for good, wanted in ((True, ["good a"]), (False, ["坏", "bad b"])):
        answers = read_answers(tmp_path / "rows.jsonl", good=good)
        assert [one.answer[0]["content"] for one in answers] == wanted


def test_held_out_prompts_are_in_one_half_each(tmp_path: Path) -> None:
    """Also where a prompt has several pairs: none of it both chooses the adapter and is reported."""
    rows = [
        {
            "id": f"{prompt}-{answer}",
            "prompt": [{"role": "user", "content": f"第 {prompt} 个问题？"}],
            "chosen": [{"role": "assistant", "content": str(answer)}],
            "rejected": [{"role": "assistant", "content": "no"}],
            "language": "zh",
            "source": "s",
        }
        for prompt in range(100)
        for answer in range(2)
    ]
    write_jsonl(tmp_path / "eval.jsonl", rows)
    halves = [read_pairs(tmp_path / "eval.jsonl", chosen_on=chosen) for chosen in (True, False)]
    prompts = [{pair.prompt[0]["content"] for pair in half} for half in halves]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 100
    assert 30 < len(prompts[0]) < 70
    assert sum(map(len, halves)) == len(rows)
