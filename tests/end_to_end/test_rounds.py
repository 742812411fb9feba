"""Three rounds of the built-in model's own answers: a rater of style makes it direct, one that draws lots does not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.records import read_jsonl
from tests.prepare.answer_server import AnswerServer, lines
from tests.tools.rounds_table import answers, direct, row, sampled

ROUNDS = Path(__file__).parents[2] / "recipes" / "rounds"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def run_rounds(command: Any, runs: Path, *settings: str) -> list[Path]:
    """Train and evaluate round after round; their folders."""
    made: list[Path] = []
    for name in ("round1", "round2", "round3"):
        before = [f"model.adapter={made[-1] / 'train' / 'adapter'}"] if made else []
        options = [part for one in (*settings, *before) for part in ("--set", one)]
        for stage, more in (("train", []), ("eval", ["--against", "base"])):
            command(stage, ROUNDS / f"{name}.yaml", "--runs-dir", runs, "--quiet", *options, *more)
        made.append(runs / name)
    return made


def metrics(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "eval" / "metrics.json").read_text(encoding="utf-8")))


def test_rated_by_style_each_round_is_more_direct_than_the_last(command: Any, tmp_path: Path) -> None:
    rounds = run_rounds(command, tmp_path / "runs")
    own, last, first = (
        [direct(sampled(run)) for run in rounds], direct(answers(rounds[-1], "tuned")),
        direct(answers(rounds[-1], "base")),  # of the first base, by --against base
    )  # fmt: skip
    for language in ("en", "zh"):
        shares = [one[language] for one in own]
        assert 0.4 < shares[0] < 0.6
        assert shares[0] < shares[1] < shares[2]
        assert last[language] >= 0.9 > 0.7 > first[language]
    figures = metrics(rounds[-1])["samples"]
    assert figures["language_match_tuned"]["value"] == 1.0
    assert figures["truncated_tuned"]["value"] <= 0.05
    assert 0.85 < figures["length_ratio"]["value"] < 1.15
    kl = [metrics(run)["samples"]["kl"]["value"] for run in rounds]
    assert kl[0] < kl[1] < kl[2]
    asked = [{json.dumps(one["prompt"]) for one in read_jsonl(run / "data" / "answers.jsonl")} for run in rounds]
    assert not (asked[0] & asked[1] or asked[0] & asked[2] or asked[1] & asked[2])
    assert all(len(row(run)) == 9 for run in rounds)  # the table of make rounds
    settings = [f"--set=model.adapter={rounds[1] / 'train' / 'adapter'}", "--set=eval.against=base"]
    command(
        "export", ROUNDS / "round3.yaml", "--runs-dir", tmp_path / "runs", *settings
    )  # fails where it is not the same
    card = (rounds[-1] / "export" / "merged" / "README.md").read_text(encoding="utf-8")
    assert "sampled from builtin:tiny-qwen3 + its adapter" in card
    assert "builtin:style-reward, which rated them" in card


def test_rated_by_lot_nothing_moves(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def lot(body: dict[str, Any], number: int) -> str:
        return lines(1 + int(hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest(), 16) % 5)

    with AnswerServer(lot) as server:
        rater = f"data.rater={{kind: openai, base_url: {server.url}, model: lot}}"
        rounds = run_rounds(command, tmp_path / "runs", rater)
    for language in ("en", "zh"):
        for run in rounds:
            tuned, base = (direct(answers(run, side))[language] for side in ("tuned", "base"))
            assert abs(tuned - base) < 0.2
        first, last = (direct(sampled(run))[language] for run in (rounds[0], rounds[-1]))
        assert abs(last - first) < 0.12
