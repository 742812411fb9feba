"""What drops a prompt, an answer or a pair: one function per reason, in the order in which they are asked.

To add a filter: write its function, add it to the dict of its kind at the end of this file (the key is the reason), and
give it options under "data.filters" in recipe.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_cli.language import mostly_han
from dpo_cli.prepare import scoring
from dpo_cli.prepare.contamination import Contamination
from dpo_cli.prepare.funnel import Drop
from dpo_cli.prepare.markers import special_tokens, without_markers, without_thoughts
from dpo_cli.prepare.text import garbled_by, repeats, similarity
from dpo_cli.recipe import Recipe
from dpo_cli.records import CandidateSet
from dpo_cli.refusal import OPENING, refuses


@dataclass(frozen=True)
class Context:
    """What filters need to know besides the row and their own options.

    Attributes:
        special: what the tokenizer obeys, wherever it stands.
        keep_refusals: of the source.
        repeats_prompts: whether the source's answers begin with their prompts, also with short ones.
    """

    recipe: Recipe
    contamination: Contamination | None = None
    special: re.Pattern[str] = field(default_factory=lambda: special_tokens([]))
    keep_refusals: bool = False
    repeats_prompts: bool = False

    def options(self, reason: str) -> Any:
        """Return what `data.filters` says of a reason; false switches its filter off."""
        return getattr(self.recipe.data.filters, reason)


def min_answers(item: CandidateSet, context: Context) -> int:
    """Return how many answers a prompt needs: two, or one with a label where labelled answers are the rows."""
    return 1 if item.labelled and context.recipe.data.format == "unpaired" else 2


def garbled(item: CandidateSet, options: Any, context: Context) -> str | None:
    """Control characters, U+FFFD or mojibake in the prompt; or such answers, or repetitive ones, left too few."""
    found = next(filter(None, (garbled_by(turn["content"]) for turn in item.prompt)), None)
    if found:
        return f"{found} in the prompt"
    came = len(item.candidates)
    whys = [
        garbled_by(c.text) or ("repetition" if repeats(c.text, options.max_repetition) else None)
        for c in item.candidates
    ]
    item.candidates = [c for c, why in zip(item.candidates, whys, strict=True) if not why]
    if len(item.candidates) < min(came, min_answers(item, context)):
        return f"{next(filter(None, whys))} in an answer"
    return None


def contaminated(item: CandidateSet, options: Any, context: Context) -> str | None:
    """Rows that a source took from a benchmark, and prompts that stand in one of the given files or share a phrase."""
    if item.subset in options.subsets:
        return f"from {item.subset}"
    return context.contamination.matches(item.prompt) if context.contamination else None


def other_language(item: CandidateSet, options: Any, context: Context) -> str | None:
    languages = context.recipe.data.languages
    return None if languages is None or item.language in languages else f"in {item.language}"


# Each takes the answer's text and returns it, cut where a cut fixes it, or None to drop the answer.


def think(text: str, item: CandidateSet, options: Any, context: Context) -> str | None:
    """Thoughts at the start are cut, or kept with model.thinking; what can't be separated drops the answer."""
    return without_thoughts(text, context.recipe.model.thinking)


def markers(text: str, item: CandidateSet, options: Any, context: Context) -> str | None:
    """Tokens that start or end a turn are cut; markers inside, or in the prompt, drop the answer."""
    return without_markers(text, item.prompt, context.special)


def begins_with(asked: str, answer: str) -> bool:
    """Return whether an answer begins with its prompt, and not just with a longer word that begins so."""
    if not asked or not answer.startswith(asked):
        return False
    after = answer[len(asked) : len(asked) + 1]
    return not (asked[-1].isalnum() and after.isalnum() and asked[-1].isascii())


def echo(text: str, item: CandidateSet, options: Any, context: Context) -> str | None:
    """An answer that begins with the whole prompt loses it; one that is nothing else is dropped.

    Prompts below `min_chars` may be repeated by chance: they are cut only in sources that (nearly) always repeat them.
    """
    asked = item.prompt[-1]["content"].strip()
    answer = text.lstrip()
    long = len(asked) >= options.min_chars
    if not (answer.startswith(asked) if long else context.repeats_prompts and begins_with(asked, answer)):
        return text
    return answer[len(asked) :].lstrip() or None


