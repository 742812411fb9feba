"""What a judge is asked and answers: two answers to a prompt, and which is the better one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from dpo_cli.records import Message

Verdict = Literal["A", "B", "tie"]


@dataclass(frozen=True)
class Match:
    """Two answers to one prompt; `first` is the one whose share is counted."""

    id: str
    prompt: list[Message]
    first: str
    second: str


class Reading(TypedDict):
    """What the judge replied to one order: its verdict by place (None: there was none), and its words."""

    verdict: Verdict | None
    text: str


@dataclass(frozen=True)
class Judgment:
    """What became of a match; a line of judgments.jsonl.

    Attributes:
        score: the share that goes to `first`: 0, ¼, ½, ¾ or 1, the mean of both orders with a tie as ½; None where an
            order gave no verdict.
        orders: of a judge that reads both: first as A, then first as B. Empty where the answers are the same text
            (½, unasked) and with a reward model.
        difference: with a reward model, score(first) - score(second), in its own unit.
        cut: a reward model saw one of the answers shortened to `max_length`.
    """

    id: str
    score: float | None
    orders: list[Reading] = field(default_factory=list)
    difference: float | None = None
    cut: bool = False


def key_of(*parts: Any) -> str:
    """Return the sha256 of what decides a reply: its key in the store."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def fill(template: str, prompt: Sequence[Message], *answers: str, **more: str) -> str:
    """Fill a template with a conversation and answers to it, by their names; `tag` ends the names of its tags.

    The tag is a hash of all the texts, so that none of them can hold the end of its own.
    """
    conversation = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)
    texts = dict(zip(("answer", "other"), (one or "(no text)" for one in answers), strict=False))
    return template.format(tag=key_of(conversation, *answers)[:12], conversation=conversation, **texts, **more)


def without_thoughts(text: str) -> str:
    """A reply without its thinking; an end of it without a beginning is that of a template which opens it itself."""
    return re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL).rpartition("</think>")[2]
