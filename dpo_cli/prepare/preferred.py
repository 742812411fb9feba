"""What layouts are made of: their table, and a chosen and a rejected answer with the scores that stand beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.prepare import scoring
from dpo_cli.prepare.messages import conversation, first, prompt_and_answers, text_if_any
from dpo_cli.records import Candidate, CandidateSet

Row = Mapping[str, Any]


Read = Callable[[Row, scoring.Weights], CandidateSet]


@dataclass(frozen=True)
class LayoutOf:
    """A layout: its function, the columns it can't do without (any of the sets), and how else it is detected.

    `grouped`: rows with one prompt belong together.
    `sampled`: it has no answers, so that only a source with `sample` can have it.
    `lone`: an answer has no other beside it, so `auto` looks for it only where the method needs none.
    """

    read: Read
    needs: tuple[frozenset[str], ...]
    looks_so: Callable[[Row], bool] = lambda row: True
    grouped: bool = False
    sampled: bool = False
    lone: bool = False


LAYOUTS: dict[str, LayoutOf] = {}  # in the order in which `auto` tries them: the more telling columns first


def layout(*needs: str, **more: Any) -> Callable[[Read], Read]:
    """Put a function into LAYOUTS under its name; the columns of a set stand in one text. See `LayoutOf`."""

    def enter(read: Read) -> Read:
        LAYOUTS[read.__name__] = LayoutOf(read, tuple(frozenset(one.split()) for one in needs), **more)
        return read

    return enter


LANGUAGE_NAMES = {
    "english": "en", "chinese": "zh", "japanese": "ja", "korean": "ko", "french": "fr", "german": "de", "spanish": "es",
    "italian": "it", "portuguese": "pt", "russian": "ru", "vietnamese": "vi", "indonesian": "id", "polish": "pl",
    "dutch": "nl",
}  # fmt: skip


def language_code(value: Any) -> str | None:
    """Return a language column as a code, from `en`, `zh-CN` or `Chinese`; None where it says something else."""
    written = value.lower() if isinstance(value, str) else ""
    return LANGUAGE_NAMES.get(written) or (written[:2] if re.fullmatch("[a-z]{2}(?:[-_].*)?", written) else None)


SIDES = ("chosen", "rejected")
# What sets call the scores of chosen and rejected, and their scale. None: it is not known, so they only give the order.
Scores = Mapping[str, tuple[float, float] | None]
SCORES: Scores = {
    "score_{}": scoring.UNIT, "{}_score": None, "{}-rating": None, "{}_rating": None, "reward_{}": None,
    "{}_reward": None,
}  # fmt: skip
_IS_SCORE = re.compile(r"score|rating|reward|grade|quality", re.IGNORECASE)
MODELS = ("model_{}", "{}_model", "{}-model")


def preferred(row: Row, prompt: Any, answers: Sequence[tuple[Any, str]], scores: Scores = SCORES) -> CandidateSet:
    """Return a chosen and a rejected answer, in this order whatever they score.

    Args:
        row: the whole row, under our names where columns are mapped.
        answers: (value, its column) of chosen and rejected.
        scores: names that their scores may have, with `{}` for the side, and their scale.
    """
    asked, texts, notes = prompt_and_answers(prompt, answers, row)
    item = CandidateSet(asked, [Candidate(text) for text in texts], ranked=True, notes=notes)
    for candidate, side in zip(item.candidates, SIDES, strict=True):
        candidate.model = text_if_any(first(row, *(name.format(side) for name in MODELS)), "model")
    for name, scale in scores.items():
        stated = _numbers(row, *(name.format(side) for side in SIDES))
        if stated:
            score_both(item, stated, scale)
            break
    else:  # names of one's own that differ in the side only, such as chosen_avg_rating, on a scale that is not known
        names = [name for name in row if isinstance(name, str) and "chosen" in name and _IS_SCORE.search(name)]
        found = (_numbers(row, name, name.replace("chosen", "rejected")) for name in names)
        score_both(item, next(filter(None, found), {}), None)
    item.language = language_code(row.get("language"))
    return item


def _numbers(row: Row, *names: str) -> dict[str, float]:
    """The numbers in these columns; empty where one holds none."""
    found = {name: value for name in names if (value := scoring.number(row.get(name))) is not None}
    return found if len(found) == len(names) else {}


def score_both(item: CandidateSet, stated: dict[str, float], scale: tuple[float, float] | None) -> None:
    """Score both answers, unless the scores are off their scale or call rejected the better one."""
    item.stated = stated
    if not stated or (item.lead() or 0.0) < 0:
        return
    values = [scoring.rating(value, *scale) if scale else None for value in stated.values()]
    if None in values:
        item.notes.append(f"{' and '.join(stated)} but for their order, as their scale is not known")
        return
    for candidate, value in zip(item.candidates, values, strict=True):
        candidate.score = None if value is None else round(value, scoring.DECIMALS)


def sides(row: Row) -> list[tuple[Any, str]]:
    return [(row.get(side), side) for side in SIDES]


def has_prompt(row: Row) -> bool:
    """Return whether a prompt has a column of its own or is in front of the answers; else it needs a column map."""
    if row.get("prompt") is not None:
        return True
    talk = conversation(row["chosen"], "chosen")
    return not isinstance(talk, str) and len(talk) > 1
