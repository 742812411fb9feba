"""The layouts of preference data: one function each, from a raw row to a set of candidates.

A function takes a row and the source's settings and returns a CandidateSet, or raises `Malformed`; columns it doesn't
know are ignored. To add a layout: write its function, add it to LAYOUTS below and to `Layout` in recipe.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_cli.prepare import scoring
from dpo_cli.prepare.turns import (
    ROLES,
    Malformed,
    asked_by,
    conversation,
    label_of,
    list_of,
    literal,
    map_of,
    model_of,
    prompt_and_answers,
    text_of,
    transcript,
)  # fmt: skip
from dpo_cli.records import Candidate, CandidateSet, Message

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a layout may need besides the row: the recipe's score weights, the source's column map (ours -> theirs)."""

    weights: scoring.Weights
    columns: Mapping[str, str] = field(default_factory=dict)


def _preferred(
    prompt: list[Message], texts: list[str], scores: Sequence[float | None], models: Sequence[Any]
) -> CandidateSet:
    """A chosen and a rejected answer: scored where both have a score, else in that order."""
    scored = None not in scores
    candidates = [
        Candidate(text, value if scored else None, model_of(model))
        for text, value, model in zip(texts, scores, models, strict=True)
    ]
    return CandidateSet(prompt, candidates, source="", ranked=not scored)


def _strength(prompt: list[Message], texts: list[str], strength: Any) -> CandidateSet:
    """Two answers and how much better the second is, -3..3: scores are 1/2 -+ strength/6, margins |strength|/3."""
    second = scoring.rating(strength, -3, 3)
    values = [None, None] if second is None else [round(1 - second, 6), round(second, 6)]
    return CandidateSet(prompt, [Candidate(t, v) for t, v in zip(texts, values, strict=True)], source="")


# ---------------------------------------------------------------------------------------------------- one per layout


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
            aspect: said["Rating"] for aspect, said in annotations.items() if type(said) is dict and "Rating" in said
        }
        value = scoring.score(ratings, scoring.ULTRAFEEDBACK, settings.weights)
        candidates.append(Candidate(text, value, model_of(completion.get("model"))))
    prompt = asked_by(row.get("instruction"), "instruction")
    return CandidateSet(prompt, candidates, source="", subset=label_of(row.get("source")))


def ultrafeedback_zh(row: Row, settings: Settings) -> CandidateSet:
    """opencsg/UltraFeedback-chinese: as the English set, or one of its two binarized files.

    Their `overall_score` is not used either: where honesty is N/A it tops out at 4 instead of 5.
    """
    if "completions" in row:
        return ultrafeedback(row, settings)
    candidates = []
    for side in ("chosen", "rejected"):
        ratings = row.get(f"{side}_rating")
        ratings = map_of(literal(ratings) if isinstance(ratings, str) else ratings, f"{side}_rating")
        value = scoring.score(ratings, scoring.ULTRAFEEDBACK, settings.weights)
        candidates.append(Candidate(text_of(row.get(f"{side}_response"), f"{side}_response"), value))
    prompt = asked_by(row.get("instruction"), "instruction")
    return CandidateSet(prompt, candidates, source="", subset=label_of(row.get("source")))


def ultrafeedback_binarized(row: Row, settings: Settings) -> CandidateSet:
    """Pairs made from UltraFeedback: HuggingFaceH4's, argilla's (hyphens in its columns), trl-lib's (no `prompt`).

    H4 and trl-lib keep `overall_score` (1..10), argilla the mean of the aspects (1..5).
    """
    prompt, texts = prompt_and_answers(row.get("prompt"), [(row.get(side), side) for side in ("chosen", "rejected")])
    name, scale = ("-rating", scoring.MEAN_1_TO_5) if "chosen-rating" in row else ("", scoring.OVERALL_1_TO_10)
    scores = [
        scoring.rating(row.get(side + name if name else f"score_{side}"), *scale) for side in ("chosen", "rejected")
    ]
    rounded = [None if value is None else round(value, scoring.DECIMALS) for value in scores]
    item = _preferred(prompt, texts, rounded, [row.get("chosen-model"), row.get("rejected-model")])
    item.subset = label_of(row.get("source"))
    return item


def helpsteer2(row: Row, settings: Settings) -> CandidateSet:
    """nvidia/HelpSteer2: one answer a row, five ratings 0..4; rows with the same prompt are put together afterwards."""
    value = scoring.score(row, scoring.HELPSTEER2, settings.weights)
    candidate = Candidate(text_of(row.get("response"), "response"), value)
    return CandidateSet(_helpsteer_prompt(row.get("prompt")), [candidate], source="")


_EXTRA_ID = re.compile(r"\n<extra_id_1>(Assistant|User)\n")


