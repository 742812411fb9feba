"""What a report shows beside the figures: curves of training, and answers to look at."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from dpo_cli.evaluate.samples import Sample

CURVES = (
    "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
)  # fmt: skip
Item = TypeVar("Item")

CHANGED, DRAWN = 3, 2  # examples that changed most, and at random


def curves(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{key, points [[step, value], …]} of each figure that training logged, on held-out pairs as `held_out`."""
    found = []
    for key in CURVES:
        points = [[row["step"], row[key]] for row in log if "loss" in row and key in row]
        ends = re.compile(rf"eval_(.+_)?{re.escape(key)}")
        held_out: dict[int, list[float]] = {}  # by step, of each held-out set
        for row in log:
            for name in filter(ends.fullmatch, row):
                held_out.setdefault(row["step"], []).append(row[name])
        held = [[step, fmean(values)] for step, values in sorted(held_out.items())]
        if points:
            found.append({"key": key, "points": points, **({"held_out": held} if held else {})})
    return found


def examples(
    samples: Sequence[Sample], scores: Mapping[str, float], margins: Mapping[str, float], seed: int
) -> list[dict[str, Any]]:
    """Answers of both models to show: the three that changed most, and two of the rest at random (seeded).

    By the judge that is the two best and the worst, no ties; without one, those whose reward margin is furthest from 0.

    Args:
        scores: of the judge, 0..1 by id.
        margins: rewards of the held-out pairs, nats by id.
    """
    if scores:
        decided = [one for one in samples if scores.get(one.id, 0.5) != 0.5]
        decided.sort(key=lambda one: -scores[one.id])
        worst = sorted(decided[CHANGED - 1 :], key=lambda one: scores[one.id])[:1]
        changed = [*decided[: CHANGED - 1], *worst]
    else:
        known = [one for one in samples if one.id in margins]
        changed = sorted(known, key=lambda one: -abs(margins[one.id]))[:CHANGED]
    return [
        {
            "kind": kind,
            "id": one.id,
            "language": one.language,
            "prompt": one.prompt,
            "score": scores.get(one.id),
            "answers": {name: shown(vars(answer)) for name, answer in (("base", one.base), ("tuned", one.tuned))},
        }
        for kind, one in chosen(samples, changed, seed)
    ]


def chosen(some: Sequence[Item], changed: Sequence[Item], seed: int) -> list[tuple[str, Item]]:
    """What to show: what changed most, and `DRAWN` of the rest at random."""
    rest = [one for one in some if one not in changed]
    drawn = random.Random(seed).sample(rest, min(DRAWN, len(rest)))
    return [*(("changed", one) for one in changed), *(("random", one) for one in drawn)]


def shown(answer: Mapping[str, Any], score: float | None = None) -> dict[str, Any]:
    """What the page shows of an answer of samples.jsonl; `score`: the judge's, where each answer has its own."""
    tokens = len(answer["ids"]) - answer["thought"]
    return {"text": answer["text"], "tokens": tokens, "finished": answer["finished"], "score": score}
