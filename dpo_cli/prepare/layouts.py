"""The layouts of preference data: one function each, from a raw row to a set of candidates.

A function takes a row and the source's settings and returns a CandidateSet, or raises `Malformed`; columns it doesn't
know are ignored. To add a layout: write its function where `auto` is to try it, and add it to `Layout` in recipe.py.
`read.py` calls them, and refuses rows of tools and images whatever their layout.
"""

from __future__ import annotations

from typing import Any

from dpo_cli.prepare import rated_layouts, scoring  # noqa: F401 (whose layouts are tried first)
from dpo_cli.prepare.messages import (
    Malformed,
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
from dpo_cli.prepare.preferred import SIDES, Row, Settings, has_prompt, language_code, layout, preferred, sides
from dpo_cli.records import Candidate, CandidateSet


@layout("prompt answers")
def nectar(row: Row, settings: Settings) -> CandidateSet:
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
def arena(row: Row, settings: Settings) -> CandidateSet:
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
def sharegpt(row: Row, settings: Settings) -> CandidateSet:
    """LLaMA-Factory's ShareGPT ranking: `conversations`, and a chosen and a rejected turn."""
    return preferred(row, list_of(row.get("conversations"), "conversations"), sides(row))


@layout("messages rejected_response", "messages rejected_messages", "query response rejected_response")
def swift(row: Row, settings: Settings) -> CandidateSet:
    """ms-swift: `messages` that end in the chosen answer, or `query`, `response` and `history`; and a rejected one."""
    chosen, rejected = first(row, "messages", "response"), first(row, "rejected_messages", "rejected_response")
    return preferred(row, row.get("query"), [(chosen, "the chosen answer"), (rejected, "the rejected answer")])


def _has_no_prompt(row: Row) -> bool:
    return row.get("prompt") is None


@layout("chosen rejected", looks_so=lambda row: _has_no_prompt(row) and all(is_transcript(row[side]) for side in SIDES))
def hh_rlhf(row: Row, settings: Settings) -> CandidateSet:
    """Anthropic/hh-rlhf: two transcripts that differ in their last answer; no scores."""
    for side in SIDES:
        if not is_transcript(row.get(side)):
            raise Malformed(f"{side} is not a Human/Assistant transcript")
    return preferred(row, None, sides(row))


@layout(
    "system question chosen rejected", "system input chosen rejected",
    looks_so=lambda row: _has_no_prompt(row) and row.get("instruction") is None,
)  # fmt: skip
def orca(row: Row, settings: Settings) -> CandidateSet:
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
def chat(row: Row, settings: Settings) -> CandidateSet:
    """Instruction data with one answer, a good one: `messages`, ShareGPT's, prompt and response, Alpaca's."""
    talk = first(row, "messages", "conversations")
    if talk is not None:
        return _one_answer(row, None, (talk, "the answer"), 1.0)
    prompt = _prompt(row, settings, "query", "question")
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


def _prompt(row: Row, settings: Settings, *others: str) -> Any:
    """The prompt column, with its input, where a row has both as text; else the instruction; else another column."""
    asked, given = row.get("prompt"), row.get("input")
    if asked is None and others:
        return _instructed(row) if is_given(row.get("instruction")) else first(row, *others)
    again = not isinstance(asked, str) or not isinstance(given, str) or given.strip() in asked
    return asked if again and settings.columns.get("prompt") != "instruction" else _instructed(row, "prompt")


def _instructed(row: Row, instruction: str = "instruction") -> Any:
    """Instruction and input as Alpaca's template joins them: a blank line in between."""
    asked, given = row.get(instruction), row.get("input")
    if not is_given(given):
        return asked
    return f"{text_of(asked, instruction)}\n\n{text_of(given, 'input')}" if is_given(asked) else given


def _is_alpaca(row: Row) -> bool:  # a label would make it a row of `kto`
    return _has_no_prompt(row) and ("chosen" in row or first(row, "label", "kto_tag") is None)


@layout("instruction chosen rejected", "instruction output", looks_so=_is_alpaca)
def alpaca(row: Row, settings: Settings) -> CandidateSet:
    """LLaMA-Factory's Alpaca: `instruction`, `input`, and chosen and rejected, or `output`, one answer or both."""
    prompt, output = _instructed(row), row.get("output")
    output = literal(output) if isinstance(output, str) and output.lstrip().startswith("[") else output
    if isinstance(output, list) and len(output) == 2:
        return preferred(row, prompt, [(one, "output") for one in output])
    if first(row, *SIDES) is not None:
        return preferred(row, prompt, sides(row))
    return _one_answer(row, prompt, (row.get("output"), "output"), ranked=True)


@layout("prompt chosen rejected", "chosen rejected", looks_so=has_prompt)
def pairs(row: Row, settings: Settings) -> CandidateSet:
    """Any prompt, chosen, rejected, as text or messages; scores count where they are on 0..1. Columns can be mapped."""
    item = preferred(row, _prompt(row, settings), sides(row))
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
def kto(row: Row, settings: Settings) -> CandidateSet:
    """Unpaired: a prompt, one completion and whether it is good; or `messages` and a label. Columns can be mapped."""
    completion = first(row, "completion", "messages", "conversations", "output", "response")
    label = first(row, "label", "kto_tag")
    written = str(label).strip().lower() if isinstance(label, str | int | float) else type(label).__name__
    item = _one_answer(row, _prompt(row, settings, "query"), (completion, "completion"), LABELS.get(written))
    if written not in LABELS:
        good, bad = (", ".join([one for one, of in LABELS.items() if of == value][:5]) for value in (1.0, 0.0))
        raise Malformed(f"label is {written[:40]!r}, neither good ({good}) nor bad ({bad})")
    return item


PROMPTS = ("question", "query", "messages", "conversations")


@layout("prompt", "instruction", *PROMPTS, sampled=True)
def prompts(row: Row, settings: Settings) -> CandidateSet:
    """A prompt without answers, as text or messages, for a source that the model answers; a last answer is left out."""
    turns = conversation(_prompt(row, settings, *PROMPTS), "prompt", asks=True)
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