def _helpsteer_prompt(value: Any) -> list[Message]:
    """A prompt whose earlier turns are flattened with `\\n<extra_id_1>Assistant\\n` and `\\n<extra_id_1>User\\n`."""
    parts = ["User", *_EXTRA_ID.split(text_of(value, "prompt"))]
    turns: list[Message] = [
        {"role": ROLES[speaker.lower()], "content": content}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    return prompt_and_answers(turns, [])[0]


def helpsteer2_preference(row: Row, settings: Settings) -> CandidateSet:
    """nvidia/HelpSteer2's preference folder: two answers, strength -3..3, above 0 for the second."""
    texts = [text_of(row.get(name), name) for name in ("response_1", "response_2")]
    return _strength(_helpsteer_prompt(row.get("prompt")), texts, row.get("preference_strength"))


LANGUAGE_NAMES = {
    "english": "en", "chinese": "zh", "japanese": "ja", "korean": "ko", "french": "fr", "german": "de", "spanish": "es",
    "italian": "it", "portuguese": "pt", "russian": "ru", "vietnamese": "vi", "indonesian": "id", "polish": "pl",
    "dutch": "nl",
}  # fmt: skip


def _spoken(value: Any) -> str | None:
    """A language column as a code, from `en`, `zh-CN` or `Chinese`; None where it says something else."""
    said = value.lower() if isinstance(value, str) else ""
    return LANGUAGE_NAMES.get(said) or (said[:2] if re.fullmatch("[a-z]{2}(?:[-_].*)?", said) else None)


def helpsteer3(row: Row, settings: Settings) -> CandidateSet:
    """nvidia/HelpSteer3: messages, two answers, strength -3..3 as above. `language` may name a programming language."""
    texts = [text_of(row.get(name), name) for name in ("response1", "response2")]
    item = _strength(prompt_and_answers(row.get("context"), [])[0], texts, row.get("overall_preference"))
    item.language, item.subset = LANGUAGE_NAMES.get(str(row.get("language")).lower()), label_of(row.get("domain"))
    return item


def hh_rlhf(row: Row, settings: Settings) -> CandidateSet:
    """Anthropic/hh-rlhf: two transcripts that differ in their last answer; no scores."""
    sides = [(transcript(row.get(side), side), side) for side in ("chosen", "rejected")]
    prompt, texts = prompt_and_answers(None, sides)
    return _preferred(prompt, texts, [None, None], [None, None])


def nectar(row: Row, settings: Settings) -> CandidateSet:
    """berkeley-nest/Nectar, or any prompt with ranked answers: 1 is best; no scores."""
    answers = [map_of(answer, "an answer") for answer in list_of(row.get("answers"), "answers")]
    ranks = [scoring.rating(answer.get("rank"), 1, 1000) for answer in answers]
    if None in ranks or len(set(ranks)) < len(ranks):
        raise Malformed("the answers' ranks are not an order")
    ordered = [answer for _, answer in sorted(zip(ranks, answers, strict=True), key=lambda ranked: ranked[0] or 0.0)]
    turns: Any = row.get("prompt")
    if isinstance(turns, str) and turns.lstrip().startswith("Human:"):
        turns = transcript(turns, "prompt")
        if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
            turns.pop()
    candidates = [Candidate(text_of(one.get("answer"), "answer"), None, model_of(one.get("model"))) for one in ordered]
    return CandidateSet(prompt_and_answers(turns, [])[0], candidates, source="", ranked=True)


def sharegpt(row: Row, settings: Settings) -> CandidateSet:
    """LLaMA-Factory's ShareGPT ranking: `conversations`, and a chosen and a rejected turn; no scores."""
    sides = [(row.get(side), side) for side in ("chosen", "rejected")]
    prompt, texts = prompt_and_answers(list_of(row.get("conversations"), "conversations"), sides, row.get("system"))
    return _preferred(prompt, texts, [None, None], [None, None])


def pairs(row: Row, settings: Settings) -> CandidateSet:
    """Any prompt, chosen, rejected, as text or messages; scores count where they are on 0..1. Columns can be mapped."""
    ours = _mapped(row, settings)
    sides = [(ours.get(side), side) for side in ("chosen", "rejected")]
    prompt, texts = prompt_and_answers(ours.get("prompt"), sides, ours.get("system"))
    scores = [scoring.rating(ours.get(f"score_{side}"), *scoring.UNIT) for side in ("chosen", "rejected")]
    item = _preferred(prompt, texts, scores, [ours.get("model_chosen"), ours.get("model_rejected")])
    item.language = _spoken(ours.get("language"))
    return item


def kto(row: Row, settings: Settings) -> CandidateSet:
    """Unpaired: a prompt, one completion and whether it is good; or `messages` and a label. Columns can be mapped."""
    ours = _mapped(row, settings)
    completion = next((ours[name] for name in ("completion", "messages", "conversations") if name in ours), None)
    prompt, texts = prompt_and_answers(ours.get("prompt"), [(completion, "completion")], ours.get("system"))
    label = str(ours.get("label", ours.get("kto_tag"))).lower()
    if label not in LABELS:
        raise Malformed(f"label is {label[:40]!r}, not true or false")
    item = CandidateSet(
        prompt, [Candidate(texts[0], LABELS[label], model_of(ours.get("model")))], source="", labelled=True
    )
    item.language = _spoken(ours.get("language"))
    return item


LABELS = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}
MAPPABLE = {
    "pairs": (
        "prompt", "chosen", "rejected", "system", "language", "score_chosen", "score_rejected", "model_chosen",
        "model_rejected",
    ),
    "kto": ("prompt", "completion", "messages", "label", "system", "language", "model"),
}  # fmt: skip


