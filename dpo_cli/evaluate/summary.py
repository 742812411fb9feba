"""What the figures come to: the verdict, the warnings, the curves of training and the answers to look at. All pure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpo_cli.evaluate.answers import learned
from dpo_cli.stats import Figure

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
EXAMPLES = 5  # best, worst and random each


def verdict(metrics: Mapping[str, Any]) -> str:
    """One or two sentences: did training teach the preference, and does the judge like the answers better."""
    said = _verdict_on_pairs(metrics)
    if metrics["judge"] and metrics["judge"]["asked"]:
        from dpo_cli.evaluate.winrate import judge_verdict

        said += f" {judge_verdict(metrics['judge'])}"
    return said


OF_ANSWERS = {
    "learned": "It learned the answers",
    "opposite": "Worse than no training",
    "none": "Not distinguishable from no training",
}


def _verdict_on_pairs(metrics: Mapping[str, Any]) -> str:
    if not metrics["pairs"]:
        state, words = learned(metrics["answers"])
        return f"{OF_ANSWERS[state]}: {words}."
    figure, longer = metrics["pairs"]["reward_accuracy"], metrics["pairs"]["longer_wins"]["value"]
    low, high = figure["low"], figure["high"]
    bets = {
        "always taking the longer answer": longer,
        "always taking the shorter answer": 1 - longer,
        "the longer or the shorter answer, as in training": metrics["baselines"]["majority"]["value"],
    }
    bet, length = max(bets.items(), key=lambda one: one[1])
    # Figures count prompts; where each has one pair, that is the same.
    several = "histogram" in metrics and figure["n"] < sum(metrics["histogram"]["counts"])
    units = "prompts" if several else "pairs"
    seen = (
        f"moved towards the chosen answer in {percent(figure['value'])} of {figure['n']} held-out {units} "
        f"(95% interval {percent(low)} to {percent(high)}; 50% before training, {percent(length)} for {bet})"
    )
    if low <= 0.5 <= high:
        return f"Not distinguishable from no training: the tuned model {seen}."
    if high < 0.5:
        return f"Worse than no training: the tuned model {seen}."
    if low <= length:
        return f"It learned something, but no more than length would explain: the tuned model {seen}."
    return f"It learned the preference: the tuned model {seen}."


def warnings(metrics: Mapping[str, Any]) -> list[str]:
    """What a reader should know before trusting the figures."""
    on_pairs = _warnings_on_pairs(metrics) if metrics["pairs"] else []
    return on_pairs + _warnings_on_samples(metrics["samples"]) + _warnings_on_judge(metrics["judge"])


def _warnings_on_pairs(metrics: Mapping[str, Any]) -> list[str]:
    found = []
    pairs = metrics["pairs"]
    drifts = [pairs[f"{answer}_drift"][part] for answer in ("chosen", "rejected") for part in ("value", "low", "high")]
    if not any(drifts):
        found.append("the adapter changes nothing: both models give every held-out answer the same probability")
    if (pairs["chosen_drift"]["value"] or 0.0) < 0:
        found.append(
            f"the chosen answers became less likely ({pairs['chosen_drift']['value']:.2f} nats on average): normal up "
            "to a point; where text gets worse lower train.learning_rate, or with dpo add an sft term to its loss_type"
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
            f"betting on {shortcut['name']} alone is right in {percent(shortcut['value'])} of the training pairs, so "
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
            f"{percent(samples['truncated_tuned']['value'])} of the tuned model's answers hit eval.max_new_tokens "
            f"({percent(samples['truncated_base']['value'])} of the base's): it may have unlearned to stop"
        )
    if rose("repetitive"):
        found.append(
            f"{percent(samples['repetitive_tuned']['value'])} of the tuned model's answers repeat themselves "
            f"({percent(samples['repetitive_base']['value'])} of the base's): lower train.learning_rate or raise beta"
        )
    if (samples["language_match_change"]["high"] or 0.0) < 0:
        found.append("the tuned model answers more often in another language than it was asked in")
    if rose("refusal"):
        found.append(f"refusals rose to {percent(samples['refusal_tuned']['value'])} of the answers")
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
            f"the judge keeps to its verdict in only {percent(consistency['value'])} of the prompts when the answers "
            "swap places"
        )
    if calibration["value"] is not None and calibration["low"] <= 0.5:
        found.append(
            f"the judge agrees with the data's own preference in {percent(calibration['value'])} of "
            f"{calibration['n']} held-out pairs, not clearly better than chance: its win rate says little about "
            "these data"
        )
    return found


def curves(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{key, title, points [[step, value], …]} of each figure that training logged."""
    rows = [row for row in log if "loss" in row]
    found = []
    for key, title in CURVES.items():
        points = [[row["step"], row[key]] for row in rows if key in row]
        if points:
            found.append({"key": key, "title": title, "points": points})
    return found


def examples(samples: Sequence[Sample], scores: Mapping[str, float], seed: int) -> list[dict[str, Any]]:
    """Answers of both models to show: the best and worst five by the judge, and five at random (seeded)."""
    judged = sorted((one for one in samples if one.id in scores), key=lambda one: -scores[one.id])
    best = [one for one in judged[:EXAMPLES] if scores[one.id] > 0.5]
    worst = [one for one in judged[::-1][:EXAMPLES] if scores[one.id] < 0.5]
    shown = {one.id for one in [*best, *worst]}
    rest = [one for one in samples if one.id not in shown]
    drawn = random.Random(seed).sample(rest, min(EXAMPLES, len(rest)))
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
        for kind, some in (("best", best), ("worst", worst), ("random", drawn))
        for one in some
    ]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"
