"""Log-probabilities of the held-out answers under the tuned model and its reference, and what follows from them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from dpo_cli import models
from dpo_cli.errors import DpoError
from dpo_cli.inference import answer_logps, encode
from dpo_cli.records import Pair
from dpo_cli.stats import Figure, bootstrap_mean, bootstrap_quantile, share, share_change, unit_means, win

BINS = 24
LEAST_FOR_QUARTILES = 8


@dataclass(frozen=True)
class Scored:
    """One held-out pair: log-probabilities in nats, summed over the answer's tokens with its end token.

    `policy` is the tuned model, `reference` what it started from: the base alone, or with `model.adapter`. `margin` is
    the data's own, score_chosen - score_rejected in 0..1; None where the source has no scores. Pairs of one `prompt`
    share its hash.
    """

    id: str
    language: str
    source: str
    chosen_tokens: int
    rejected_tokens: int
    policy_chosen: float
    policy_rejected: float
    reference_chosen: float
    reference_rejected: float
    margin: float | None = None
    prompt: str = ""

    @property
    def unit(self) -> str:
        """What figures count: the prompt, of which there may be several pairs."""
        return self.prompt or self.id

    @property
    def chosen_drift(self) -> float:
        """log π(chosen) - log π_ref(chosen): how much likelier the chosen answer became, in nats."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_drift(self) -> float:
        return self.policy_rejected - self.reference_rejected


def score_pairs(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], max_length: int, batch_size: int
) -> list[Scored]:
    """Every pair under the tuned model and under its reference, one base in memory.

    A pair whose prompt alone fills `max_length` has no answer left to score and is left out, as TRL leaves it out.

    Args:
        batch_size: answers at once, at most.

    Raises:
        DpoError: a log-probability is no finite number, or nothing fits into memory.
    """
    encoded = [(pair, *encode(tokenizer, pair, max_length)) for pair in pairs]
    encoded = [(pair, one, other) for pair, one, other in encoded if max(one.start, other.start) < max_length]
    rows = [row for _, *both in encoded for row in both]
    policy = answer_logps(model, rows, batch_size)
    with models.as_reference(model):
        reference = answer_logps(model, rows, batch_size)
    scored = []
    for index, (pair, *_) in enumerate(encoded):
        chosen, rejected = 2 * index, 2 * index + 1
        sums = [sum(logps[row]) for logps in (policy, reference) for row in (chosen, rejected)]
        if not all(map(math.isfinite, sums)):
            raise DpoError(
                "the model gives a held-out answer a log-probability that is no number",
                where=f"pair {pair.id}",
                hint="model.dtype: bfloat16 or float32 where it is float16; else the adapter's weights are broken",
            )
        scored.append(
            Scored(
                id=pair.id,
                language=pair.language,
                source=pair.source,
                chosen_tokens=len(policy[chosen]),
                rejected_tokens=len(policy[rejected]),
                policy_chosen=sums[0],
                policy_rejected=sums[1],
                reference_chosen=sums[2],
                reference_rejected=sums[3],
                margin=pair.margin,
                prompt=hashlib.sha256(json.dumps(pair.prompt).encode()).hexdigest()[:16],
            )
        )
    return scored


# ----------------------------------------------------------------------------------------------------------- figures


