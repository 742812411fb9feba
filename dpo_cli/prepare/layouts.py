"""The layouts of preference data: one function each, from a raw row to a set of candidates.

A function takes a row and the recipe's score weights, and returns a CandidateSet or raises `Malformed`; columns it
doesn't know are ignored. To add a layout: write its function where `auto` is to try it, and add it to `Layout` in
recipe/sections.py. `read.py` calls them, and refuses rows of tools and images whatever their layout.
"""

from __future__ import annotations

import re
from typing import Any

from dpo_cli.prepare import scoring
from dpo_cli.prepare.messages import (
    Malformed,
    asked_by,
    conversation,
    first,
    is_given,
    is_transcript,
    list_of,
    literal,
    map_of,
    prompt_and_answers,
    text_if_any,
    text_of,
)  # fmt: skip
from dpo_cli.prepare.preferred import (
    LANGUAGE_NAMES,
    SIDES,
    Row,
    has_prompt,
    language_code,
    layout,
    preferred,
    score_both,
    sides,
)
from dpo_cli.records import Candidate, CandidateSet, Message

# ---- public sets that rate answers


def _strength(prompt: list[Message], texts: list[str], strength: Any) -> CandidateSet:
    """Two answers and how much better the second is, -3..3: scores are 1/2 -+ strength/6, margins |strength|/3."""
    second = scoring.rating(strength, -3, 3)
    values = [None, None] if second is None else [round(1 - second, 6), round(second, 6)]
    return CandidateSet(prompt, [Candidate(t, v) for t, v in zip(texts, values, strict=True)])


def _openbmb(row: Row) -> bool:  # whose completions carry a critique; the Chinese set's don't
    completions = row["completions"]
    return isinstance(completions, list) and any(isinstance(c, dict) and "critique" in c for c in completions)


_BINARIZED = "chosen_response rejected_response chosen_rating rejected_rating"


@layout("instruction completions", looks_so=_openbmb)
def ultrafeedback(row: Row, weights: scoring.Weights) -> CandidateSet:
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
        value = scoring.score(ratings, scoring.ULTRAFEEDBACK, weights)
        candidates.append(Candidate(text, value, text_if_any(completion.get("model"), "model")))
    return CandidateSet(asked_by(row.get("instruction"), "instruction"), candidates, subset=_subset(row))


def _subset(row: Row) -> str | None:
    return text_if_any(row.get("source"), "source")


@layout("instruction completions", f"instruction {_BINARIZED}")
def ultrafeedback_zh(row: Row, weights: scoring.Weights) -> CandidateSet:
    """opencsg/UltraFeedback-chinese: as the English set, or one of its two binarized files.

    Their `overall_score` is not used either: where honesty is N/A it tops out at 4 instead of 5.
    """
    if row.get("completions") is not None:
        return ultrafeedback(row, weights)
    if None not in (scoring.number(row.get(f"{side}_rating")) for side in SIDES):  # one rating, not one an aspect
        answers = [(row.get(f"{side}_response"), f"{side}_response") for side in SIDES]
        return preferred(row, row.get("instruction"), answers)
    values = {}
    for side in SIDES:
        ratings = row.get(f"{side}_rating")
        ratings = map_of(literal(ratings) if isinstance(ratings, str) else ratings, f"{side}_rating")
        values[f"{side}_rating"] = scoring.score(ratings, scoring.ULTRAFEEDBACK, weights)
    texts = [text_of(row.get(f"{side}_response"), f"{side}_response") for side in SIDES]
    prompt = asked_by(row.get("instruction"), "instruction")
    rated = None not in values.values()  # else they are dropped as without a score
    item = CandidateSet(prompt, [Candidate(text) for text in texts], subset=_subset(row), ranked=rated)
    if rated:
        score_both(item, {name: value or 0.0 for name, value in values.items()}, scoring.UNIT)
    return item


def _beyond_one(row: Row) -> bool:  # these sets count to 5 or 10, plain pairs to 1
    scores = (row.get("chosen-rating"), row.get("score_chosen"), row.get("score_rejected"))
    return has_prompt(row) and any(scoring.rating(score, *scoring.OVERALL_1_TO_10) for score in scores)


@layout(
    "chosen rejected chosen-rating rejected-rating", "chosen rejected score_chosen score_rejected", looks_so=_beyond_one
)
def ultrafeedback_binarized(row: Row, weights: scoring.Weights) -> CandidateSet:
    """Pairs made from UltraFeedback: HuggingFaceH4's, argilla's (hyphens in its columns), trl-lib's (no `prompt`).

    H4 and trl-lib keep `overall_score` (1..10), argilla the mean of the aspects (1..5).
    """
    scores = {"{}-rating": scoring.MEAN_1_TO_5, "score_{}": scoring.OVERALL_1_TO_10}
    item = preferred(row, row.get("prompt"), sides(row), scores)
    item.subset = _subset(row)
    return item


