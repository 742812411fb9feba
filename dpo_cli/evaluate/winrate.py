"""What judgments come to: win rates with intervals, as judged and with length taken out.

The unit of every interval is the prompt: the two orders of one prompt mostly say the same, and counted as two
observations they would make intervals that promise 95 % and hold 83 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from dpo_cli.judging import Judgment
from dpo_cli.judging.server import TEMPLATE_SHA256
from dpo_cli.published import without_paths
from dpo_cli.recipe import OpenAIJudge, RewardModelJudge
from dpo_cli.stats import Figure, bootstrap, bootstrap_mean, wilson

Array = NDArray[Any]

DRAWS = 10_000


def win_rate(scores: Sequence[float], seed: int) -> Figure:
    """The mean share of a prompt, W = Σ s_i / n, with its 95 % interval.

    That is a percentile bootstrap over prompts; where all shares are 0 or 1, or all the same, it is Wilson's, which
    stays honest at the ends (all won is not 100 % to 100 %).

    Args:
        scores: one a prompt, in 0..1.
    """
    if len(set(scores)) < 2 or set(scores) <= {0.0, 1.0}:
        return wilson(sum(scores), len(scores))
    return bootstrap_mean(scores, seed, DRAWS)


def length_adjusted(scores: Sequence[float], length_differences: Sequence[float], seed: int) -> Figure:
    """The win rate that would be left were both answers equally long.

    σ(θ) of the logistic model s_i ~ σ(θ + φ tanh(Δ_i / sd Δ)), AlpacaEval's length control (Dubois et al. 2024) without
    its term for a prompt's difficulty, which needs many models on the same prompts. Shares between 0 and 1 are soft
    labels. A ridge of 0.1 φ²/2 holds φ where the longer answer always wins. Interval: bootstrap over prompts.

    Args:
        scores: one a prompt, in 0..1.
        length_differences: Δ, tokens of the judged answer less those of its opponent, in the same order.

    Returns:
        The plain win rate where all scores are the same, or all differences: there is nothing to adjust by.
    """
    differences = numpy.asarray(length_differences, dtype=numpy.float64)
    if len(set(scores)) < 2 or not differences.std():
        return win_rate(scores, seed)
    return bootstrap([scores, numpy.tanh(differences / differences.std())], _logistic_at_zero, seed)


def _logistic_at_zero(shares: Array, lengths: Array) -> Array:
    """σ(θ) of s ~ σ(θ + φ z) by Newton's method; the last axis of both is the prompts, and goes."""
    weak, ridge = 1e-4, 0.1  # θ has a trace of one too, for draws in which all is won
    theta = numpy.zeros((*shares.shape[:-1], 1))
    phi = numpy.zeros_like(theta)
    for _ in range(60):
        chance = 1 / (1 + numpy.exp(-(theta + phi * lengths)))
        weight = chance * (1 - chance)
        gradient = (shares - chance).sum(-1, keepdims=True) - weak * theta
        slope = ((shares - chance) * lengths).sum(-1, keepdims=True) - ridge * phi
        a = weight.sum(-1, keepdims=True) + weak
        b = (weight * lengths).sum(-1, keepdims=True)
        c = (weight * lengths**2).sum(-1, keepdims=True) + ridge
        # Newton's step overshoots where the sides are nearly parted, so it is held to 1 either way.
        steps = (c * gradient - b * slope) / (a * c - b * b), (a * slope - b * gradient) / (a * c - b * b)
        theta, phi = theta + steps[0].clip(-1, 1), phi + steps[1].clip(-1, 1)
        if max(abs(step).max() for step in steps) < 1e-9:
            break
    return 1 / (1 + numpy.exp(-theta[..., 0]))


def position_consistency(judgments: Sequence[Judgment]) -> Figure:
    """Share of the prompts judged in both orders where both name the same answer, or both a tie; Wilson's interval."""
    swapped = {"A": "B", "B": "A", "tie": "tie"}
    verdicts = [[order["verdict"] for order in one.orders] for one in judgments if one.orders and one.score is not None]
    return wilson(sum(swapped[str(first)] == second for first, second in verdicts), len(verdicts))


def rates(scores: Mapping[str, float], length_differences: Mapping[str, int], seed: int) -> dict[str, Figure]:
    """Both win rates, as judged and `length_adjusted`, of scores and length differences by prompt."""
    shares, longer = list(scores.values()), [length_differences[prompt] for prompt in scores]
    return {"win_rate": win_rate(shares, seed), "length_adjusted_win_rate": length_adjusted(shares, longer, seed)}


def judge_metrics(
    settings: OpenAIJudge | RewardModelJudge,
    judgments: Sequence[Judgment],
    calibration: Sequence[Judgment],
    length_differences: Mapping[str, int],
    seed: int,
) -> dict[str, Any]:
    """The `judge` part of `eval/metrics.json`; failures are counted and in no figure.

    Args:
        judgments: tuned (first) against base, one a prompt.
        calibration: chosen (first) against rejected, one a held-out pair: whether the judge sees the data's preference.
        length_differences: tokens of the tuned answer less those of the base's, by the judgment's id.
    """
    judged = [one for one in judgments if one.score is not None]
    known = {one.id: one.score for one in judged if one.score is not None}
    scores = list(known.values())
    tried = [one.score for one in calibration if one.score is not None]
    server = isinstance(settings, OpenAIJudge)
    gaps = [one.difference for one in judged if one.difference is not None]
    return {
        "kind": settings.kind,
        "model": without_paths(settings.model if isinstance(settings, OpenAIJudge) else settings.id),
        "template_sha256": TEMPLATE_SHA256 if server else None,
        **rates(known, length_differences, seed),
        "wins": wilson(sum(score > 0.5 for score in scores), len(scores)),
        "ties": wilson(scores.count(0.5), len(scores)),
        "losses": wilson(sum(score < 0.5 for score in scores), len(scores)),
        "position_consistency": position_consistency(judged) if server else None,
        "score_difference": None if server else bootstrap_mean(gaps, seed),
        "calibration": win_rate(tried, seed),
        "failures": len(judgments) - len(judged),
        "calibration_failures": len(calibration) - len(tried),
        "cut": sum(one.cut for one in judgments),
        "judged": len(judged),
        "asked": len(judgments),
    }
