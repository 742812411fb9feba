"""Scores of answers by `data.rater`, in place of those that a source gives or has not."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.judging.ratings import ASPECTS, ServerRater
from dpo_cli.prepare import scoring
from dpo_cli.prepare.audit import quantiles
from dpo_cli.progress import Step
from dpo_cli.published import without_paths
from dpo_cli.recipe import OpenAIRater, Recipe
from dpo_cli.records import CandidateSet, Message, write_jsonl
from dpo_cli.stats import wilson
from dpo_cli.store import Store

CHUNK = 256  # prompts whose answers are rated at once: memory holds no more of them

Talks = Sequence[tuple[list[Message], str]]  # a prompt and one answer to it
Given = dict[str, float]  # what a rater gives an answer: its reward, or its ratings by aspect


class _ByServer:
    """Ratings on four aspects, mapped to 0..1 and weighed as those of UltraFeedback; NaN where they are missing."""

    def __init__(self, settings: OpenAIRater, store: Store, weights: scoring.Weights) -> None:
        self._rater, self._weights = ServerRater(settings, store), weights
        self._given: dict[str, list[float]] = {name: [] for name in ASPECTS}
        self._missing = Counter[str]()

    def rate(self, talks: Talks, advance: Callable[[int], None]) -> list[Given]:
        ratings = self._rater.ratings(talks, advance)
        for one in ratings:
            self._missing.update(name for name in ASPECTS if name not in one)
            for name, value in one.items():
                self._given[name].append(value)
        return ratings

    def value(self, given: Given) -> float:
        score = scoring.score(given, scoring.ULTRAFEEDBACK, self._weights)
        return math.nan if score is None else score

    def figures(self, values: array[float]) -> dict[str, Any]:
        aspects = {
            name: {"mean": sum(several) / max(len(several), 1), "missing": self._missing[name]}
            for name, several in self._given.items()
        }
        return {"aspects": aspects, "tokens": self._rater.tokens}


class _ByRewardModel:
    """Rewards on a scale of their own, mapped to 0..1 by their rank among all answers of the run."""

    def __init__(self, settings: Any, store: Store) -> None:
        from dpo_cli.judging.reward_model import RewardModel  # here, for it imports torch

        self._model = RewardModel(settings, store)
        self._cut = 0

    def rate(self, talks: Talks, advance: Callable[[int], None]) -> list[Given]:
        scores = self._model.scores(talks, advance)
        self._cut += sum(one is not None and one.cut for one in scores)
        return [{} if one is None or not math.isfinite(one.value) else {"reward": one.value} for one in scores]

    def value(self, given: Given) -> float:
        return given.get("reward", math.nan)

    def figures(self, values: array[float]) -> dict[str, Any]:
        known = [value for value in values if not math.isnan(value)]
        return {"reward": quantiles(known), "cut": self._cut}


def ranks(values: Sequence[float]) -> array[float]:
    """Return each value's rank among all of them in 0..1; equal ones share their mean rank, NaN stays NaN."""
    found = np.array(values, dtype=np.float64)
    known = ~np.isnan(found)
    _, where, counts = np.unique(found[known], return_inverse=True, return_counts=True)
    middle = (np.cumsum(counts) - (counts + 1) / 2)[where]
    found[known] = np.round(middle / (len(middle) - 1), scoring.DECIMALS) if len(middle) > 1 else 0.5
    return array("d", found)


def rate(
    recipe: Recipe, sets: Iterator[CandidateSet], total: int, store: Store, written: Path, quiet: bool
) -> tuple[array[float], dict[str, Any]]:
    """Rate every answer of the sets by `data.rater`.

    Args:
        total: of the answers.
        store: what it gave each answer; nothing in it is asked again.
        written: the file for all answers with what they were given, JSONL, a prompt a line.

    Returns:
        The scores of all answers in the order they came, 0..1 and NaN where there is none; and figures for the report.

    Raises:
        DpoError: the rater can't be reached or used at all. One answer that it can't rate has no score.
    """
    settings = recipe.data.rater
    assert settings is not None
    weights = tuple(recipe.data.score_weights.model_dump().items())
    rater: Any
    if isinstance(settings, OpenAIRater):
        rater, name = _ByServer(settings, store, weights), settings.model
    else:
        rater, name = _ByRewardModel(settings, store), settings.id
    values, longer = array("d"), Counter[bool]()

    def rows() -> Iterator[dict[str, Any]]:
        while chunk := list(islice(sets, CHUNK)):
            talks = [(item.prompt, one.text) for item in chunk for one in item.candidates]
            given = iter(rater.rate(talks, step.advance))
            for item in chunk:
                answers = [(one, next(given)) for one in item.candidates]
                own = [rater.value(what) for _, what in answers]
                values.extend(own)
                _count_longer([(value, len(one.text)) for value, (one, _) in zip(own, answers, strict=True)], longer)
                yield {
                    "source": item.source, "prompt": item.prompt, "dropped": item.lost,
                    "answers": [{"text": one.text, "model": one.model, **what} for one, what in answers],
                }  # fmt: skip

    with Step("rating the answers", quiet=quiet, total=total) as step:
        write_jsonl(written, rows())
    figures = {
        "by": {"kind": settings.kind, "model": without_paths(name)},
        "answers": len(values),
        "failures": sum(map(math.isnan, values)),
        "longer_wins": wilson(longer[True], longer.total()),
        **rater.figures(values),
    }
    return ranks(values) if isinstance(rater, _ByRewardModel) else values, figures


def _count_longer(answers: list[tuple[float, int]], longer: Counter[bool]) -> None:
    """Whether the best answer of a prompt is longer than the worst; where they are alike, nothing."""
    known = [one for one in answers if not math.isnan(one[0])]
    best, worst = max(known, default=(0.0, 0)), min(known, default=(0.0, 0))
    if best[0] != worst[0] and best[1] != worst[1]:
        longer[best[1] > worst[1]] += 1
