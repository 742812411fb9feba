"""The judge against a real OpenAI-compatible server: `transformers serve` on the tiny model, which judges badly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dpo_cli import smoke as builtin
from dpo_cli.errors import DpoError
from dpo_cli.evaluate.winrate import judge_metrics
from dpo_cli.judging import judge
from dpo_cli.judging.judgment import Match
from dpo_cli.recipe import OpenAIJudge

PROMPTS = ("How do I water a cactus?", "怎样给多肉浇水？", "Name three rivers.")
MATCHES = [Match(str(row), [{"role": "user", "content": text}], "Once.", "三条。") for row, text in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def served(serve: Any) -> OpenAIJudge:
    folder = builtin.resolve("builtin:tiny-qwen3")
    url = f"{serve(folder)}/v1"
    return OpenAIJudge(kind="openai", base_url=url, model=str(folder), max_tokens=16, concurrency=2, timeout=120)


def test_a_judge_that_never_gives_a_verdict_ends_well(served: OpenAIJudge, tmp_path: Path) -> None:
    judgments = judge(served, MATCHES, tmp_path / "said.sqlite", progress=False)
    assert [one.score for one in judgments] == [None] * 3
    for one in judgments:
        for order in one.orders:
            assert order["text"].endswith("(cut: see eval.judge.max_tokens)")  # it did speak, all 16 tokens
    metrics = judge_metrics(served, judgments, [], {}, seed=0)
    assert (metrics["asked"], metrics["judged"], metrics["failures"]) == (3, 0, 3)
    assert metrics["win_rate"]["value"] is None


def test_a_wrong_address_on_a_real_server_is_told(served: OpenAIJudge, tmp_path: Path) -> None:
    wrong = served.model_copy(update={"base_url": served.base_url.removesuffix("/v1")})
    with pytest.raises(DpoError) as caught:
        judge(wrong, MATCHES, tmp_path / "said.sqlite", progress=False)
    assert "HTTP 404" in str(caught.value)
    assert "mostly ends in /v1" in str(caught.value)
