"""The layouts of preference data: one function each, from a raw row to a set of candidates.

A function takes a row and the source's settings and returns a CandidateSet, or raises `Malformed`; columns it doesn't
know are ignored. To add a layout: write its function, add it to LAYOUTS below and to `Layout` in recipe.py.
`read_row.py` calls them, and refuses rows of tools and images whatever their layout.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from dpo_cli.prepare import rated_layouts as rated
from dpo_cli.prepare import scoring
from dpo_cli.prepare.messages import (
    Malformed,
    conversation,
    first,
    is_said,
    is_transcript,
    label_of,
    list_of,
    literal,
    map_of,
    model_of,
    prompt_and_answers,
    system_of,
    text_of,
)  # fmt: skip
from dpo_cli.prepare.preferred import SIDES, Row, Settings, preferred, sides, spoken
from dpo_cli.records import Candidate, CandidateSet


def hh_rlhf(row: Row, settings: Settings) -> CandidateSet:
    """Anthropic/hh-rlhf: two transcripts that differ in their last answer; no scores."""
    for side in SIDES:
        if not is_transcript(row.get(side)):
            raise Malformed(f"{side} is not a Human/Assistant transcript")
    return preferred(row, None, sides(row))


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
    said = [(one.get("answer"), "answer") for one in ordered]
    prompt, texts, notes = prompt_and_answers(row.get("prompt"), said, system_of(row))
    candidates = [Candidate(text, None, model_of(one.get("model"))) for text, one in zip(texts, ordered, strict=True)]
    return CandidateSet(prompt, candidates, source="", ranked=True, notes=notes)


def sharegpt(row: Row, settings: Settings) -> CandidateSet:
    """LLaMA-Factory's ShareGPT ranking: `conversations`, and a chosen and a rejected turn."""
    turns = list_of(row.get("conversations"), "conversations")
    return preferred(row, turns, sides(row), system_of(row))


def swift(row: Row, settings: Settings) -> CandidateSet:
    """ms-swift: `messages` that end in the chosen answer, or `query`, `response` and `history`; and a rejected one."""
    chosen, rejected = first(row, "messages", "response"), first(row, "rejected_messages", "rejected_response")
    answers = [(chosen, "the chosen answer"), (rejected, "the rejected answer")]
    return preferred(row, row.get("query"), answers, system_of(row), row.get("history"))


def alpaca(row: Row, settings: Settings) -> CandidateSet:
    """LLaMA-Factory's Alpaca: `instruction`, `input`, and chosen and rejected, or `output`, one answer or both."""
    prompt, output = _instructed(row), row.get("output")
    output = literal(output) if isinstance(output, str) and output.lstrip().startswith("[") else output
    if isinstance(output, list) and len(output) == 2:
        return preferred(row, prompt, [(one, "output") for one in output], system_of(row), row.get("history"))
    if first(row, *SIDES) is not None:
        return preferred(row, prompt, sides(row), system_of(row), row.get("history"))
    answer = [(row.get("output"), "output")]
    asked, texts, notes = prompt_and_answers(prompt, answer, system_of(row), row.get("history"))
    return CandidateSet(asked, [Candidate(texts[0])], source="", ranked=True, notes=notes)


def _instructed(row: Row, instruction: str = "instruction") -> Any:
    """Instruction and input as Alpaca's template joins them: a blank line in between."""
    asked, given = row.get(instruction), row.get("input")
    if not is_said(given):
        return asked
    return f"{text_of(asked, instruction)}\n\n{text_of(given, 'input')}" if is_said(asked) else given


def orca(row: Row, settings: Settings) -> CandidateSet:
    """Intel/orca_dpo_pairs and its kin: `system`, `question` (argilla: `input`), chosen, rejected."""
    return preferred(row, first(row, "question", "input"), sides(row), system_of(row))


TIES = ("tie", "tie (bothbad)", "both_bad", "bothbad", "both_good")


