"""Intervals against figures worked out by hand, scipy and statsmodels, and how often they hold the truth."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from dpo_cli.stats import (
    Figure,
    bootstrap,
    bootstrap_mean,
    share,
    share_change,
    student,
    unit_means,
    wilson,
)
from hypothesis import given, settings
from hypothesis import strategies as st

steady = settings(derandomize=True, database=None, deadline=None, max_examples=100)


def bounds(figure: Figure) -> tuple[float, float, float]:
    low, value, high = figure["low"], figure["value"], figure["high"]
    assert low is not None and value is not None and high is not None
    return low, value, high


@steady
@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilson_holds_its_value_and_mirrors(count: int, share: float) -> None:
    wins = round(share * count * 2) / 2  # ties count ½
    low, value, high = bounds(wilson(wins, count))
    assert 0 <= low <= value <= high <= 1
    assert low < high
    mirrored_low, _, mirrored_high = bounds(wilson(count - wins, count))
    assert (1 - mirrored_high, 1 - mirrored_low) == pytest.approx((low, high), abs=3e-6)


def test_nothing_measured_is_told_as_nothing() -> None:
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    assert wilson(0, 0) == nothing
    assert bootstrap_mean([], seed=1) == nothing
    assert bootstrap([[], []], mean_change, seed=1) == nothing
    assert share_change([], []) == nothing
    assert bootstrap_mean([math.nan, math.nan], seed=1) == nothing


def test_bootstrap_is_the_same_for_the_same_seed_only() -> None:
    rng = random.Random(7)
    values = [rng.gauss(0, 1) for _ in range(60)]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_bootstrap_of_one_value_all_over_has_no_width() -> None:
    assert bootstrap_mean([0.25] * 20, seed=3) == {"value": 0.25, "low": 0.25, "high": 0.25, "n": 20}


def test_one_row_has_a_value_and_no_interval() -> None:
    assert bootstrap_mean([1.5], seed=1) == {"value": 1.5, "low": None, "high": None, "n": 1}


def test_what_was_not_measured_is_left_out_in_whole_rows() -> None:
    """The second row lacks one of its two figures, so neither counts."""
    whole = bootstrap([[1.0, 2.0, 4.0], [2.0, 5.0, 3.0]], mean_change, seed=1)
    assert bootstrap([[1.0, math.nan, 2.0, 4.0], [2.0, 9.0, 5.0, 3.0]], mean_change, seed=1) == whole
    assert whole["n"] == 3 and whole["value"] == pytest.approx(1)
    assert share_change([1, math.nan, 0], [1, 1, 1]) == share_change([1, 0], [1, 1])


def test_a_statistic_that_is_no_number_is_told_as_none() -> None:
    def ratio(one: Any, other: Any) -> Any:
        return one.sum(-1) / other.sum(-1)

    with pytest.warns(RuntimeWarning):  # numpy's, of the division
        nothing = bootstrap([[1.0, 2.0], [0.0, 0.0]], ratio, seed=1)
        some = bootstrap([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]], ratio, seed=1)
    assert nothing == {"value": None, "low": None, "high": None, "n": 2}
    assert some["value"] == 6  # and the draws without the third row are left out
    assert some["high"] is not None and math.isfinite(some["high"])


def test_figures_are_json_that_any_reader_takes() -> None:
    """No NaN, no Infinity, no numpy number and no minus zero."""
    figures = [bootstrap_mean([math.inf, 1.0], 1), bootstrap_mean([-1e-9, -1e-9], 1), share_change([1, 0], [0, 1])]
    text = json.dumps(figures, allow_nan=False)
    assert "-0.0" not in text


# ----------------------------------------------------------------------------------------------------------- oracles


def mean(column: Any) -> Any:
    return column.mean(-1)


def mean_change(before: Any, after: Any) -> Any:
    return (after - before).mean(-1)


def quantile(share: float) -> Callable[[Any], Any]:
    import numpy

    return lambda column: numpy.quantile(column, share, axis=-1, method="median_unbiased")


@pytest.mark.parametrize(
    ("wins", "count"), [(0, 7), (1, 7), (0.5, 1), (3.5, 9), (123, 123), (250, 500), (499.5, 500), (7, 10000)]
)
def test_wilson_is_that_of_statsmodels(wins: float, count: int) -> None:
    from statsmodels.stats.proportion import proportion_confint

    low, value, high = bounds(wilson(wins, count))
    assert (low, high) == pytest.approx(proportion_confint(wins, count, method="wilson"), abs=1e-6)
    assert value == pytest.approx(wins / count, abs=1e-6)


@pytest.mark.parametrize(
    ("statistic", "columns"),
    [(mean, 1), (quantile(0.5), 1), (quantile(0.1), 1), (mean_change, 2)],
    ids=["mean", "median", "p10", "paired difference"],
)
@pytest.mark.parametrize("count", [8, 60, 400])
def test_bootstrap_is_that_of_scipy(statistic: Callable[..., Any], columns: int, count: int) -> None:
    """Both draw at random, so within a tenth of the interval's width; scipy is told the wider level for few rows."""
    import numpy
    from scipy import stats

    random = numpy.random.default_rng(count)
    shared = random.normal(size=count)
    data = [shared + random.exponential(size=count) for _ in range(columns)]
    low, value, high = bounds(bootstrap([list(column) for column in data], statistic, seed=1, draws=10_000))
    tail = stats.norm.sf(math.sqrt(count / (count - 1)) * stats.t.ppf(0.975, count - 1))
    theirs = stats.bootstrap(
        data,
        lambda *columns, axis: statistic(*columns),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=numpy.random.default_rng(2),
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=(high - low) / 10)
    assert value == pytest.approx(float(statistic(*data)), abs=1e-6)