@layout("prompt response helpfulness correctness coherence complexity verbosity", grouped=True)
def helpsteer2(row: Row, weights: scoring.Weights) -> CandidateSet:
    """nvidia/HelpSteer2: one answer a row, five ratings 0..4; rows with the same prompt are put together afterwards.

    Its `disagreements` folder has lists of ratings, one a rater; how far they are apart in helpfulness is the spread.
    """
    value = scoring.score(row, scoring.HELPSTEER2, weights)
    spread = scoring.spread(row.get("helpfulness"))
    candidate = Candidate(text_of(row.get("response"), "response"), value, spread=spread)
    return CandidateSet(_helpsteer_prompt(row.get("prompt")), [candidate])


_EXTRA_ID = re.compile(r"\n<extra_id_1>(Assistant|User)\n")


def _helpsteer_prompt(value: Any) -> list[Message]:
    """A prompt whose earlier turns are flattened with `\\n<extra_id_1>Assistant\\n` and `\\n<extra_id_1>User\\n`."""
    parts = ["User", *_EXTRA_ID.split(text_of(value, "prompt"))]
    turns = [{"role": speaker, "content": content} for speaker, content in zip(parts[::2], parts[1::2], strict=True)]
    return prompt_and_answers(turns, [])[0]


@layout("prompt response_1 response_2 preference_strength")
def helpsteer2_preference(row: Row, weights: scoring.Weights) -> CandidateSet:
    """nvidia/HelpSteer2's preference folder: two answers, strength -3..3, above 0 for the second."""
    texts = [text_of(row.get(name), name) for name in ("response_1", "response_2")]
    return _strength(_helpsteer_prompt(row.get("prompt")), texts, row.get("preference_strength"))


@layout("context response1 response2 overall_preference")
def helpsteer3(row: Row, weights: scoring.Weights) -> CandidateSet:
    """nvidia/HelpSteer3: messages, two answers, strength -3..3 as above. `language` may name a programming language."""
    texts = [text_of(row.get(name), name) for name in ("response1", "response2")]
    item = _strength(prompt_and_answers(row.get("context"), [])[0], texts, row.get("overall_preference"))
    item.language = LANGUAGE_NAMES.get(str(row.get("language")).lower())
    item.subset = text_if_any(row.get("domain"), "domain")
    return item


# ---- rankings, and people's own files


@layout("prompt answers")
def nectar(row: Row, weights: scoring.Weights) -> CandidateSet:
    """berkeley-nest/Nectar, or any prompt with ranked answers: 1 is best; no scores."""
    answers = [map_of(answer, "an answer") for answer in list_of(row.get("answers"), "answers")]
    ranks = [scoring.rating(answer.get("rank"), 0, 1000) for answer in answers]
    if None in ranks:
        keys = ", ".join(str(key)[:40] for key in answers[ranks.index(None)])
        raise Malformed(f"an answer has {keys}, and no rank that is a number: 1 is best")
    if len(set(ranks)) < len(ranks):
        raise Malformed("two answers have one rank")
    ordered = [answer for _, answer in sorted(zip(ranks, answers, strict=True), key=lambda ranked: ranked[0] or 0.0)]
    prompt, texts, notes = prompt_and_answers(
        row.get("prompt"), [(one.get("answer"), "answer") for one in ordered], row
    )
    models = (text_if_any(one.get("model"), "model") for one in ordered)
    candidates = [Candidate(text, None, model) for text, model in zip(texts, models, strict=True)]
    return CandidateSet(prompt, candidates, ranked=True, notes=notes)


TIES = ("tie", "tie (bothbad)", "both_bad", "bothbad", "both_good")


@layout("conversation_a conversation_b winner", "prompt response_a response_b winner_model_a winner_model_b")
def arena(row: Row, weights: scoring.Weights) -> CandidateSet:
    """Chatbot Arena: two conversations and the `winner`, model_a, model_b or a tie, which scores both alike.

    Also lmsys-arena-human-preference-55k: lists of prompts and responses, and three columns for the winner.
    """
    winner = row.get("winner")
    if winner is None:
        names = ("model_a", "model_b", "tie")
        winner = next((name for name in names if scoring.number(row.get(f"winner_{name}"))), None)
    winner = text_of(winner, "winner").strip().lower()
    side = winner.removeprefix("model_")
    if side not in ("a", "b") and winner not in TIES:
        raise Malformed(f"winner is {winner[:40]!r}; known are model_a, model_b, {', '.join(TIES)}")
    answers = [(_arena_turns(row, name), f"conversation_{name}") for name in ("a", "b")]
    asked, texts, notes = prompt_and_answers(None, answers, row)
    candidates = [
        Candidate(text, None if side in ("a", "b") else 0.5, text_if_any(row.get(name), "model"))
        for text, name in zip(texts, ("model_a", "model_b"), strict=True)
    ]
    ordered = candidates[::-1] if side == "b" else candidates
    return CandidateSet(asked, ordered, language=language_code(row.get("language")), ranked=True, notes=notes)