def arena(row: Row, settings: Settings) -> CandidateSet:
    """Chatbot Arena: two conversations and the `winner`, model_a, model_b or a tie, which scores both alike.

    Also lmsys-arena-human-preference-55k: lists of prompts and responses, and three columns for the winner.
    """
    winner = row.get("winner")
    if winner is None:
        winner = next(
            (name for name in ("model_a", "model_b", "tie") if scoring.number(row.get(f"winner_{name}"))), None
        )
    winner = text_of(winner, "winner").strip().lower()
    side = winner.removeprefix("model_")
    if side not in ("a", "b") and winner not in TIES:
        raise Malformed(f"winner is {winner[:40]!r}; known are model_a, model_b, {', '.join(TIES)}")
    answers = [(_arena_turns(row, name), f"conversation_{name}") for name in ("a", "b")]
    asked, texts, notes = prompt_and_answers(None, answers)
    candidates = [
        Candidate(text, None if side in ("a", "b") else 0.5, model_of(row.get(name)))
        for text, name in zip(texts, ("model_a", "model_b"), strict=True)
    ]
    ordered = candidates[::-1] if side == "b" else candidates
    return CandidateSet(asked, ordered, source="", language=spoken(row.get("language")), ranked=True, notes=notes)


def _arena_turns(row: Row, side: str) -> Any:
    """A side's messages up to the turn that was judged (MT-bench judges the first of two)."""
    if row.get(f"conversation_{side}") is not None:
        turns = list_of(conversation(row[f"conversation_{side}"], f"conversation_{side}"), f"conversation_{side}")
        judged = scoring.number(row.get("turn"))
        return turns[: int(2 * judged)] if judged and judged >= 1 else turns
    written = [literal(text_of(row.get(name), name)) for name in ("prompt", f"response_{side}")]
    asked, said = (list_of(value, name) for value, name in zip(written, ("prompt", f"response_{side}"), strict=True))
    if len(asked) != len(said):
        raise Malformed(f"prompt has {len(asked)} turns, response_{side} {len(said)}")
    roles = ("user", "assistant")
    exchanges = zip(asked, said, strict=True)
    return [{"role": role, "content": text} for both in exchanges for role, text in zip(roles, both, strict=True)]


def pairs(row: Row, settings: Settings) -> CandidateSet:
    """Any prompt, chosen, rejected, as text or messages; scores count where they are on 0..1. Columns can be mapped."""
    ours = _mapped(row, settings)
    item = preferred(ours, _prompt(ours, settings), sides(ours), system_of(ours), ours.get("history"))
    item.subset = label_of(ours.get("subset"))
    return item


def _prompt(row: Row, settings: Settings) -> Any:
    """The prompt column; with its input, where a row has both as text."""
    asked, given = row.get("prompt"), row.get("input")
    again = not isinstance(asked, str) or not isinstance(given, str) or given.strip() in asked
    return asked if again and settings.columns.get("prompt") != "instruction" else _instructed(row, "prompt")


def kto(row: Row, settings: Settings) -> CandidateSet:
    """Unpaired: a prompt, one completion and whether it is good; or `messages` and a label. Columns can be mapped."""
    ours = _mapped(row, settings)
    completion = first(ours, "completion", "messages", "conversations", "output", "response")
    prompt = _prompt(ours, settings)
    if prompt is None:
        prompt = _instructed(ours) if is_said(ours.get("instruction")) else ours.get("query")
    answer = [(completion, "completion")]
    asked, texts, notes = prompt_and_answers(prompt, answer, system_of(ours), ours.get("history"))
    label = first(ours, "label", "kto_tag")
    written = str(label).strip().lower() if isinstance(label, str | int | float) else type(label).__name__
    if written not in LABELS:
        raise Malformed(f"label is {written[:40]!r}, neither good ({_some(1.0)}) nor bad ({_some(0.0)})")
    candidate = Candidate(texts[0], LABELS[written], model_of(ours.get("model")))
    language = spoken(ours.get("language"))
    return CandidateSet(asked, [candidate], source="", language=language, labelled=True, notes=notes)


def prompts(row: Row, settings: Settings) -> CandidateSet:
    """A prompt without answers, as text or messages, for a source that the model answers; a last answer is left out."""
    ours = _mapped(row, settings)
    asked = _prompt(ours, settings)
    if asked is None:
        asked = _instructed(ours) if is_said(ours.get("instruction")) else first(ours, *PROMPTS)
    turns = conversation(asked, "prompt", asks=True)
    while not isinstance(turns, str) and turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    prompt, _, notes = prompt_and_answers(turns, [], system_of(ours), ours.get("history"))
    return CandidateSet(prompt, [], source="", language=spoken(ours.get("language")), notes=notes)


