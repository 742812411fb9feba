"""What `make rounds` ends with: what each round sampled, and what it made of the model, against the first base.

    python -m tests.tools.rounds_table runs/round1 runs/round2 runs/round3

The share of direct sentences is known for the built-in data alone, whose sentences are counted; the rest is of any.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dpo_cli.records import read_jsonl
from dpo_cli.show import say, show_figure, table
from tests.tools.smoke_grammar import styles


def direct(texts: list[tuple[str, str]]) -> dict[str, float]:
    """By language, the share of direct ones among the sentences of (language, text)."""
    found: dict[str, list[bool]] = {language: [] for language in sorted({language for language, _ in texts})}
    for language, text in texts:
        found[language] += [style == "direct" for style in styles(text, language)]
    return {language: sum(several) / max(len(several), 1) for language, several in found.items()}


def shown(shares: dict[str, float]) -> str:
    return ", ".join(f"{language} {share:.0%}" for language, share in shares.items())


def sampled(run: Path) -> list[tuple[str, str]]:
    """Language and text of every answer that the round started from; its sources are named by their language."""
    rows = read_jsonl(run / "data" / "answers.jsonl")
    return [(row["source"], one["text"]) for row in rows for one in row["answers"]]


def answers(run: Path, side: str) -> list[tuple[str, str]]:
    """Language and text of the answers to held-out prompts, of the `base` or of the `tuned` model."""
    return [(row["language"], row[side]["text"]) for row in read_jsonl(run / "eval" / "samples.jsonl")]


def row(run: Path) -> list[str]:
    report, metrics = (
        json.loads((run / part).read_text(encoding="utf-8")) for part in ("data/report.json", "eval/metrics.json")
    )
    figures: dict[str, Any] = metrics["samples"]
    return [
        run.name,
        shown(direct(sampled(run))),
        f"{report['rated']['reward']['p50']:+.1f}",
        f"{report['pairs']['train']:,}",
        shown(direct(answers(run, "tuned"))),
        show_figure(metrics["judge"]["win_rate"]),
        f"{figures['length_ratio']['value']:.2f}",
        f"{figures['kl']['value']:.3f}",
        show_figure(figures["valid_rate_tuned"]),
    ]


HEADS = (
    "round", "its samples: direct", "median reward", "pairs", "held out: direct", "win rate against the base", "length",
    "KL per token", "valid",
)  # fmt: skip

if __name__ == "__main__":
    say(table(HEADS, [row(Path(run)) for run in sys.argv[1:]]))
