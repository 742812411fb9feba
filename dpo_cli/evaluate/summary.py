"""What a reader of the figures should know and see: warnings, curves of training, answers to look at. All pure."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dpo_cli.evaluate.verdict import changes_nothing, prices
from dpo_cli.evaluate.words import Say, speaker
from dpo_cli.show import NATS, show_figure

if TYPE_CHECKING:
    from dpo_cli.evaluate.samples import Sample

CURVES = (
    "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
)  # fmt: skip
CHANGED, DRAWN = 3, 2  # examples that changed most, and at random


def warnings(metrics: Mapping[str, Any], language: str = "en") -> list[str]:
    """What a reader should know before trusting the figures."""
    say = speaker(language)
    found = _warnings_on_pairs(metrics, say) if metrics["pairs"] else []
    paid = prices(metrics, say)
    paid.pop("drift", None)  # `chosen_fell` has that
    found += [say(f"advice_{name}", price=price) for name, price in paid.items()]
    found += _warnings_on_judge(metrics["judge"], say)
    for name, one in metrics["sets"].items():
        if one["overlap"]:
            found.append(say("overlap", n=f"{one['overlap']:,}", kept=f"{one['kept']:,}", name=name))
    return found


def _warnings_on_pairs(metrics: Mapping[str, Any], say: Say) -> list[str]:
    found = []
    pairs = metrics["pairs"]
    if changes_nothing(metrics):
        found.append(say("changes_nothing"))
    if (pairs["chosen_drift"]["high"] or 0.0) < 0:
        found.append(say("chosen_fell", nats=show_figure(pairs["chosen_drift"], NATS, False)))
    for name, figures in metrics["languages"].items():
        if not figures["pairs"]:
            continue
        accuracy = figures["pairs"]["reward_accuracy"]
        if accuracy["n"] < 30:
            found.append(say("few_pairs", name=name, n=accuracy["n"]))
        elif accuracy["high"] < 0.5:
            found.append(say("below_half", name=name))
        elif accuracy["low"] <= 0.5:
            found.append(say("near_half", name=name))
    shortcut, accuracy = metrics["baselines"]["shortcut"], pairs["reward_accuracy"]
    if shortcut and shortcut["value"] > (accuracy["low"] or 0.0) > 0.5:
        found.append(say("shortcut", name=shortcut["name"], share=_share(shortcut)))
    return found


def _warnings_on_judge(judge: Mapping[str, Any] | None, say: Say) -> list[str]:
    if not judge:
        return []
    found = []
    for count, key in (("failures", "no_verdict"), ("cut", "judge_cut")):
        if judge[count]:
            found.append(say(key, n=judge[count], asked=judge["asked"]))
    consistency, calibration = judge["position_consistency"], judge["calibration"]
    if consistency and consistency["value"] is not None and consistency["value"] < 0.6:
        found.append(say("inconsistent", share=_share(consistency)))
    if calibration["value"] is not None and calibration["low"] <= 0.5:
        found.append(say("disagrees", share=_share(calibration), n=calibration["n"]))
    return found


def _share(figure: Mapping[str, Any]) -> str:
    return show_figure(figure, interval=False)


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

    By the judge that is the two best and the worst; without one, those whose pair's reward margin is furthest from 0.

    Args:
        scores: of the judge, 0..1 by id.
        margins: rewards of the held-out pairs, nats by id.
    """
    changed = _changed([one for one in samples if one.id in scores], scores)
    if not scores:
        known = [one for one in samples if one.id in margins]
        changed = sorted(known, key=lambda one: -abs(margins[one.id]))[:CHANGED]
    rest = [one for one in samples if one not in changed]
    return [
        {
            "kind": "changed" if one in changed else "random",
            "id": one.id,
            "language": one.language,
            "prompt": one.prompt,
            "score": scores.get(one.id),
            "answers": {name: shown(vars(answer)) for name, answer in (("base", one.base), ("tuned", one.tuned))},
        }
        for one in [*changed, *random.Random(seed).sample(rest, min(DRAWN, len(rest)))]
    ]


def shown(answer: Mapping[str, Any], score: float | None = None) -> dict[str, Any]:
    """What the page shows of an answer of samples.jsonl; `score`: the judge's, where each answer has its own."""
    tokens = len(answer["ids"]) - answer["thought"]
    return {"text": answer["text"], "tokens": tokens, "finished": answer["finished"], "score": score}


def _changed(judged: Sequence[Sample], scores: Mapping[str, float]) -> list[Sample]:
    """The best two that won and the worst that lost; more of the one where there are too few of the other."""
    won = sorted((one for one in judged if scores[one.id] > 0.5), key=lambda one: -scores[one.id])
    lost = sorted((one for one in judged if scores[one.id] < 0.5), key=lambda one: scores[one.id])
    worst = lost[: max(1, CHANGED - len(won))]
    return [*won[: CHANGED - len(worst)], *worst]