def _mapped(row: Row, settings: Settings) -> Row:
    return {**row, **{ours: row.get(theirs) for ours, theirs in settings.columns.items()}} if settings.columns else row


# ---------------------------------------------------------------------------------------------------- all of them


@dataclass(frozen=True)
class LayoutOf:
    """A layout: its function, the columns it can't do without (any of the sets), and how else to tell it.

    `reads`: the names it needs inside a parquet file (None: all). `grouped`: rows with one prompt belong together.
    """

    read: Callable[[Row, Settings], CandidateSet]
    needs: tuple[frozenset[str], ...]
    told_by: Callable[[Row], bool] = lambda row: True
    reads: frozenset[str] | None = None
    grouped: bool = False


def _sets(*columns: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in columns)


def _openbmb(row: Row) -> bool:
    """The English set's completions carry a critique; the Chinese set's don't."""
    completions = row["completions"]
    return isinstance(completions, list) and any(isinstance(c, dict) and "critique" in c for c in completions)


def _beyond_one(row: Row) -> bool:
    """A score above 1: these sets count to 5 or 10, plain pairs to 1."""
    scores = (row.get("chosen-rating"), row.get("score_chosen"), row.get("score_rejected"))
    return any(scoring.rating(score, *scoring.OVERALL_1_TO_10) for score in scores)


def _has_prompt(row: Row) -> bool:
    """A prompt in a column of its own or in front of the answers; what is neither needs a column map."""
    try:
        return "prompt" in row or not isinstance(conversation(row["chosen"], "chosen"), str)
    except Malformed:
        return False


def _is_transcript(row: Row) -> bool:
    return all(isinstance(row[side], str) and "\n\nAssistant:" in row[side] for side in ("chosen", "rejected"))


_COMPLETIONS = frozenset(
    [
        "instruction",
        "source",
        "completions",
        "response",
        "model",
        "annotations",
        "Rating",
        "helpfulness",
        "honesty",
        "truthfulness",
        "instruction_following",
    ]
)

# In the order in which `auto` tries them: the more telling columns first.
LAYOUTS: dict[str, LayoutOf] = {
    "ultrafeedback": LayoutOf(ultrafeedback, _sets("instruction completions"), _openbmb, _COMPLETIONS),
    "ultrafeedback_zh": LayoutOf(
        ultrafeedback_zh,
        _sets("instruction completions", "instruction chosen_response rejected_response chosen_rating rejected_rating"),
        reads=_COMPLETIONS | {"chosen_response", "rejected_response", "chosen_rating", "rejected_rating"},
    ),
    "ultrafeedback_binarized": LayoutOf(
        ultrafeedback_binarized,
        _sets("chosen rejected chosen-rating rejected-rating", "chosen rejected score_chosen score_rejected"),
        _beyond_one,
    ),
    "helpsteer2": LayoutOf(
        helpsteer2, _sets("prompt response helpfulness correctness coherence complexity verbosity"), grouped=True
    ),
    "helpsteer2_preference": LayoutOf(
        helpsteer2_preference, _sets("prompt response_1 response_2 preference_strength"),
        reads=frozenset({"prompt", "response_1", "response_2", "preference_strength"}),
    ),
    "helpsteer3": LayoutOf(
        helpsteer3, _sets("context response1 response2 overall_preference"),
        reads=frozenset((
            "domain", "language", "context", "role", "content", "response1", "response2", "overall_preference")),
    ),
    "nectar": LayoutOf(nectar, _sets("prompt answers")),
    "sharegpt": LayoutOf(sharegpt, _sets("conversations chosen rejected")),
    "hh_rlhf": LayoutOf(hh_rlhf, _sets("chosen rejected"), _is_transcript),
    "pairs": LayoutOf(pairs, _sets("prompt chosen rejected", "chosen rejected"), _has_prompt),
    "kto": LayoutOf(kto, _sets("prompt completion label", "messages label", "conversations kto_tag"), grouped=True),
}  # fmt: skip