def _arena_turns(row: Row, side: str) -> Any:
    """A side's messages up to the turn that was judged (MT-bench judges the first of two)."""
    if row.get(f"conversation_{side}") is not None:
        turns = list_of(conversation(row[f"conversation_{side}"], f"conversation_{side}"), f"conversation_{side}")
        judged = scoring.number(row.get("turn"))
        return turns[: int(2 * judged)] if judged and judged >= 1 else turns
    names = ("prompt", f"response_{side}")
    asked, answered = (list_of(literal(text_of(row.get(name), name)), name) for name in names)
    if len(asked) != len(answered):
        raise Malformed(f"prompt has {len(asked)} turns, response_{side} {len(answered)}")
    roles = ("user", "assistant")
    exchanges = zip(asked, answered, strict=True)
    return [{"role": role, "content": text} for both in exchanges for role, text in zip(roles, both, strict=True)]


@layout("conversations chosen rejected")
def sharegpt(row: Row, weights: scoring.Weights) -> CandidateSet:
    """LLaMA-Factory's ShareGPT ranking: `conversations`, and a chosen and a rejected turn."""
    return preferred(row, list_of(row.get("conversations"), "conversations"), sides(row))


@layout("messages rejected_response", "messages rejected_messages", "query response rejected_response")
def swift(row: Row, weights: scoring.Weights) -> CandidateSet:
    """ms-swift: `messages` that end in the chosen answer, or `query`, `response` and `history`; and a rejected one."""
    chosen, rejected = first(row, "messages", "response"), first(row, "rejected_messages", "rejected_response")
    return preferred(row, row.get("query"), [(chosen, "the chosen answer"), (rejected, "the rejected answer")])


def _has_no_prompt(row: Row) -> bool:
    return row.get("prompt") is None


@layout("chosen rejected", looks_so=lambda row: _has_no_prompt(row) and all(is_transcript(row[side]) for side in SIDES))
def hh_rlhf(row: Row, weights: scoring.Weights) -> CandidateSet:
    """Anthropic/hh-rlhf: two transcripts that differ in their last answer; no scores."""
    for side in SIDES:
        if not is_transcript(row.get(side)):
            raise Malformed(f"{side} is not a Human/Assistant transcript")
    return preferred(row, None, sides(row))


@layout(
    "system question chosen rejected", "system input chosen rejected",
    looks_so=lambda row: _has_no_prompt(row) and row.get("instruction") is None,
)  # fmt: skip
def orca(row: Row, weights: scoring.Weights) -> CandidateSet:
    """Intel/orca_dpo_pairs and its kin: `system`, `question` (argilla: `input`), chosen, rejected."""
    return preferred(row, first(row, "question", "input"), sides(row))


ANSWERS = ("response", "completion", "output", "answer")


def _is_chat(row: Row) -> bool:
    """One answer, which nothing calls good or bad; `messages` end in it."""
    if first(row, *SIDES, "label", "kto_tag", "rejected_response", "rejected_messages") is not None:
        return False
    talk = first(row, "messages", "conversations")
    if talk is None:
        return isinstance(first(row, *ANSWERS), str)
    turns = conversation(talk, "messages")
    return not isinstance(turns, str) and turns[-1:] != [] and turns[-1]["role"] == "assistant"


@layout(
    "messages", "conversations", "prompt response", "prompt completion", "instruction output", "instruction response",
    "query response", "question answer", looks_so=_is_chat, lone=True,
)  # fmt: skip
def chat(row: Row, weights: scoring.Weights) -> CandidateSet:
    """Instruction data with one answer, a good one: `messages`, ShareGPT's, prompt and response, Alpaca's."""
    talk = first(row, "messages", "conversations")
    if talk is not None:
        return _one_answer(row, None, (talk, "the answer"), 1.0)
    prompt = _prompt(row, "query", "question")
    return _one_answer(row, prompt, (first(row, *ANSWERS), "the answer"), 1.0)


def _one_answer(
    row: Row, prompt: Any, answer: tuple[Any, str], score: float | None = None, *, ranked: bool = False
) -> CandidateSet:
    """A set of one candidate, labelled where it is not ranked."""
    asked, texts, notes = prompt_and_answers(prompt, [answer], row)
    candidate = Candidate(texts[0], score, text_if_any(row.get("model"), "model"))
    item = CandidateSet(asked, [candidate], language=language_code(row.get("language")), notes=notes)
    item.ranked, item.labelled = ranked, not ranked
    return item