_CONFIDENCE = re.compile(
    r"\s*[(（\[*]*(?:my |overall )?(?:confidence(?: level| score)?|信心(?:水平|指数|程度|值)?|置信度|自信度)[*]*"
    r"\s*(?:[:：=]|is|为|是)?\s*[*]*\s*\d{1,3}(?:\.\d+)?\s*[%％][)）\]*]*\s*[.。]?\s*$",
    re.IGNORECASE,
)
_INTRODUCTION = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\bi(?: am|'m|’m) (?:just |only )?an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\b(?:i am|i'm|i’m|my name is) (?:chatgpt|gpt-?\d|qwen|claude|bard|gemini|llama|alpaca|vicuna|deepseek)\b"
    r"|\b(?:trained|developed|created) by (?:openai|anthropic|google|meta|alibaba|microsoft)\b"
    r"|\bmy (?:knowledge|training)(?: data)? (?:cut-?off|only goes|was last)"
    r"|\bas of my last (?:knowledge |training )?update\b"
    r"|作为一?[个名款]?(?:大型)?(?:AI|人工智能|语言模型|智能助手)|我(?:只)?是一?[个名款]?(?:大型)?(?:AI|人工智能|语言模型)"
    r"|我是(?:ChatGPT|通义千问|文心一言|Qwen|Claude|豆包|DeepSeek)|我的(?:知识|训练数据)(?:库)?截止",
    re.IGNORECASE,
)
# Every introduction holds one of these, and to look for them first is ten times as fast.
_INTRODUCTION_WORDS = (
    " ai", "artificial", "language model", "chatgpt", "gpt", "qwen", "claude", "bard", "gemini", "llama", "alpaca",
    "vicuna", "deepseek", "openai", "anthropic", "google", "meta", "alibaba", "microsoft", "cut-off", "cutoff",
    "my training", "my knowledge", "as of my", "作为", "我是", "我只是", "截止",
)  # fmt: skip


def template(text: str, item: CandidateSet, options: Any, context: Context) -> str | None:
    """Canned text: a closing `Confidence: 80%` is cut, a refusal or self-introduction drops the answer."""
    if text[-12:].count("%") or text[-12:].count("％"):
        found = _CONFIDENCE.search(text, max(len(text) - 80, 0))
        text = text[: found.start()] if found else text
    if context.keep_refusals:
        return text
    opening = text[:OPENING].lower()
    introduces = any(map(opening.__contains__, _INTRODUCTION_WORDS)) and _INTRODUCTION.search(opening)
    return None if introduces or refuses(text) else text


def short(text: str, item: CandidateSet, options: Any, context: Context) -> str | None:
    """Fewer than `min_chars` characters, or `min_han` where they are Chinese."""
    length = len(text.strip())
    return text if length >= options.min_chars or (length >= options.min_han and mostly_han(text)) else None


# Each takes a set and the indexes of its chosen and rejected answer, and says why the pair must go, or None.


def contradicts_scores(item: CandidateSet, chosen: int, rejected: int, options: Any, context: Context) -> str | None:
    below = " is below ".join(f"{name} {value:g}" for name, value in item.stated.items())
    return below if (item.lead() or 0.0) < 0 else None


def identical(item: CandidateSet, chosen: int, rejected: int, options: Any, context: Context) -> str | None:
    alike = similarity(item.candidates[chosen].text, item.candidates[rejected].text, options.similarity)
    return f"{alike:.0%} alike" if alike >= options.similarity else None


def tie(item: CandidateSet, chosen: int, rejected: int, options: Any, context: Context) -> str | None:
    return "both score the same" if scoring.margin(item, chosen, rejected) == 0 or item.lead() == 0 else None


def low_margin(item: CandidateSet, chosen: int, rejected: int, options: Any, context: Context) -> str | None:
    margin = scoring.margin(item, chosen, rejected)
    return f"margin {margin:.3f}" if margin is not None and margin < context.recipe.data.pairs.min_margin else None


def low_chosen(item: CandidateSet, chosen: int, rejected: int, options: Any, context: Context) -> str | None:
    score, least = item.candidates[chosen].score, context.recipe.data.pairs.min_chosen_score
    return f"chosen scores {score:.3f}" if score is not None and least is not None and score < least else None


PromptFilter = Callable[[CandidateSet, Any, Context], str | None]
AnswerFilter = Callable[[str, CandidateSet, Any, Context], str | None]
PairFilter = Callable[[CandidateSet, int, int, Any, Context], str | None]

PROMPT_FILTERS: dict[str, PromptFilter] = {
    "garbled": garbled, "contaminated": contaminated, "language": other_language,
}  # fmt: skip
ANSWER_FILTERS: dict[str, AnswerFilter] = {
    "think": think, "markers": markers, "echo": echo, "template": template, "short": short,
}  # fmt: skip
PAIR_FILTERS: dict[str, PairFilter] = {
    "contradicts_scores": contradicts_scores, "identical": identical, "tie": tie, "margin": low_margin,
    "low_chosen": low_chosen,
}  # fmt: skip
# In the order of the contract. No function above gives `schema` and `unsupported` (layouts.py), `duplicate` and
# `near_duplicate` (dedup.py), `cut_off` (own_answers.py), nor what is found by counting answers or tokens (`clean` and
# `fit` below).
REASONS = (
    "schema", "unsupported", "garbled", "contaminated", "language", "duplicate", "near_duplicate",
    "cut_off", "no_response", "single_response", "disagreement", "think", "markers", "echo", "template", "short",
    "no_score",
    "contradicts_scores", "identical", "tie", "margin", "low_chosen", "too_long", "length_ratio",
)  # fmt: skip
EDITS = {  # what a cut is called
    "think": "think_stripped", "markers": "end_token_stripped", "echo": "echo_stripped",
    "template": "confidence_stripped",
}  # fmt: skip


