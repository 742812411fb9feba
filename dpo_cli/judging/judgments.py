"""What is asked of judges and what they said: matches, judgments, and the one file that all runs keep replies in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
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


class Cache:
    """The answers to some keys, out of a JSONL file that only ever grows: `{"key": …, "value": …}` a line.

    Attributes:
        known: key -> value, of the keys that were asked for.
    """

    def __init__(self, path: Path, keys: set[str]) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        if not path.exists():
            return
        with open(path, "rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    if row["key"] in keys:
                        self.known[row["key"]] = row["value"]
                except (ValueError, TypeError, KeyError):
                    continue  # cut short by a kill; it is asked again

    def add(self, key: str, value: Any) -> None:
        """Remember a value, on disk before this returns; a line that a kill left unfinished is ended first."""
        from filelock import FileLock

        self.known[key] = value
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"), open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)


def key_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