def _prompt(row: Row, *others: str) -> Any:
    """The prompt column, with its input, where a row has both as text; else the instruction; else another column."""
    asked, given = row.get("prompt"), row.get("input")
    if asked is None and others:
        return _instructed(row) if is_given(row.get("instruction")) else first(row, *others)
    again = not isinstance(asked, str) or not isinstance(given, str) or given.strip() in asked
    return asked if again else _instructed(row, "prompt")


def _instructed(row: Row, instruction: str = "instruction") -> Any:
    """Instruction and input as Alpaca's template joins them: a blank line in between."""
    asked, given = row.get(instruction), row.get("input")
    if not is_given(given):
        return asked
    return f"{text_of(asked, instruction)}\n\n{text_of(given, 'input')}" if is_given(asked) else given


def _is_alpaca(row: Row) -> bool:  # a label would make it a row of `kto`
    return _has_no_prompt(row) and ("chosen" in row or first(row, "label", "kto_tag") is None)


@layout("instruction chosen rejected", "instruction output", looks_so=_is_alpaca)
def alpaca(row: Row, weights: scoring.Weights) -> CandidateSet:
    """LLaMA-Factory's Alpaca: `instruction`, `input`, and chosen and rejected, or `output`, one answer or both."""
    prompt, output = _instructed(row), row.get("output")
    output = literal(output) if isinstance(output, str) and output.lstrip().startswith("[") else output
    if isinstance(output, list) and len(output) == 2:
        return preferred(row, prompt, [(one, "output") for one in output])
    if first(row, *SIDES) is not None:
        return preferred(row, prompt, sides(row))
    return _one_answer(row, prompt, (row.get("output"), "output"), ranked=True)


@layout("prompt chosen rejected", "chosen rejected", looks_so=has_prompt)
def pairs(row: Row, weights: scoring.Weights) -> CandidateSet:
    """Any prompt, chosen, rejected, as text or messages; scores count where they are on 0..1. Columns can be mapped."""
    item = preferred(row, _prompt(row), sides(row))
    item.subset = text_if_any(row.get("subset"), "subset")
    return item


_GOOD = """
    true 1 1.0 yes good chosen desirable positive accepted preferred like liked up thumbs_up upvote correct helpful win
    +1 t y pos 👍 是 好 真 对 赞 正确 喜欢 满意 有用 正面
"""
_BAD = """
    false 0 0.0 -1 -1.0 no bad rejected undesirable negative dislike disliked down thumbs_down downvote incorrect
    unhelpful lose f n neg 👎 否 坏 假 错 踩 差 错误 不喜欢 不满意 无用 负面
"""
LABELS = {**dict.fromkeys(_GOOD.split(), 1.0), **dict.fromkeys(_BAD.split(), 0.0)}


@layout(
    "prompt completion label", "messages label", "conversations kto_tag", "messages kto_tag",
    "instruction output label", "instruction output kto_tag", "query response label", "conversations label",
    "prompt response label", grouped=True,
)  # fmt: skip
def kto(row: Row, weights: scoring.Weights) -> CandidateSet:
    """Unpaired: a prompt, one completion and whether it is good; or `messages` and a label. Columns can be mapped."""
    completion = first(row, "completion", "messages", "conversations", "output", "response")
    label = first(row, "label", "kto_tag")
    written = str(label).strip().lower() if isinstance(label, str | int | float) else type(label).__name__
    item = _one_answer(row, _prompt(row, "query"), (completion, "completion"), LABELS.get(written))
    if written not in LABELS:
        good, bad = (", ".join([one for one, of in LABELS.items() if of == value][:5]) for value in (1.0, 0.0))
        raise Malformed(f"label is {written[:40]!r}, neither good ({good}) nor bad ({bad})")
    return item


PROMPTS = ("question", "query", "messages", "conversations")


@layout("prompt", "instruction", *PROMPTS, sampled=True)
def prompts(row: Row, weights: scoring.Weights) -> CandidateSet:
    """A prompt without answers, as text or messages, for a source that the model answers; a last answer is left out."""
    turns = conversation(_prompt(row, *PROMPTS), "prompt", asks=True)
    while not isinstance(turns, str) and turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    prompt, _, notes = prompt_and_answers(turns, [], row)
    return CandidateSet(prompt, [], language=language_code(row.get("language")), notes=notes)


MAPPABLE = {
    "pairs": (
        "prompt", "chosen", "rejected", "system", "language", "score_chosen", "score_rejected", "model_chosen",
        "model_rejected", "history",
    ),
    "kto": ("prompt", "completion", "messages", "label", "system", "language", "model", "history"),
    "prompts": ("prompt", "messages", "system", "language", "history"),
    "chat": ("prompt", "response", "messages", "system", "language", "model", "history"),
}  # fmt: skip