PROMPTS = ("question", "query", "messages", "conversations")


def chat(row: Row, settings: Settings) -> CandidateSet:
    """Instruction data with one answer, a good one: `messages`, ShareGPT's, prompt and response, Alpaca's."""
    ours = _mapped(row, settings)
    said = first(ours, "messages", "conversations")
    prompt = None
    if said is None:
        said, prompt = first(ours, *ANSWERS), _prompt(ours, settings)
        if prompt is None:
            prompt = _instructed(ours) if is_said(ours.get("instruction")) else first(ours, "query", "question")
    asked, texts, notes = prompt_and_answers(prompt, [(said, "the answer")], system_of(ours), ours.get("history"))
    candidate = Candidate(texts[0], 1.0, model_of(ours.get("model")))
    language = spoken(ours.get("language"))
    return CandidateSet(asked, [candidate], source="", language=language, labelled=True, notes=notes)


ANSWERS = ("response", "completion", "output", "answer")

_GOOD = """
    true 1 1.0 yes good chosen desirable positive accepted preferred like liked up thumbs_up upvote correct helpful win
    +1 t y pos 👍 是 好 真 对 赞 正确 喜欢 满意 有用 正面
"""
_BAD = """
    false 0 0.0 -1 -1.0 no bad rejected undesirable negative dislike disliked down thumbs_down downvote incorrect
    unhelpful lose f n neg 👎 否 坏 假 错 踩 差 错误 不喜欢 不满意 无用 负面
"""
LABELS = {**dict.fromkeys(_GOOD.split(), 1.0), **dict.fromkeys(_BAD.split(), 0.0)}


def _some(value: float) -> str:
    return ", ".join([label for label, of in LABELS.items() if of == value][:5])


MAPPABLE = {
    "pairs": (
        "prompt", "chosen", "rejected", "system", "language", "score_chosen", "score_rejected", "model_chosen",
        "model_rejected", "history",
    ),
    "kto": ("prompt", "completion", "messages", "label", "system", "language", "model", "history"),
    "prompts": ("prompt", "messages", "system", "language", "history"),
    "chat": ("prompt", "response", "messages", "system", "language", "model", "history"),
}  # fmt: skip


def _mapped(row: Row, settings: Settings) -> Row:
    """The row under our names; a view, so that what is read of it is known."""
    if not settings.columns:
        return row
    return ChainMap({ours: row.get(theirs) for ours, theirs in settings.columns.items()}, cast(dict[str, Any], row))


# ---------------------------------------------------------------------------------------------------- all of them


@dataclass(frozen=True)
class LayoutOf:
    """A layout: its function, the columns it can't do without (any of the sets), and how else to tell it.

    `reads`: the names it needs inside a parquet file (None: all). `grouped`: rows with one prompt belong together.
    `sampled`: it has no answers, so that only a source with `sample` can have it.
    `lone`: an answer has no other beside it, so `auto` looks for it only where the method needs none.
    """

    read: Callable[[Row, Settings], CandidateSet]
    needs: tuple[frozenset[str], ...]
    looks_so: Callable[[Row], bool] = lambda row: True
    reads: frozenset[str] | None = None
    grouped: bool = False
    sampled: bool = False
    lone: bool = False


def _names(columns: str) -> frozenset[str]:
    return frozenset(columns.split())


def _sets(*columns: str) -> tuple[frozenset[str], ...]:
    return tuple(map(_names, columns))


def _openbmb(row: Row) -> bool:
    """The English set's completions carry a critique; the Chinese set's don't."""
    completions = row["completions"]
    return isinstance(completions, list) and any(isinstance(c, dict) and "critique" in c for c in completions)


def _beyond_one(row: Row) -> bool:
    """A score above 1: these sets count to 5 or 10, plain pairs to 1."""
    scores = (row.get("chosen-rating"), row.get("score_chosen"), row.get("score_rejected"))
    return _has_prompt(row) and any(scoring.rating(score, *scoring.OVERALL_1_TO_10) for score in scores)


def _has_prompt(row: Row) -> bool:
    """A prompt in a column of its own or in front of the answers; what is neither needs a column map."""
    if row.get("prompt") is not None:
        return True
    said = conversation(row["chosen"], "chosen")
    return not isinstance(said, str) and len(said) > 1


