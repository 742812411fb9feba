"""From ratings to one score in 0..1 per answer, and from scored answers to the pairs that are compared."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from dpo_cli.prepare.text import hash64
from dpo_cli.recipe import METRICS, PairPolicy
from dpo_cli.records import Candidate, CandidateSet

# (rating name, metric it feeds, lowest, highest value) of a data set. Scales are declared, for guessing them from a
# value would turn a 1 on a scale of 1..5 into the best score there is.
Scales = tuple[tuple[str, str, float, float], ...]
Weights = tuple[tuple[str, float], ...]
ULTRAFEEDBACK: Scales = (
    ("helpfulness", "helpfulness", 1, 5),
    ("honesty", "correctness", 1, 5),
    ("truthfulness", "correctness", 1, 5),
    ("instruction_following", "coherence", 1, 5),  # the nearest of the five: an answer to the point
)
HELPSTEER2: Scales = tuple((metric, metric, 0, 4) for metric in METRICS)
OVERALL_1_TO_10, MEAN_1_TO_5, UNIT = (1, 10), (1, 5), (0, 1)

DECIMALS = 6  # scores equal but for the order of a sum are equal


def rating(value: Any, low: float, high: float) -> float | None:
    """`(value - low) / (high - low)`; None where it is missing, N/A or off the scale (0 would be a verdict).

    A list (HelpSteer2's raw annotations) counts as its mean, a list of lists as nothing.
    """
    several = [number(one) for one in (value if isinstance(value, list) else [value])]
    units = [(one - low) / (high - low) for one in several if one is not None and low <= one <= high]
    return sum(units) / len(units) if units and len(units) == len(several) else None


def spread(value: Any) -> float | None:
    """How far several ratings of one thing are apart; None where there are not several numbers."""
    several = [number(one) for one in value] if isinstance(value, list) else []
    known = [one for one in several if one is not None]
    return max(known) - min(known) if len(known) > 1 else None


def number(value: Any) -> float | None:
    """A finite number, also one written as text, in per cent or with a decimal comma; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        written = value.rstrip().replace(",", ".") if isinstance(value, str) else ""
        found = float(written.rstrip("%％")) / 100 if written.endswith(("%", "％")) else float(written or value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def score(ratings: Mapping[str, Any], scales: Scales, weights: Weights) -> float | None:
    """The weighted mean of the metrics that an answer has, in 0..1.

    A metric is the mean of the ratings that feed it; weights are renormalised over the metrics present. None where
    neither correctness nor helpfulness is known, or nothing known weighs anything.
    """
    values = [ratings.get(scale[0]) for scale in scales]
    if all(type(value) is str for value in values):  # as in UltraFeedback, where few combinations make up all rows
        return _score_of_texts(tuple(values), scales, weights)
    return _score(values, scales, weights)


def _score(values: Sequence[Any], scales: Scales, weights: Weights) -> float | None:
    known: dict[str, list[float]] = defaultdict(list)
    for value, (_, metric, low, high) in zip(values, scales, strict=True):
        unit = rating(value, low, high)
        if unit is not None:
            known[metric].append(unit)
    if "correctness" not in known and "helpfulness" not in known:
        return None
    present = [(weight, known[metric]) for metric, weight in weights if metric in known]
    weight = sum(weight for weight, _ in present)
    if not weight:
        return None
    return round(sum(weight * sum(units) / len(units) for weight, units in present) / weight, DECIMALS)


_score_of_texts = lru_cache(maxsize=4096)(_score)


def settle_labels(item: CandidateSet) -> Counter[str]:
    """Drop answers that are called both good and bad, and all but one of equal ones; return how many, by reason."""
    labels: dict[str, set[float | None]] = defaultdict(set)
    for candidate in item.candidates:
        labels[candidate.text.strip()].add(candidate.score)
    dropped, kept = Counter[str](), dict[str, Candidate]()
    for candidate in item.candidates:
        text = candidate.text.strip()
        if len(labels[text]) > 1:
            dropped["identical"] += 1
        elif kept.setdefault(text, candidate) is not candidate:
            dropped["duplicate"] += 1
    item.candidates = list(kept.values())
    return dropped


def ranking(item: CandidateSet) -> list[int]:
    """The candidates, best first: as the source ranks them, else by score, then the shorter text, then the text.

    Of equals the shorter one stands first, so ties never favour length, neither at the top nor at the bottom.
    """
    if item.ranked:
        return list(range(len(item.candidates)))

    places = sorted((-(one.score or 0.0), len(one.text), one.text, index) for index, one in enumerate(item.candidates))
    return [index for *_, index in places]


def margin(item: CandidateSet, chosen: int, rejected: int) -> float | None:
    """Score difference in 0..1, None where the source has no scores."""
    high, low = item.candidates[chosen].score, item.candidates[rejected].score
    return None if high is None or low is None else round(high - low, DECIMALS)


def pick(item: CandidateSet, policy: PairPolicy, seed: int, key: int) -> list[tuple[int, int]]:
    """Which candidates meet, as (chosen, rejected) indexes; two candidates or more.

    `best_random` draws among those scored below the best, by a hash of `seed`, the prompt's `key` and the text.
    """
    order = ranking(item)
    if policy.pick == "all":
        return [(better, worse) for place, better in enumerate(order) for worse in order[place + 1 :]]
    if policy.pick == "best_random":
        lower = [other for other in order[1:] if margin(item, order[0], other) != 0] or order[1:]
        return [(order[0], min(lower, key=lambda other: (hash64(seed, key, item.candidates[other].text), other)))]
    return [(order[0], order[-1])]