def screen(item: CandidateSet, context: Context) -> Drop | None:
    """Return what the first prompt filter that drops a set says of it; garbled answers are taken out of it."""
    for reason, ask in PROMPT_FILTERS.items():
        options = context.options(reason)
        detail = ask(item, options, context) if options else None
        if detail:
            return reason, detail
    return None


def clean(item: CandidateSet, context: Context, edits: Counter[str]) -> Drop | None:
    """Drop and fix a set's answers in place, and return why it goes where too few are left.

    Every cut is counted in `edits` by its name, every dropped answer by its reason.
    """
    came, needed, disagreement = len(item.candidates), min_answers(item, context), context.options("disagreement")
    if came < needed:
        return ("single_response", "one answer") if came else ("no_response", "no answer")
    if disagreement:
        agreed = [one for one in item.candidates if (one.spread or 0.0) <= disagreement.max_spread]
        edits["disagreement"] += came - len(agreed)
        item.candidates = agreed
        if len(agreed) < needed:
            return "disagreement", f"{len(agreed)} of {came} answers left on which raters agree"
    for reason, ask in ANSWER_FILTERS.items():
        options = context.options(reason)
        if not options:
            continue
        kept = []
        for candidate in item.candidates:
            text = ask(candidate.text, item, options, context)
            if text is None:
                edits[reason] += 1
                continue
            if text != candidate.text:
                edits["think_renamed" if reason == "think" and context.recipe.model.thinking else EDITS[reason]] += 1
                candidate.text = text
            kept.append(candidate)
        item.candidates = kept
        if len(kept) < needed:
            return reason, f"{len(kept)} of {came} answers left"
    written = [candidate for candidate in item.candidates if candidate.text.strip()]
    edits["short"] += len(item.candidates) - len(written)
    item.candidates = written if item.ranked else [candidate for candidate in written if candidate.score is not None]
    edits["no_score"] += len(written) - len(item.candidates)
    if len(written) < needed:
        return "short", "an empty answer"
    if len(item.candidates) < needed:
        return "no_score", f"{len(item.candidates)} of {came} answers have a score"
    if item.labelled:  # last, for a cut may make answers equal
        edits.update(scoring.settle_labels(item))
        if len(item.candidates) < needed:
            return "identical", "the same answer again, or one that is called both good and bad"
    return None


Picks = list[tuple[int, ...]]  # candidate indexes of each row


def compare(item: CandidateSet, picks: Picks, context: Context) -> tuple[Picks, Drop | None]:
    """Return the pairs (or rankings: first against last) that may stay, and why the last of them went if none may."""
    for reason, ask in PAIR_FILTERS.items():
        options = context.options(reason)
        if not options:
            continue
        details = [ask(item, one[0], one[-1], options, context) if len(one) > 1 else None for one in picks]
        kept = [one for one, detail in zip(picks, details, strict=True) if not detail]
        if not kept:
            return [], (reason, next(filter(None, details), ""))
        picks = kept
    return picks, None


def fit(recipe: Recipe, picks: Picks, prompt: int, totals: Mapping[int, int]) -> tuple[Picks, Drop | None]:
    """Return the rows that the model can read whole, and why none is left.

    Args:
        picks: of each row; a ranking loses the candidates that don't fit, a pair goes as a whole.
        prompt: tokens of the prompt as the chat template renders it, up to where the answer starts.
        totals: tokens of prompt + answer, by candidate.
    """
    filters, max_length = recipe.data.filters, recipe.model.max_length
    if filters.too_long:
        if prompt > filters.too_long.max_prompt * max_length:
            return [], ("too_long", f"prompt of {prompt:,} tokens")
        short = [tuple(index for index in one if totals[index] <= max_length) for one in picks]
        picks = [new for new, old in zip(short, picks, strict=True) if new == old or len(new) > 1]
        if not picks:
            return [], ("too_long", f"{max(totals.values()):,} tokens")
    if filters.length_ratio:
        most = filters.length_ratio.max
        lengths = [[max(totals[index] - prompt, 1) for index in (one[0], one[-1])] for one in picks]
        picks = [one for one, both in zip(picks, lengths, strict=True) if max(both) <= most * min(both)]
        if not picks:
            return [], ("length_ratio", f"longer by more than {most:g}")
    return picks, None