def test_bootstrap_does_not_depend_on_how_its_draws_are_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    columns = [[rng.gauss(0, 1) for _ in range(101)] for _ in range(2)]
    at_once = bootstrap(columns, mean_change, seed=4)
    monkeypatch.setattr("dpo_cli.stats._CELLS", 1000)
    assert bootstrap(columns, mean_change, seed=4) == at_once


@pytest.mark.parametrize(
    ("rose", "fell", "count", "low", "high"),
    [
        # (0 + 1 - 0 - 1) / 34 = 0; half 1.959964 √(2/34 / 34) = .081523
        (0, 0, 32, -0.081523, 0.081523),
        # 6/26; half 1.959964 √((10/26 - .053254) / 26) = .221264
        (7, 1, 24, 0.009505, 0.452033),
    ],
)
def test_share_change_by_hand(rose: int, fell: int, count: int, low: float, high: float) -> None:
    before = [0.0] * rose + [1.0] * fell + [1.0] * (count - rose - fell)
    after = [1.0] * rose + [0.0] * fell + [1.0] * (count - rose - fell)
    assert bounds(share_change(before, after)) == pytest.approx((low, (rose - fell) / count, high), abs=2e-6)


@steady
@given(st.lists(st.sampled_from([(a, b) for a in (0, 0.5, 1) for b in (0, 0.5, 1)]), min_size=1, max_size=300))
def test_share_change_holds_its_value_and_mirrors(pairs: list[tuple[float, float]]) -> None:
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    low, value, high = bounds(share_change(before, after))
    assert -1 <= low <= value <= high <= 1
    assert low < high
    mirrored_low, _, mirrored_high = bounds(share_change(after, before))
    assert (-mirrored_high, -mirrored_low) == pytest.approx((low, high), abs=2e-6)


# ---------------------------------------------------------------------------------------------------------- coverage
# An interval of 95 % has to hold the truth in about 95 % of samples: 92 % to 98 % are let through, and with 1,500
# samples chance alone moves the share by ±1 %.

SAMPLES = 1500


def coverage(figures: list[Figure], truth: float) -> float:
    held = [low <= truth <= high for low, _, high in map(bounds, figures)]
    return sum(held) / len(held)


