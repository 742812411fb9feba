"""What a reader of the figures should know and see: warnings, curves of training, answers to look at. All pure."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpo_cli.evaluate.verdict import changes_nothing, percent
from dpo_cli.stats import Figure, places

if TYPE_CHECKING:
    from dpo_cli.evaluate.samples import Sample

CURVES = {
    "loss": "loss",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "rewards/chosen": "reward of chosen",
    "rewards/rejected": "reward of rejected",
    "logps/chosen": "log-probability of chosen",
}
CHANGED, DRAWN = 3, 2  # examples that changed most, and at random


def warnings(metrics: Mapping[str, Any]) -> list[str]:
    """What a reader should know before trusting the figures."""
    on_pairs = _warnings_on_pairs(metrics) if metrics["pairs"] else []
    return on_pairs + _warnings_on_samples(metrics["samples"]) + _warnings_on_judge(metrics["judge"])


def _warnings_on_pairs(metrics: Mapping[str, Any]) -> list[str]:
    found = []
    pairs = metrics["pairs"]
    drift: Figure = pairs["chosen_drift"]
    if changes_nothing(metrics):
        found.append("the adapter changes nothing: both models give every held-out answer the same probability")
    if (drift["high"] or 0.0) < 0:
        mean = f"{drift['value']:.{places(drift, most=2)}f}"
        found.append(
            f"the chosen answers became less likely ({mean} nats on average): normal up to a point; where text gets "
            "worse lower train.learning_rate, or with dpo add an sft term to its loss_type"
        )
    for language, figures in metrics["languages"].items():
        if not figures["pairs"]:
            continue
        accuracy = figures["pairs"]["reward_accuracy"]
        if accuracy["n"] < 30:
            found.append(f"few held-out pairs in {language} ({accuracy['n']}): its interval is wide")
        elif accuracy["high"] < 0.5:
            found.append(f"in {language} the accuracy is below 50%: there it learned the opposite")
        elif accuracy["low"] <= 0.5:
            found.append(f"in {language} the accuracy is not distinguishable from 50%")
    shortcut, accuracy = metrics["baselines"]["shortcut"], pairs["reward_accuracy"]
    if shortcut and shortcut["value"] > (accuracy["low"] or 0.0) > 0.5:
        found.append(
            f"betting on {shortcut['name']} alone is right in {percent(shortcut)} of the training pairs, so "
            "this accuracy may be just that"
        )
    return found


def _warnings_on_samples(samples: Mapping[str, Figure] | None) -> list[str]:
    """Worse text: only changes whose interval says that they are none of chance."""
    if not samples:
        return []
    found = []

    def rose(name: str) -> bool:
        return (samples[f"{name}_change"]["low"] or 0.0) > 0

    if rose("truncated"):
        found.append(
            f"{percent(samples['truncated_tuned'])} of the tuned model's answers hit eval.max_new_tokens "
            f"({percent(samples['truncated_base'])} of the base's): it may have unlearned to stop"
        )
    if rose("repetitive"):
        found.append(
            f"{percent(samples['repetitive_tuned'])} of the tuned model's answers repeat themselves "
            f"({percent(samples['repetitive_base'])} of the base's): lower train.learning_rate or raise beta"
        )
    if (samples["language_match_change"]["high"] or 0.0) < 0:
        found.append("the tuned model answers more often in another language than it was asked in")
    if rose("refusal"):
        found.append(f"refusals rose to {percent(samples['refusal_tuned'])} of the answers")
    ratio = samples["length_ratio"]
    if (ratio["low"] or 0.0) > 1.25:
        found.append(f"answers got {ratio['value']:.2f} times as long: judge by the length-adjusted win rate")
    return found


def _warnings_on_judge(judge: Mapping[str, Any] | None) -> list[str]:
    if not judge:
        return []
    found = []
    if judge["failures"]:
        found.append(f"{judge['failures']} of {judge['asked']} prompts got no verdict from the judge and are left out")
    if judge["cut"]:
        cut = f"{judge['cut']} of {judge['asked']} prompts"
        found.append(f"the judge saw an answer cut short in {cut}: raise eval.judge.max_length")
    consistency, calibration = judge["position_consistency"], judge["calibration"]
    if consistency and consistency["value"] is not None and consistency["value"] < 0.6:
        found.append(
            f"the judge keeps to its verdict in only {percent(consistency)} of the prompts when the answers swap places"
        )
    if calibration["value"] is not None and calibration["low"] <= 0.5:
        found.append(
            f"the judge agrees with the data's own preference in {percent(calibration)} of "
            f"{calibration['n']} held-out pairs, not clearly better than chance: its win rate says little about "
            "these data"
        )
    return found


def curves(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{key, title, points [[step, value], …]} of each figure that training logged, on held-out pairs as `held_out`."""
    found = []
    for key, title in CURVES.items():
        points = [[row["step"], row[key]] for row in log if "loss" in row and key in row]
        ends = re.compile(rf"eval_(.+_)?{re.escape(key)}")
        logged = [(row["step"], value) for row in log for name, value in row.items() if ends.fullmatch(name)]
        held_out = {step: [value for at, value in logged if at == step] for step, _ in logged}
        held = [
            [step, sum(values) / len(values)] for step, values in sorted(held_out.items())
        ]  # of several sets the mean
        if points:
            found.append({"key": key, "title": title, "points": points, **({"held_out": held} if held else {})})
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
    shown = {one.id for one in changed}
    rest = [one for one in samples if one.id not in shown]
    drawn = random.Random(seed).sample(rest, min(DRAWN, len(rest)))
    return [
        {
            "kind": kind,
            "id": one.id,
            "language": one.language,
            "prompt": one.prompt,
            "base": one.base.text,
            "tuned": one.tuned.text,
            "score": scores.get(one.id),
            "base_tokens": len(one.base.said),
            "tuned_tokens": len(one.tuned.said),
            "base_finished": one.base.finished,
            "tuned_finished": one.tuned.finished,
        }
        for kind, some in (("changed", changed), ("random", drawn))
        for one in some
    ]


def _changed(judged: Sequence[Sample], scores: Mapping[str, float]) -> list[Sample]:
    """The best two that won and the worst that lost; more of the one where there are too few of the other."""
    won = sorted((one for one in judged if scores[one.id] > 0.5), key=lambda one: -scores[one.id])
    lost = sorted((one for one in judged if scores[one.id] < 0.5), key=lambda one: scores[one.id])
    worst = lost[: max(1, CHANGED - len(won))]
    return [*won[: CHANGED - len(worst)], *worst]