def pair_metrics(scored: Sequence[Scored], beta: float, seed: int) -> dict[str, Figure]:
    """The `pairs` figures of `eval/metrics.json`. In shares a tie counts ½, so an untrained adapter stands at 0.5.

    Where a prompt has several pairs (`data.pairs.pick: all`), each prompt counts once, with the mean of its pairs.

    reward_accuracy: share of pairs whose implicit reward β (log π - log π_ref) is higher for chosen.
    reward_accuracy_per_token: the same with rewards divided by length.
    margin, margin_median, margin_p10, margin_p90: of β (chosen drift - rejected drift), in nats.
    chosen_drift, rejected_drift: log π - log π_ref, in nats; `_per_token`: divided by the answer's length.
    ranking_accuracy_base, ranking_accuracy_tuned: share of pairs whose chosen answer has the higher mean
        log-probability per token; base is the reference.
    ranking_accuracy_change: tuned - base on the same pairs, -1..1.
    longer_wins: share of pairs whose chosen answer has more tokens: what a model gets that only learned length.
    """
    chosen_length = [max(pair.chosen_tokens, 1) for pair in scored]
    rejected_length = [max(pair.rejected_tokens, 1) for pair in scored]
    chosen = [pair.chosen_drift for pair in scored]
    rejected = [pair.rejected_drift for pair in scored]
    chosen_per_token, rejected_per_token = _divide(chosen, chosen_length), _divide(rejected, rejected_length)
    margins = _margins(scored, beta)
    base = _wins(
        _divide([pair.reference_chosen for pair in scored], chosen_length),
        _divide([pair.reference_rejected for pair in scored], rejected_length),
    )
    tuned = _wins(
        _divide([pair.policy_chosen for pair in scored], chosen_length),
        _divide([pair.policy_rejected for pair in scored], rejected_length),
    )
    units = [pair.unit for pair in scored]

    def mean(values: Sequence[float]) -> Figure:
        return bootstrap_mean(unit_means(values, units), seed)

    def quantile(at: float) -> Figure:
        return bootstrap_quantile(unit_means(margins, units), at, seed)

    return {
        "reward_accuracy": share(_wins(chosen, rejected), units),
        "reward_accuracy_per_token": share(_wins(chosen_per_token, rejected_per_token), units),
        "margin": mean(margins),
        "margin_median": quantile(0.5),
        "margin_p10": quantile(0.1),
        "margin_p90": quantile(0.9),
        "chosen_drift": mean(chosen),
        "rejected_drift": mean(rejected),
        "chosen_drift_per_token": mean(chosen_per_token),
        "rejected_drift_per_token": mean(rejected_per_token),
        "ranking_accuracy_base": share(base, units),
        "ranking_accuracy_tuned": share(tuned, units),
        "ranking_accuracy_change": share_change(unit_means(base, units), unit_means(tuned, units)),
        "longer_wins": _longer_wins(scored),
    }


def grouped_metrics(scored: Sequence[Scored], beta: float, seed: int) -> dict[str, Any]:
    """`pair_metrics` of all pairs and of their groups, under the names they have in `eval/metrics.json`.

    Returns:
        pairs: of all.
        languages, sources: name -> {"pairs"}.
        margin_quartiles, length_quartiles: four groups, from low to high, by the data's own margin (0..1) and by the
            mean tokens of the two answers: {"from", "to": least and greatest value inside, "pairs"}. See `_quartiles`.
        histogram: of the reward margins in nats. See `histogram`.
    """

    def figures(some: Sequence[Scored]) -> dict[str, Figure]:
        return pair_metrics(some, beta, seed)

    def by(name: Callable[[Scored], str]) -> dict[str, Any]:
        names = sorted({name(pair) for pair in scored})
        return {one: {"pairs": figures([pair for pair in scored if name(pair) == one])} for one in names}

    def quartiles(values: Iterable[float | None]) -> list[dict[str, Any]]:
        return [{"from": low, "to": high, "pairs": figures(some)} for low, high, some in _quartiles(scored, values)]

    return {
        "pairs": figures(scored),
        "languages": by(lambda pair: pair.language),
        "sources": by(lambda pair: pair.source),
        "margin_quartiles": quartiles(pair.margin for pair in scored),
        "length_quartiles": quartiles((pair.chosen_tokens + pair.rejected_tokens) / 2 for pair in scored),
        "histogram": histogram(_margins(scored, beta)),
    }


def baselines(scored: Sequence[Scored], prepared: Mapping[str, Any]) -> dict[str, Any]:
    """What can be had without a model, to set beside its accuracy.

    Args:
        scored: the held-out pairs.
        prepared: `data/report.json`.

    Returns:
        longer_wins: share of held-out pairs whose longer answer, in tokens, was chosen.
        majority: the same for a bet that goes by language: on the longer or on the shorter answer, whichever was
            chosen more often in the training pairs (those count characters); ½ where they say neither.
        shortcut: the best rule of thumb of the audit, with its figure on the *training* pairs and its `name`; None
            where none was measured. A rule that is wrong more often than right counts as its opposite, "not <rule>",
            but for the model that usually wins, whose losing is no rule. Best by the interval's lower end, so that no
            rule wins by a handful of pairs.
    """
    learnt = prepared["length"]["languages"]
    wins = []
    for pair, longer in zip(scored, _longer(scored), strict=True):
        known = learnt.get(pair.language, {}).get("value")
        wins.append(0.5 if known is None or known == 0.5 else longer if known > 0.5 else 1 - longer)
    return {
        "longer_wins": _longer_wins(scored),
        "majority": share(wins, [pair.unit for pair in scored]),
        "shortcut": _shortcut(prepared),
    }


