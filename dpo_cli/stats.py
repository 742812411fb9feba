"""Intervals: every figure that dpo-cli shows about data or a model comes as {value, low, high, n}."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Any, TypedDict

import numpy

Z95 = 1.959963984540054  # the standard normal's 97.5 % point
_CELLS = 500_000  # numbers that a bootstrap has in hand at once: 4 MB, and a statistic's own copies


class Figure(TypedDict):
    """A value with its 95 % interval and how many observations it rests on; None where there is nothing to tell."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def wilson(wins: float, count: float) -> Figure:
    """A share with Wilson's score interval (Wilson 1927).

    centre (p + z²/2n) / (1 + z²/n), half-width z √(p(1-p)/n + z²/4n²) / (1 + z²/n)

    Args:
        wins: successes, 0..count; a tie may count ½.
        count: trials; an effective number of them may be none of the integers, and `n` is then rounded.
    """
    if count == 0:
        return _figure(math.nan, None, None, 0)
    share, z2 = wins / count, Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return _figure(share, max(0.0, centre - half), min(1.0, centre + half), round(count))


def share(wins: Sequence[float], units: Sequence[Hashable]) -> Figure:
    """A share of independent units, each the mean of its observations, with Wilson's interval.

    The pairs of one prompt are not independent: prompts count. Wilson's n is then the effective one (Kish 1965; Korn
    and Graubard 1998), units / r: r is the variance between the units' means over p(1 - p), what it is where the
    observations of a unit are all alike. Both are taken after one unit that won all and one that lost all were added,
    so that n grows beyond the units only where they show it. It is at most the number of observations; with one a unit
    the interval is `wilson`'s own.

    Args:
        wins: 0..1 an observation; a tie may count ½.
        units: what each observation belongs to, equally long.

    Returns:
        `n`: the units.
    """
    means = unit_means(wins, units)
    if len(means) == len(wins):
        return wilson(sum(wins), len(wins))
    count, value = len(means), sum(means) / len(means)
    centre = (sum(means) + 1) / (count + 2)
    variance = (sum(mean * mean for mean in means) + 1) / (count + 2) - centre**2
    effective = min(count * centre * (1 - centre) / variance, float(len(wins)))
    # Few units tell their variance badly: Student's point in the place of the normal one (Korn and Graubard).
    effective = effective * (student(len(wins) - 1) / student(count - 1)) ** 2 if count > 1 else 1.0
    figure = wilson(value * effective, effective)
    return Figure(value=figure["value"], low=figure["low"], high=figure["high"], n=count)


def opposite(figure: Figure) -> Figure:
    """The share of the rest."""
    ends = (figure["value"], figure["high"], figure["low"])
    value, low, high = (None if end is None else round(1 - end, 6) for end in ends)
    return Figure(value=value, low=low, high=high, n=figure["n"])


def win(one: float, other: float) -> float:
    """1 where one is above the other, ½ where they tie, 0 where it is below."""
    return 1.0 if one > other else 0.5 if one == other else 0.0


def unit_means(values: Sequence[float], units: Sequence[Hashable]) -> list[float]:
    """The mean of each unit's values, in the order in which the units come first; NaN where one of its values is."""
    found: dict[Hashable, list[float]] = {}
    for value, unit in zip(values, units, strict=True):
        found.setdefault(unit, []).append(value)
    return [sum(some) / len(some) if some[1:] else some[0] for some in found.values()]


def bootstrap(
    columns: Sequence[Sequence[float]], statistic: Callable[..., Any], seed: int, draws: int = 2000
) -> Figure:
    """Any statistic with its percentile bootstrap interval (Efron 1979), resampling rows.

    Several columns are resampled together, so that a difference of two of them is a paired one. The percentiles are
    not 2.5 and 97.5 but Φ(∓√(n/(n-1)) t), t the 97.5 % point of Student's with n - 1 degrees of freedom: the plain
    ones are too narrow for few rows (the expanded percentile interval, Hesterberg 2015). For a change of a share take
    `share_change`.

    Args:
        columns: equally long, in any unit; a row is one independent unit. A row with a NaN was not measured: it is
            left out and not counted.
        statistic: one float64 array a column -> an array; the last axis is the observations, and goes:
            [n] -> [], [draws, n] -> [draws].
        seed: of the resampling.
        draws: how many resamples.

    Returns:
        `low` and `high` are None for fewer than two rows. A draw whose statistic is no finite number is left out;
        where that of the data is none, so is the value.
    """
    data = numpy.asarray(columns, dtype=numpy.float64)
    data = data[:, ~numpy.isnan(data).any(axis=0)]
    count = data.shape[1]
    value = float(statistic(*data)) if count else math.nan
    if count < 2 or not math.isfinite(value):
        return _figure(value, None, None, count)
    random = numpy.random.default_rng(seed)
    block = max(1, _CELLS // (count * (len(data) + 1)))
    found = [
        statistic(*data[:, random.integers(0, count, (min(block, draws - begin), count))])
        for begin in range(0, draws, block)
    ]
    drawn = numpy.concatenate(found)
    drawn = drawn[numpy.isfinite(drawn)]
    if not drawn.size:
        return _figure(value, None, None, count)
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * student(count - 1))
    low, high = numpy.quantile(drawn, (tail, 1 - tail))
    return _figure(value, float(low), float(high), count)


def bootstrap_mean(values: Sequence[float], seed: int, draws: int = 2000) -> Figure:
    """A mean with its interval; see `bootstrap`."""
    return bootstrap([values], lambda column: column.mean(-1), seed, draws)


def share_change(before: Sequence[float], after: Sequence[float]) -> Figure:
    """The change of a share, after - before, on the same units (Bonett and Price 2012).

    The interval is the normal one after one unit that rose and one that fell were added. A bootstrap of few units that
    changed is too narrow, and of none it is [0, 0], as if that were certain.

    Args:
        before, after: 0..1 a unit (a miss, a win, ½ for a tie), equally long. A unit with a NaN was not measured.

    Returns:
        -1..1.
    """
    changes = [b - a for a, b in zip(before, after, strict=True) if not math.isnan(a + b)]
    count = len(changes)
    if count == 0:
        return _figure(math.nan, None, None, 0)
    centre = sum(changes) / (count + 2)
    half = Z95 * math.sqrt(((sum(c * c for c in changes) + 2) / (count + 2) - centre**2) / (count + 2))
    return _figure(sum(changes) / count, max(-1.0, centre - half), min(1.0, centre + half), count)


# Below six degrees of freedom the expansion is too small.
_STUDENT = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582)


def student(freedom: int) -> float:
    """Student's 97.5 % point, within 0.001 for 1, 2, 3, … degrees of freedom (Abramowitz and Stegun 26.7.5)."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z, v = Z95, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v**power for power, term in enumerate(terms, 1))


def _figure(value: float, low: float | None, high: float | None, count: int) -> Figure:
    """Rounded to 6 places, far below what any interval here can tell; what is no finite number is None."""

    def plain(number: float | None) -> float | None:
        return None if number is None or not math.isfinite(number) else round(number, 6) + 0.0  # no -0.0

    return Figure(value=plain(value), low=plain(low), high=plain(high), n=count)
