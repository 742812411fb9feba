"""Intervals: every figure that dpo-cli shows about data or a model comes as {value, low, high, n}."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

Z95 = 1.959963984540054  # the standard normal's 97.5 % point


class Figure(TypedDict):
    """A value with its 95 % interval and how many observations it rests on; None where there is nothing to tell."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def wilson(wins: float, count: int) -> Figure:
    """A share with Wilson's score interval (Wilson 1927).

    centre (p + z²/2n) / (1 + z²/n), half-width z √(p(1-p)/n + z²/4n²) / (1 + z²/n)

    Args:
        wins: successes, 0..count; a tie may count ½.
        count: trials.
    """
    if count == 0:
        return Figure(value=None, low=None, high=None, n=0)
    share, z2 = wins / count, Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return _figure(share, max(0.0, centre - half), min(1.0, centre + half), count)


def bootstrap_mean(values: Sequence[float], seed: int, draws: int = 2000) -> Figure:
    """A mean with its percentile bootstrap interval (Efron 1979), resampling observations.

    Args:
        values: one per independent unit, in any unit.
        seed: of the resampling.
        draws: how many resamples.
    """
    import numpy

    if not values:
        return Figure(value=None, low=None, high=None, n=0)
    data = numpy.asarray(values, dtype=numpy.float64)
    random = numpy.random.default_rng(seed)
    means = [float(data[random.integers(0, len(data), len(data))].mean()) for _ in range(draws)]
    low, high = numpy.quantile(means, [0.025, 0.975])
    return _figure(float(data.mean()), float(low), float(high), len(data))


def _figure(value: float, low: float, high: float, count: int) -> Figure:
    """Rounded to 6 places, far below what any interval here can tell."""
    return Figure(value=round(value, 6), low=round(low, 6), high=round(high, 6), n=count)