def _shortcut(prepared: Mapping[str, Any]) -> dict[str, Any] | None:
    rules = []
    for name, figure in prepared["shortcuts"].items():
        value, low, high, count = (figure[key] for key in ("value", "low", "high", "n"))
        if value is None:
            continue
        if value < 0.5 and name != "model":
            name, value, low, high = f"not {name}", round(1 - value, 6), round(1 - high, 6), round(1 - low, 6)
        rules.append({"name": name, "value": value, "low": low, "high": high, "n": count})
    return max(rules, key=lambda rule: rule["low"], default=None)


def _quartiles(scored: Sequence[Scored], values: Iterable[float | None]) -> list[tuple[float, float, list[Scored]]]:
    """(least value, greatest value, pairs) of the four quarters by value, ascending.

    Equal values stay together, so that no two groups overlap: where many are equal there are fewer groups than four.
    None at all where fewer than 8 pairs have a value, or all have the same one.
    """
    known = [(value, pair) for value, pair in zip(values, scored, strict=True) if value is not None]
    if len(known) < LEAST_FOR_QUARTILES:
        return []
    numbers = [value for value, _ in known]
    place = numpy.searchsorted(numpy.quantile(numbers, (0.25, 0.5, 0.75)), numbers, side="left")
    groups = [[one for one, where in zip(known, place, strict=True) if where == quarter] for quarter in range(4)]
    groups = [group for group in groups if group]
    if len(groups) < 2:
        return []
    return [
        (round(min(value for value, _ in group), 6), round(max(value for value, _ in group), 6), [p for _, p in group])
        for group in groups
    ]


def histogram(margins: Sequence[float]) -> dict[str, Any]:
    """24 bins of equal width over all margins and 0, and how many are above 0.

    One edge is 0 exactly, so that no bin holds both right and wrong pairs; ties stand right of it.

    Returns:
        edges: 25, in nats; counts: 24, a value at an edge counts above it; right: margins above 0.
    """
    low, high = min([*margins, 0.0]), max([*margins, 0.0])
    below = round(BINS * -low / (high - low)) if high > low else BINS // 2
    # Bins for the wrong pairs and the others; one at least of each where there are any, and a tie is an other.
    below = min(max(below, low < 0), BINS - any(margin >= 0 for margin in margins))
    width = max(-low / below if below else 0.0, high / (BINS - below) if below < BINS else 0.0) or 1.0
    edges = width * (numpy.arange(BINS + 1) - below)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # rounding must not leave the extremes outside
    counts, _ = numpy.histogram(margins, edges)
    return {
        "edges": [float(f"{edge:.6g}") for edge in edges],
        "counts": [int(count) for count in counts],
        "right": sum(margin > 0 for margin in margins),
    }


def _margins(scored: Sequence[Scored], beta: float) -> list[float]:
    return [beta * (pair.chosen_drift - pair.rejected_drift) for pair in scored]


def _longer(scored: Sequence[Scored]) -> list[float]:
    """1 where the longer answer was chosen, 0 where the shorter one, ½ where they are equally long."""
    return _wins([pair.chosen_tokens for pair in scored], [pair.rejected_tokens for pair in scored])


def _longer_wins(scored: Sequence[Scored]) -> Figure:
    return share(_longer(scored), [pair.unit for pair in scored])


def _wins(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [win(a, b) for a, b in zip(one, other, strict=True)]


def _divide(values: Sequence[float], lengths: Sequence[int]) -> list[float]:
    return [value / length for value, length in zip(values, lengths, strict=True)]
