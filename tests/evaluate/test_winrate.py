"""Win rates against scipy and statsmodels, and their intervals against simulations whose truth is known."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import scipy.stats
import statsmodels.api as sm
from dpo_cli.evaluate.winrate import bradley_terry, judge_metrics, length_adjusted, position_consistency, win_rate
from dpo_cli.judging.judgment import Judgment, Reading, Verdict
from dpo_cli.recipe import OpenAIJudge, RewardModelJudge
from dpo_cli.stats import Figure
from statsmodels.stats.proportion import proportion_confint

SERVER = OpenAIJudge(kind="openai", base_url="http://localhost:1/v1", model="m")
LOCAL = RewardModelJudge(kind="reward_model", id="x/y")


def shares(count: int, truth: float, seed: int, repeats: float = 0.85) -> list[float]:
    """Two verdicts a prompt, the second the same as the first in 85 % of them: what judges do over two orders."""
    random = numpy.random.default_rng(seed)
    first = random.random(count) < truth
    second = numpy.where(random.random(count) < repeats, first, random.random(count) < truth)
    return ((first + second.astype(float)) / 2).tolist()


def bounds(figure: Figure) -> tuple[float, float]:
    assert figure["low"] is not None and figure["high"] is not None
    return figure["low"], figure["high"]


def judgment(score: float | None, *verdicts: Verdict | None, name: str = "x") -> Judgment:
    orders: list[Reading] = [{"verdict": verdict, "text": ""} for verdict in verdicts]
    return Judgment(name, score, orders)


# ---------------------------------------------------------------------------------------------------------- win rate


def test_binary_win_rates_have_wilsons_interval() -> None:
    figure = win_rate([1.0] * 37 + [0.0] * 13, seed=0)
    low, high = proportion_confint(37, 50, method="wilson")
    assert figure["value"] == pytest.approx(0.74)
    assert bounds(figure) == pytest.approx((low, high), abs=1e-6)


def test_shares_have_a_bootstrap_over_prompts() -> None:
    scores = shares(120, 0.6, seed=3)
    figure = win_rate(scores, seed=0)
    oracle = scipy.stats.bootstrap((scores,), numpy.mean, n_resamples=10_000, method="percentile", rng=1)
    assert bounds(figure) == pytest.approx(tuple(oracle.confidence_interval), abs=0.006)
    assert figure == win_rate(scores, seed=0)


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_a_few_scores_alike_do_not_make_certainty(score: float) -> None:
    low, high = bounds(win_rate([score] * 3, seed=0))
    assert high - low > 0.4
    assert low <= score <= high


def test_no_scores_no_figure() -> None:
    assert win_rate([], seed=0) == length_adjusted([], [], seed=0) == Figure(value=None, low=None, high=None, n=0)


# ------------------------------------------------------------------------------------------------------------ length


def world(truth: float, seed: int, count: int, liking: float = 1.4) -> tuple[list[float], list[float]]:
    """Scores of a judge who likes long answers, of a model that writes longer ones; `truth` at equal length."""
    random = numpy.random.default_rng(seed)
    lengths = random.normal(60, 100, count)
    logit = math.log(truth / (1 - truth)) + liking * numpy.tanh(lengths / lengths.std())
    return (random.random(count) < 1 / (1 + numpy.exp(-logit))).astype(float).tolist(), lengths.tolist()


def test_length_taken_out_leaves_the_truth() -> None:
    scores, lengths = world(0.6, seed=1, count=3_000)
    raw, adjusted = sum(scores) / len(scores), length_adjusted(scores[:], lengths, seed=0)["value"]
    assert raw > 0.6 + 0.07
    assert adjusted == pytest.approx(0.6, abs=0.02)


def test_the_adjusted_rate_is_a_logistic_regression() -> None:
    scores, lengths = world(0.55, seed=5, count=400)
    z = numpy.tanh(numpy.asarray(lengths) / numpy.std(lengths))
    fit = sm.GLM(scores, numpy.column_stack([numpy.ones(400), z]), family=sm.families.Binomial()).fit()
    figure = length_adjusted(scores, lengths, seed=0)
    assert figure["value"] == pytest.approx(1 / (1 + math.exp(-fit.params[0])), abs=2e-3)  # the ridge is all between
    expected = 1 / (1 + numpy.exp(-fit.conf_int()[0]))
    assert bounds(figure) == pytest.approx(tuple(expected), abs=0.02)


@pytest.mark.slow
def test_the_adjusted_interval_covers_what_it_says() -> None:
    covered = 0
    for seed in range(60):
        low, high = bounds(length_adjusted(*world(0.55, seed, 150), seed))
        covered += low <= 0.55 <= high
    assert 0.88 <= covered / 60 <= 1.0  # 60 worlds tell no more; 400 gave 94.5 %


@pytest.mark.parametrize(
    ("scores", "lengths"),
    [([1.0] * 8, range(8)), ([0.0, 1.0] * 4, [7] * 8), ([0.0, 1.0, 0.5, 1.0] * 2, [0] * 8)],
)
def test_where_there_is_nothing_to_adjust_by_it_is_the_win_rate(scores: list[float], lengths: list[int]) -> None:
    assert length_adjusted(scores, list(lengths), seed=0) == win_rate(scores, seed=0)


def test_a_judge_who_always_takes_the_longer_answer() -> None:
    """The sides are parted completely, so plain logistic regression has no solution."""
    lengths = [*range(-20, 0), *range(1, 41)]
    figure = length_adjusted([float(length > 0) for length in lengths], lengths, seed=0)
    low, high = bounds(figure)
    assert 0 <= low < 0.5 < high <= 1


# ---------------------------------------------------------------------------------------------------------- position


def test_consistent_is_the_same_answer_in_both_orders() -> None:
    said = [("A", "B"), ("B", "A"), ("tie", "tie"), ("A", "A"), ("A", "tie")]
    judgments = [judgment(0.5, *verdicts) for verdicts in said]  # type: ignore[arg-type]
    judgments += [judgment(0.5), judgment(None, "A", None)]  # the same text, unasked; a failure
    figure = position_consistency(judgments)
    assert (figure["value"], figure["n"]) == (0.6, 5)


# ----------------------------------------------------------------------------------------------------------- summary


def metrics_of(judgments: list[Judgment], settings: Any = SERVER, **more: Any) -> dict[str, Any]:
    lengths = {one.id: index % 7 - 3 for index, one in enumerate(judgments)}
    return judge_metrics(settings, judgments, more.pop("calibration", []), lengths, seed=0)


def test_failures_are_counted_and_in_no_figure() -> None:
    judgments = [judgment(1.0, "A", "B", name=f"w{i}") for i in range(30)]
    judgments += [judgment(0.0, "B", "A", name=f"l{i}") for i in range(10)]
    judgments += [judgment(0.5, "A", "A", name=f"t{i}") for i in range(10)]
    judgments += [judgment(None, "A", None, name=f"f{i}") for i in range(5)]
    calibration = [judgment(1.0, "A", "B")] * 3 + [judgment(None, None, None)]
    metrics = metrics_of(judgments, calibration=calibration)
    assert (metrics["asked"], metrics["judged"], metrics["failures"]) == (55, 50, 5)
    assert metrics["win_rate"]["value"] == pytest.approx(0.7)
    assert [metrics[name]["value"] for name in ("wins", "ties", "losses")] == [0.6, 0.2, 0.2]
    assert (metrics["calibration"]["value"], metrics["calibration_failures"]) == (1.0, 1)
    assert metrics["position_consistency"]["value"] == 0.8
    assert metrics["score_difference"] is None
    assert len(metrics["template_sha256"]) == 64


def test_a_reward_model_has_a_difference_and_no_orders() -> None:
    judgments = [Judgment(str(i), 1.0, difference=0.5 + i, cut=i == 0) for i in range(4)]
    metrics = metrics_of(judgments, LOCAL)
    assert (metrics["kind"], metrics["model"]) == ("reward_model", "x/y")
    assert metrics["score_difference"]["value"] == 2.0
    assert metrics["position_consistency"] is metrics["template_sha256"] is None
    assert metrics["cut"] == 1


def test_a_win_by_length_alone_is_none_at_equal_lengths() -> None:
    scores, lengths = world(0.5, seed=8, count=200, liking=3.0)
    judgments = [judgment(score, "A", "B", name=str(i)) for i, score in enumerate(scores)]
    differences = {str(i): round(length) for i, length in enumerate(lengths)}
    metrics = judge_metrics(SERVER, judgments, [], differences, seed=0)
    rate, adjusted = metrics["win_rate"], metrics["length_adjusted_win_rate"]
    assert rate["low"] > 0.5 and adjusted["low"] <= 0.5 <= adjusted["high"]


# ----------------------------------------------------------------------------------------------------- Bradley-Terry


def test_against_base_alone_a_strength_is_the_win_rate_in_points() -> None:
    scores = shares(200, 0.64, seed=1)
    found = bradley_terry([(str(row), "run", "base", share) for row, share in enumerate(scores)], "base", seed=0)
    share = sum(scores) / len(scores)
    assert found["run"]["value"] == pytest.approx(400 * math.log10(share / (1 - share)), abs=1e-4)
    assert found["run"]["n"] == 200
    turned = [(str(row), "base", "run", 1 - share) for row, share in enumerate(scores)]
    assert bradley_terry(turned, "base", seed=0) == found


def test_three_players_have_the_strengths_of_the_greatest_likelihood() -> None:
    """A 7:3 B, A 6:4 C, C 6:4 B: at the maximum each one's expected wins are those it has (Ford 1957)."""
    results = [("A", "B", 7), ("A", "C", 6), ("C", "B", 6)]
    played = [
        (f"{one}{other}{game}", one, other, float(game < won)) for one, other, won in results for game in range(10)
    ]
    found = bradley_terry(played, "A", seed=0, draws=50)
    elo = {"A": 0.0, **{name: figure["value"] or 0.0 for name, figure in found.items()}}

    def expected(name: str, other: str) -> float:
        return 10 / (1 + 10 ** ((elo[other] - elo[name]) / 400))

    wins = {"A": 13, "B": 7, "C": 10}
    for name, won in wins.items():
        assert sum(expected(name, other) for other in wins if other != name) == pytest.approx(won, abs=1e-4)
    assert elo["A"] > elo["C"] > elo["B"]
    several = bradley_terry([("one", "B", other, 0.5) for other in ("A", "C")], "A", seed=0, draws=50)
    assert several["B"]["n"] == 1, "prompts, not games"


def test_who_wins_all_has_a_strength() -> None:
    found = bradley_terry([(str(row), "all", "base", 1.0) for row in range(30)], "base", seed=0)
    assert 600 < (found["all"]["value"] or 0) < 800
    assert bradley_terry([], "base", seed=0) == {}


def test_prompts_are_drawn_whole() -> None:
    """Two runs that always score alike are told apart by nothing, so their intervals must be the same."""
    scores = shares(60, 0.6, seed=4)
    played = [(str(row), run, "base", share) for row, share in enumerate(scores) for run in ("one", "two")]
    found = bradley_terry(played, "base", seed=0)
    assert found["one"] == found["two"]