def _has_no_prompt(row: Row) -> bool:
    return row.get("prompt") is None


def _is_alpaca(row: Row) -> bool:
    """No prompt beside the instruction, and no label, which makes it a row of `kto`."""
    return _has_no_prompt(row) and ("chosen" in row or first(row, "label", "kto_tag") is None)


def _is_chat(row: Row) -> bool:
    """One answer, which nothing calls good or bad; `messages` end in it."""
    if first(row, *SIDES, "label", "kto_tag", "rejected_response", "rejected_messages") is not None:
        return False
    said = first(row, "messages", "conversations")
    if said is None:
        return isinstance(first(row, *ANSWERS), str)
    turns = conversation(said, "messages")
    return not isinstance(turns, str) and turns[-1:] != [] and turns[-1]["role"] == "assistant"


def _are_transcripts(row: Row) -> bool:
    return _has_no_prompt(row) and all(is_transcript(row[side]) for side in SIDES)


_ASPECTS = "helpfulness honesty truthfulness instruction_following"
_COMPLETIONS = _names(f"instruction source completions response model annotations Rating {_ASPECTS}")
_BINARIZED = "chosen_response rejected_response chosen_rating rejected_rating"

# In the order in which `auto` tries them: the more telling columns first.
LAYOUTS: dict[str, LayoutOf] = {
    "ultrafeedback": LayoutOf(rated.ultrafeedback, _sets("instruction completions"), _openbmb, _COMPLETIONS),
    "ultrafeedback_zh": LayoutOf(
        rated.ultrafeedback_zh, _sets("instruction completions", f"instruction {_BINARIZED}"),
        reads=_COMPLETIONS | _names(_BINARIZED),
    ),
    "ultrafeedback_binarized": LayoutOf(
        rated.ultrafeedback_binarized,
        _sets("chosen rejected chosen-rating rejected-rating", "chosen rejected score_chosen score_rejected"),
        _beyond_one,
    ),
    "helpsteer2": LayoutOf(
        rated.helpsteer2, _sets("prompt response helpfulness correctness coherence complexity verbosity"), grouped=True
    ),
    "helpsteer2_preference": LayoutOf(
        rated.helpsteer2_preference, _sets("prompt response_1 response_2 preference_strength"),
        reads=_names("prompt response_1 response_2 preference_strength"),
    ),
    "helpsteer3": LayoutOf(
        rated.helpsteer3, _sets("context response1 response2 overall_preference"),
        reads=_names("domain language context role content response1 response2 overall_preference"),
    ),
    "nectar": LayoutOf(nectar, _sets("prompt answers")),
    "arena": LayoutOf(
        arena,
        _sets("conversation_a conversation_b winner", "prompt response_a response_b winner_model_a winner_model_b"),
    ),
    "sharegpt": LayoutOf(sharegpt, _sets("conversations chosen rejected")),
    "swift": LayoutOf(
        swift,
        _sets("messages rejected_response", "messages rejected_messages", "query response rejected_response"),
    ),
    "hh_rlhf": LayoutOf(hh_rlhf, _sets("chosen rejected"), _are_transcripts),
    "orca": LayoutOf(
        orca, _sets("system question chosen rejected", "system input chosen rejected"),
        lambda row: _has_no_prompt(row) and row.get("instruction") is None,
    ),
    "chat": LayoutOf(
        chat,
        _sets(
            "messages", "conversations", "prompt response", "prompt completion", "instruction output",
            "instruction response", "query response", "question answer",
        ),
        _is_chat, lone=True,
    ),
    "alpaca": LayoutOf(alpaca, _sets("instruction chosen rejected", "instruction output"), _is_alpaca),
    "pairs": LayoutOf(pairs, _sets("prompt chosen rejected", "chosen rejected"), _has_prompt),
    "kto": LayoutOf(
        kto,
        _sets(
            "prompt completion label", "messages label", "conversations kto_tag", "messages kto_tag",
            "instruction output label", "instruction output kto_tag", "query response label", "conversations label",
            "prompt response label",
        ),
        grouped=True,
    ),
    "prompts": LayoutOf(prompts, _sets("prompt", "instruction", *PROMPTS), sampled=True),
}  # fmt: skip
