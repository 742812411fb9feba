"""A chosen and a rejected answer with the scores that stand beside them: what most layouts are read into."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_cli.prepare import scoring
from dpo_cli.prepare.messages import first, model_of, prompt_and_answers
from dpo_cli.records import Candidate, CandidateSet

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a layout may need besides the row: the recipe's score weights, the source's column map (ours -> theirs)."""

    weights: scoring.Weights
    columns: Mapping[str, str] = field(default_factory=dict)


LANGUAGE_NAMES = {
    "english": "en", "chinese": "zh", "japanese": "ja", "korean": "ko", "french": "fr", "german": "de", "spanish": "es",
    "italian": "it", "portuguese": "pt", "russian": "ru", "vietnamese": "vi", "indonesian": "id", "polish": "pl",
    "dutch": "nl",
}  # fmt: skip


def spoken(value: Any) -> str | None:
    """A language column as a code, from `en`, `zh-CN` or `Chinese`; None where it says something else."""
    said = value.lower() if isinstance(value, str) else ""
    return LANGUAGE_NAMES.get(said) or (said[:2] if re.fullmatch("[a-z]{2}(?:[-_].*)?", said) else None)


SIDES = ("chosen", "rejected")
# What sets call the scores of chosen and rejected, and their scale. None: it is not known, so they only give the order.
Scores = Mapping[str, tuple[float, float] | None]
SCORES: Scores = {
    "score_{}": scoring.UNIT, "{}_score": None, "{}-rating": None, "{}_rating": None, "reward_{}": None,
    "{}_reward": None,
}  # fmt: skip
_IS_SCORE = re.compile(r"score|rating|reward|grade|quality", re.IGNORECASE)
MODELS = ("model_{}", "{}_model", "{}-model")


def preferred(
    row: Row,
    prompt: Any,
    answers: Sequence[tuple[Any, str]],
    system: Any = None,
    history: Any = None,
    scores: Scores = SCORES,
) -> CandidateSet:
    """A chosen and a rejected answer, in this order whatever they score.

    Args:
        row: the whole row, under our names where columns are mapped.
        answers: (value, its column) of chosen and rejected.
        scores: names that their scores may have, with `{}` for the side, and their scale.
    """
    asked, texts, notes = prompt_and_answers(prompt, answers, system, history)
    item = CandidateSet(asked, [Candidate(text) for text in texts], source="", ranked=True, notes=notes)
    for candidate, side in zip(item.candidates, SIDES, strict=True):
        candidate.model = model_of(first(row, *(name.format(side) for name in MODELS)))
    for name, scale in scores.items():
        stated = {name.format(side): scoring.number(row.get(name.format(side))) for side in SIDES}
        if None not in stated.values():
            score_both(item, {column: value for column, value in stated.items() if value is not None}, scale)
            break
    else:
        score_both(item, _stated(row), None)
    item.language = spoken(row.get("language"))
    return item


def _stated(row: Row) -> dict[str, float]:
    """Scores under names of one's own, which differ only in the side (`chosen_avg_rating`); empty where there are none.

    What scale they are on is not known.
    """
    for name in row:
        if isinstance(name, str) and "chosen" in name and _IS_SCORE.search(name):
            pair = {name: scoring.number(row[name])}
            pair[name.replace("chosen", "rejected")] = scoring.number(row.get(name.replace("chosen", "rejected")))
            if None not in pair.values():
                return {column: value for column, value in pair.items() if value is not None}
    return {}


def score_both(item: CandidateSet, stated: dict[str, float], scale: tuple[float, float] | None) -> None:
    """Score both answers, unless the scores are off their scale or call rejected the better one."""
    if not stated:
        return
    item.stated = stated
    values = [scoring.rating(value, *scale) if scale else None for value in stated.values()]
    if (item.lead() or 0.0) < 0:
        return
    if None in values:
        item.notes.append(f"{' and '.join(stated)} but for their order, as their scale is not known")
        return
    for candidate, value in zip(item.candidates, values, strict=True):
        candidate.score = None if value is None else round(value, scoring.DECIMALS)


def sides(row: Row) -> list[tuple[Any, str]]:
    return [(row.get(side), side) for side in SIDES]
