"""The layouts of public sets that rate answers: one function each, as in layouts.py."""

from __future__ import annotations

import re
from typing import Any

from dpo_cli.prepare import scoring
from dpo_cli.prepare.messages import asked_by, list_of, literal, map_of, prompt_and_answers, text_if_any, text_of
from dpo_cli.prepare.preferred import (
    LANGUAGE_NAMES,
    SIDES,
    Row,
    Settings,
    has_prompt,
    layout,
    preferred,
    score_both,
    sides,
)
from dpo_cli.records import Candidate, CandidateSet, Message


def _strength(prompt: list[Message], texts: list[str], strength: Any) -> CandidateSet:
    """Two answers and how much better the second is, -3..3: scores are 1/2 -+ strength/6, margins |strength|/3."""
    second = scoring.rating(strength, -3, 3)
    values = [None, None] if second is None else [round(1 - second, 6), round(second, 6)]
    return CandidateSet(prompt, [Candidate(t, v) for t, v in zip(texts, values, strict=True)])


def _openbmb(row: Row) -> bool:  # whose completions carry a critique; the Chinese set's don't
    completions = row["completions"]
    return isinstance(completions, list) and any(isinstance(c, dict) and "critique" in c for c in completions)


_ASPECTS = "helpfulness honesty truthfulness instruction_following"
_COMPLETIONS = f"instruction source completions response model annotations Rating {_ASPECTS}"
_BINARIZED = "chosen_response rejected_response chosen_rating rejected_rating"


@layout("instruction completions", looks_so=_openbmb, reads=_COMPLETIONS)
def ultrafeedback(row: Row, settings: Settings) -> CandidateSet:
    """openbmb/UltraFeedback: four completions, each rated "1".."5" or "N/A" on four aspects.

    `overall_score` is not used: 2,628 completions had a 1 stored as 10.
    """
    candidates = []
    for completion in list_of(row.get("completions"), "completions"):
        completion = map_of(completion, "a completion")
        text = text_of(completion.get("response"), "response")
        annotations = map_of(completion.get("annotations"), "annotations")
        ratings = {
            aspect: one["Rating"] for aspect, one in annotations.items() if type(one) is dict and "Rating" in one
        }
        value = scoring.score(ratings, scoring.ULTRAFEEDBACK, settings.weights)
        candidates.append(Candidate(text, value, text_if_any(completion.get("model"), "model")))
    return CandidateSet(asked_by(row.get("instruction"), "instruction"), candidates, subset=_subset(row))


def _subset(row: Row) -> str | None:
    return text_if_any(row.get("source"), "source")


@layout("instruction completions", f"instruction {_BINARIZED}", reads=f"{_COMPLETIONS} {_BINARIZED}")
def ultrafeedback_zh(row: Row, settings: Settings) -> CandidateSet:
    """opencsg/UltraFeedback-chinese: as the English set, or one of its two binarized files.

    Their `overall_score` is not used either: where honesty is N/A it tops out at 4 instead of 5.
    """
    if row.get("completions") is not None:
        return ultrafeedback(row, settings)
    if None not in (scoring.number(row.get(f"{side}_rating")) for side in SIDES):  # one rating, not one an aspect
        answers = [(row.get(f"{side}_response"), f"{side}_response") for side in SIDES]
        return preferred(row, row.get("instruction"), answers)
    values = {}
    for side in SIDES:
        ratings = row.get(f"{side}_rating")
        ratings = map_of(literal(ratings) if isinstance(ratings, str) else ratings, f"{side}_rating")
        values[f"{side}_rating"] = scoring.score(ratings, scoring.ULTRAFEEDBACK, settings.weights)
    texts = [text_of(row.get(f"{side}_response"), f"{side}_response") for side in SIDES]
    prompt = asked_by(row.get("instruction"), "instruction")
    if None in values.values():
        candidates = [Candidate(text, value) for text, value in zip(texts, values.values(), strict=True)]
        return CandidateSet(prompt, candidates, subset=_subset(row))
    item = CandidateSet(prompt, [Candidate(text) for text in texts], subset=_subset(row), ranked=True)
    score_both(item, {name: value or 0.0 for name, value in values.items()}, scoring.UNIT)
    return item


def _beyond_one(row: Row) -> bool:  # these sets count to 5 or 10, plain pairs to 1
    scores = (row.get("chosen-rating"), row.get("score_chosen"), row.get("score_rejected"))
    return has_prompt(row) and any(scoring.rating(score, *scoring.OVERALL_1_TO_10) for score in scores)


@layout(
    "chosen rejected chosen-rating rejected-rating", "chosen rejected score_chosen score_rejected", looks_so=_beyond_one
)
def ultrafeedback_binarized(row: Row, settings: Settings) -> CandidateSet:
    """Pairs made from UltraFeedback: HuggingFaceH4's, argilla's (hyphens in its columns), trl-lib's (no `prompt`).

    H4 and trl-lib keep `overall_score` (1..10), argilla the mean of the aspects (1..5).
    """
    scores = {"{}-rating": scoring.MEAN_1_TO_5, "score_{}": scoring.OVERALL_1_TO_10}
    item = preferred(row, row.get("prompt"), sides(row), scores)
    item.subset = _subset(row)
    return item


@layout("prompt response helpfulness correctness coherence complexity verbosity", grouped=True)
def helpsteer2(row: Row, settings: Settings) -> CandidateSet:
    """nvidia/HelpSteer2: one answer a row, five ratings 0..4; rows with the same prompt are put together afterwards.

    Its `disagreements` folder has lists of ratings, one a rater; how far they are apart in helpfulness is the spread.
    """
    value = scoring.score(row, scoring.HELPSTEER2, settings.weights)
    spread = scoring.spread(row.get("helpfulness"))
    candidate = Candidate(text_of(row.get("response"), "response"), value, spread=spread)
    return CandidateSet(_helpsteer_prompt(row.get("prompt")), [candidate])


_EXTRA_ID = re.compile(r"\n<extra_id_1>(Assistant|User)\n")


def _helpsteer_prompt(value: Any) -> list[Message]:
    """A prompt whose earlier turns are flattened with `\\n<extra_id_1>Assistant\\n` and `\\n<extra_id_1>User\\n`."""
    parts = ["User", *_EXTRA_ID.split(text_of(value, "prompt"))]
    turns = [{"role": speaker, "content": content} for speaker, content in zip(parts[::2], parts[1::2], strict=True)]
    return prompt_and_answers(turns, [])[0]


_STRENGTH = "prompt response_1 response_2 preference_strength"


@layout(_STRENGTH, reads=_STRENGTH)
def helpsteer2_preference(row: Row, settings: Settings) -> CandidateSet:
    """nvidia/HelpSteer2's preference folder: two answers, strength -3..3, above 0 for the second."""
    texts = [text_of(row.get(name), name) for name in ("response_1", "response_2")]
    return _strength(_helpsteer_prompt(row.get("prompt")), texts, row.get("preference_strength"))


@layout(
    "context response1 response2 overall_preference",
    reads="domain language context role content response1 response2 overall_preference",
)
def helpsteer3(row: Row, settings: Settings) -> CandidateSet:
    """nvidia/HelpSteer3: messages, two answers, strength -3..3 as above. `language` may name a programming language."""
    texts = [text_of(row.get(name), name) for name in ("response1", "response2")]
    item = _strength(prompt_and_answers(row.get("context"), [])[0], texts, row.get("overall_preference"))
    item.language = LANGUAGE_NAMES.get(str(row.get("language")).lower())
    item.subset = text_if_any(row.get("domain"), "domain")
    return item
