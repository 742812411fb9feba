"""Judges: which of two answers to a prompt is the better one. A kind of judge is a file of this folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict

from dpo_cli.recipe import OpenAIJudge, RewardModelJudge
from dpo_cli.records import Message

Settings = OpenAIJudge | RewardModelJudge
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


class Judge(Protocol):
    """What each kind's file offers, for its own settings; arguments and errors as of the functions below."""

    def judge(self, settings: Any, matches: Sequence[Match], store: Path, progress: bool) -> list[Judgment]: ...

    def ready(self, settings: Any) -> str | None: ...


def _kind(settings: Settings) -> Judge:
    if settings.kind == "openai":
        from dpo_cli.judging import server

        return server
    from dpo_cli.judging import reward_model

    return reward_model


def judge(settings: Settings, matches: Sequence[Match], store: Path, *, progress: bool) -> list[Judgment]:
    """Judge every match; the judgments come in their order.

    Args:
        settings: `eval.judge`.
        matches: what to judge; ids may repeat.
        store: the file of all that judges have said, see `Store`; nothing in it is asked again.
        progress: show a bar on stderr, where that is a terminal.

    Raises:
        DpoError: the judge can't be reached or used at all. One match that it can't do is a failure, not an error.
    """
    return _kind(settings).judge(settings, matches, store, progress)


def ready(settings: Settings) -> str | None:
    """Find out before an hour of sampling what `judge` would fail on after it: no client, no key, no model.

    Returns:
        A remark where a server is not there yet. That is no error: on one card it may have to wait for the sampling.

    Raises:
        DpoError: as `judge`, but for what only a request or the weights can tell.
    """
    return _kind(settings).ready(settings)


def key_of(*parts: Any) -> str:
    """Return the sha256 of what decides a reply: its key in the store."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
