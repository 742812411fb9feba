"""Intervals against figures worked out by hand, and what any interval has to satisfy."""

from __future__ import annotations

import random

import pytest
from dpo_cli.stats import Figure, bootstrap_mean, wilson
from hypothesis import given, settings
from hypothesis import strategies as st

steady = settings(derandomize=True, database=None, deadline=None, max_examples=100)


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [
        # z² = 3.841459. 5 of 10: centre .5, half 1.959964 √(.025 + .09603647/10) / 1.3841459 = .263406
        (5, 10, 0.236594, 0.763406),
        # 0 of 10: centre = half = .19207294 / 1.3841459 = .138767
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        # 8 of 10, in many textbooks: .490 to .943
        (8, 10, 0.490162, 0.943318),
        # 81 of 263 (Newcombe 1998, table I, method 3): .2553 to .3662
        (81, 263, 0.255288, 0.366210),
        # one tie of one: p = ½
        (0.5, 1, 0.054621, 0.945379),
    ],
)
def test_wilson_by_hand(wins: float, count: int, low: float, high: float) -> None:
    found = wilson(wins, count)
    assert found["n"] == count
    assert found["value"] == pytest.approx(wins / count, abs=1e-6)
    assert found["low"] == pytest.approx(low, abs=2e-6)
    assert found["high"] == pytest.approx(high, abs=2e-6)


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


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_wilson_narrows_with_more_trials(share: float) -> None:
    widths = [high - low for low, _, high in (bounds(wilson(share * n, n)) for n in (10, 40, 160, 640))]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0] / 3


def test_nothing_measured_is_told_as_nothing() -> None:
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    assert wilson(0, 0) == nothing
    assert bootstrap_mean([], seed=1) == nothing


def test_bootstrap_is_the_same_for_the_same_seed_only() -> None:
    rng = random.Random(7)
    values = [rng.gauss(0, 1) for _ in range(60)]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_bootstrap_of_one_value_all_over_has_no_width() -> None:
    assert bootstrap_mean([0.25] * 20, seed=3) == {"value": 0.25, "low": 0.25, "high": 0.25, "n": 20}


def test_bootstrap_interval_has_the_normal_theory_width() -> None:
    """For 400 values of deviation 2, 95 % lies within 1.96 · 2 / √400 = 0.196 of the mean."""
    rng = random.Random(11)
    low, value, high = bounds(bootstrap_mean([rng.gauss(5, 2) for _ in range(400)], seed=0))
    assert low < value < high
    assert value == pytest.approx(5, abs=0.4)
    assert (high - low) / 2 == pytest.approx(0.196, rel=0.15)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    """300 skewed samples of 40; by theory about 93 % of the intervals hold the mean, with a deviation of 1.5 %."""
    rng = random.Random(5)
    hits = 0
    for seed in range(300):
        low, _, high = bounds(bootstrap_mean([rng.expovariate(1.0) for _ in range(40)], seed=seed, draws=300))
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 300 <= 0.975