def test_bootstrap_of_a_small_group_is_not_too_sure() -> None:
    """The plain percentiles hold the mean of 12 normal figures in 90 % of samples only."""
    import numpy

    samples = numpy.random.default_rng(12).normal(size=(SAMPLES, 12))
    figures = [bootstrap_mean(list(row), seed=row_number, draws=400) for row_number, row in enumerate(samples)]
    assert 0.92 <= coverage(figures, 0.0) <= 0.98


@pytest.mark.parametrize(("rises", "falls"), [(0.2, 0.1), (0.3, 0.05), (0.08, 0.08)])
def test_share_change_holds_the_truth_as_often_as_it_says(rises: float, falls: float) -> None:
    import numpy

    chance = numpy.random.default_rng(60).random((SAMPLES, 60))
    before = numpy.where(chance < rises, 0.0, 1.0)
    after = numpy.where((rises <= chance) & (chance < rises + falls), 0.0, 1.0)
    figures = [share_change(*rows) for rows in zip(before.tolist(), after.tolist(), strict=True)]
    assert 0.92 <= coverage(figures, rises - falls) <= 0.98


# ----------------------------------------------------------------------------------------------- several pairs a prompt


def test_students_point_is_scipys() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    freedoms = [*range(1, 60), 100, 1000, 10_000]
    assert [student(one) for one in freedoms] == pytest.approx(
        [float(scipy_stats.t.ppf(0.975, one)) for one in freedoms], abs=1e-3
    )
    assert [round(student(one), 2) for one in (1, 2, 3)] == [12.71, 4.30, 3.18]


def test_means_of_units_by_hand() -> None:
    assert unit_means([1, 0, 0.5, 1, math.nan], ["a", "b", "a", "a", "c"])[:2] == [2.5 / 3, 0]
    assert math.isnan(unit_means([1, math.nan, 1], "aab")[0])
    assert unit_means([], []) == []


@steady
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=40))
def test_one_pair_a_prompt_is_wilson(wins: list[float]) -> None:
    assert share(wins, list(range(len(wins)))) == wilson(sum(wins), len(wins))


@steady
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=40), st.integers(2, 6))
def test_pairs_that_are_all_alike_are_worth_one(wins: list[float], times: int) -> None:
    """As often as it is repeated, a pair says no more; a little less, for few prompts tell their variance badly."""
    once, repeated = wilson(sum(wins), len(wins)), share(wins * times, list(range(len(wins))) * times)
    assert (repeated["n"], repeated["value"]) == (once["n"], once["value"])
    assert repeated["low"] <= once["low"] and repeated["high"] >= once["high"]  # type: ignore[operator]


def test_pairs_that_differ_in_every_prompt_are_worth_no_more_than_pairs() -> None:
    found, plain = share([1.0, 0.0] * 100, [number // 2 for number in range(200)]), wilson(100, 200)
    assert found["low"] <= plain["low"] and found["high"] >= plain["high"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("prompts", "pairs", "law"),
    [(99, 6, (3, 2)), (99, 6, (30, 20)), (40, 6, (3, 2)), (99, 1, (3, 2)), (200, 6, (0.3, 0.2)), (60, 3, (3, 1))],
)
def test_shares_of_clustered_pairs_hold_the_truth(prompts: int, pairs: int, law: tuple[float, float]) -> None:
    """Prompts differ in how hard they are; counted as pairs, the first interval held the truth in 85% of cases."""
    numpy = pytest.importorskip("numpy")
    random_numbers, truth, held, draws = numpy.random.default_rng(5), law[0] / sum(law), 0, 2000
    units = numpy.repeat(numpy.arange(prompts), pairs).tolist()
    for _ in range(draws):
        hard = random_numbers.beta(*law, prompts)[:, None]
        wins = (random_numbers.random((prompts, pairs)) < hard).astype(float).ravel().tolist()
        found = share(wins, units)
        held += found["low"] <= truth <= found["high"]  # type: ignore[operator]
    assert 0.93 <= held / draws <= 0.97
