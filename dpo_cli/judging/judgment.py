"""What a judge is asked and answers: two answers to a prompt, and which is the better one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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


class Said(TypedDict):
    """What the judge said of one order: its verdict by place (None: there was none), and its words."""

    verdict: Verdict | None
    text: str


@dataclass(frozen=True)
class Judgment:
    """What became of a match.

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
    orders: list[Said] = field(default_factory=list)
    difference: float | None = None
    cut: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Judgment:
        return cls(**row)


def key_of(*parts: Any) -> str:
    """Return the sha256 of what decides a reply: its key in the store."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
