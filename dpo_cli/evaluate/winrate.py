"""What judgments come to: win rates with intervals, as judged and with length taken out; and strengths of several runs.

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
ELO = 173.71779276130073  # 400 / ln 10: points of one nat of log-odds

Comparison = tuple[str, str, str, float]  # prompt, player, opponent, share that goes to the player, in 0..1


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


def bradley_terry(comparisons: Sequence[Comparison], base: str, seed: int, draws: int = 2000) -> dict[str, Figure]:
    """Strengths in Elo points above `base`: +100 beats it on 64 % of prompts, +200 on 76 %; base itself is 0.

    P(i beats j) = p_i / (p_i + p_j), fitted by Hunter's MM update (2004), p_i ← W_i / Σ_j n_ij / (p_i + p_j). That is
    the exact maximum of the likelihood, which exists where wins lead from every player to every other (Ford 1957).
    Where they don't, as with one that won all, each pair that met gets one drawn game on top. Interval: bootstrap over
    prompts; all comparisons on one prompt are drawn together, for a hard prompt is one for all.

    Args:
        comparisons: games lead from `base` to every player.
        draws: resamples of the bootstrap.

    Returns:
        A figure for each player but base; n is the prompts that the player was judged on.
    """
    if not comparisons:
        return {}
    prompts = {prompt: row for row, prompt in enumerate(dict.fromkeys(one[0] for one in comparisons))}
    names = list(dict.fromkeys([base, *(name for one in comparisons for name in one[1:3])]))
    wins = numpy.zeros((len(prompts), len(names), len(names)))  # [prompt, i, j]: share that went to i against j
    for prompt, player, opponent, share in comparisons:
        row, i, j = prompts[prompt], names.index(player), names.index(opponent)
        wins[row, i, j] += share
        wins[row, j, i] += 1 - share
    games = wins + wins.swapaxes(1, 2)
    counts = numpy.random.default_rng(seed).multinomial(len(prompts), [1 / len(prompts)] * len(prompts), draws)
    drawn = numpy.tensordot(numpy.concatenate([numpy.ones((1, len(prompts))), counts]), wins, 1)
    prior = numpy.where(_connected(drawn)[:, None, None], 0.0, (games.sum(0) > 0) / 2)
    points = (ELO * numpy.log(_strengths(drawn + prior))).round(6)
    lows, highs = numpy.quantile(points[1:], (0.025, 0.975), axis=0).round(6).tolist()
    judged = (games.sum(-1) > 0).sum(0).tolist()
    found = zip(names, points[0].tolist(), lows, highs, judged, strict=True)
    return {name: Figure(value=at, low=low, high=high, n=n) for name, at, low, high, n in found if name != base}


def _connected(wins: Array) -> Array:
    """Whether wins lead from every player to every other, [draws], of wins [draws, players, players]."""
    players = wins.shape[-1]
    reached: Array = numpy.logical_or(wins > 0, numpy.eye(players, dtype=bool))
    for _ in range(players.bit_length()):  # paths of twice the length, each time
        reached = reached @ reached
    return numpy.asarray(reached.all((-1, -2)))


def _strengths(wins: Array) -> Array:
    """p [draws, players] of wins [draws, players, players], the first player's held at 1."""
    games = wins + wins.swapaxes(-1, -2)
    p = numpy.ones(wins.shape[:-1])
    for _ in range(10_000):
        new = wins.sum(-1) / (games / (p[..., :, None] + p[..., None, :])).sum(-1)
        new /= new[..., :1]
        moved = float(abs(numpy.log(new / p)).max())
        p = new
        if moved < 1e-9:
            break
    return p
