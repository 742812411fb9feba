"""The two records that travel: a prompt with its scored candidates, and the pair made of it; and their JSONL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from dpo_cli.errors import DpoError

# What a row of data/*.jsonl is called, by `data.format`: a prompt has all its answers, a row one labelled answer.
ROWS_ARE = {"pairs": "pairs", "ranked": "prompts", "unpaired": "rows"}


class Message(TypedDict):
    """One chat turn; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass
class Candidate:
    """One answer to a prompt. `score` is in 0..1 (higher is better), None where the source gives none.

    `spread`: how far its raters are apart, on their own scale; None where the source has but one rating, or a mean.
    """

    text: str
    score: float | None = None
    model: str | None = None
    spread: float | None = None


@dataclass
class CandidateSet:
    """A prompt and the answers to it, in the source's order; the record every layout is read into.

    `subset` is the source's own name for where the prompt came from (UltraFeedback's `source` column), if any.
    `ranked`: the source gives an order, and the candidates stand in it, best first, with or without scores.
    `labelled`: the source calls each answer good or bad (score 1 or 0), without comparing them.
    `place`: the file and line (or row, where a file has no lines) that it was read from, the first of several.
    `stated`: what the source scores chosen and rejected, by its columns' names and on its own scale.
    `notes`: what its layout left out of the row.
    `lost`, `drop`: of sampled answers, how many are gone already, by drop reason; and why the prompt goes, if it must.
    """

    prompt: list[Message]
    candidates: list[Candidate]
    source: str = ""
    language: str | None = None
    subset: str | None = None
    ranked: bool = False
    labelled: bool = False
    place: str = ""
    stated: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lost: dict[str, int] = field(default_factory=dict)
    drop: tuple[str, str] | None = None

    def lead(self) -> float | None:
        """By how much the source itself scores chosen above rejected; None where it scores neither."""
        if not self.stated:
            return None
        chosen, rejected = self.stated.values()
        return chosen - rejected


@dataclass(frozen=True)
class Pair:
    """A row of `data/train.jsonl` and `data/eval.jsonl`, as TRL's DPOTrainer reads it.

    `margin` is score_chosen - score_rejected, in 0..1; the three are None where the source has no scores.
    """

    id: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    language: str
    source: str
    margin: float | None = None
    score_chosen: float | None = None
    score_rejected: float | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Pair:
        """A row of pairs as it is; of a ranked list, which stands best first, its best answer and its worst."""
        if "candidates" not in row:
            return cls(**row)
        common = {name: value for name, value in row.items() if name != "candidates"}
        best, worst = row["candidates"][0], row["candidates"][-1]
        high, low = best["score"], worst["score"]
        return cls(
            chosen=[Message(role="assistant", content=best["text"])],
            rejected=[Message(role="assistant", content=worst["text"])],
            score_chosen=high,
            score_rejected=low,
            margin=None if high is None or low is None else round(high - low, 6),
            **common,
        )

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))  # asdict would copy every message, at ten times the cost


@dataclass(frozen=True)
class SetPair(Pair):
    """A pair of a test set, its `source`; `subset` is what the set itself calls the part that the pair belongs to."""

    subset: str | None = None


@dataclass(frozen=True)
class Answered:
    """A prompt and an answer to be learned: a chosen one, the best of a list, or one that is called good."""

    id: str
    prompt: list[Message]
    answer: list[Message]
    language: str
    source: str
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line, UTF-8, unescaped; returns how many."""
    count = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; an unreadable line is an error that names it."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DpoError(f"not JSON: {error.msg}", where=f"{path}:{number}") from error


def best_pairs(prompts: Sequence[Any], chosen: Sequence[Any], rejected: Sequence[Any]) -> list[int]:
    """The pairs whose chosen answer no other pair of the prompt rejects, once each: `data.pairs.pick: all` has more."""
    asked, good, bad = ([json.dumps(one) for one in column] for column in (prompts, chosen, rejected))
    worse = set(zip(asked, bad, strict=True))
    best: dict[tuple[str, str], int] = {}
    for index, answer in enumerate(zip(asked, good, strict=True)):
        if answer not in worse:
            best.setdefault(answer, index)
    return list(best.values())


def read_answers(path: Path, *, chosen_on: bool | None = None, good: bool = True) -> list[Answered]:
    """The answers of a `data/*.jsonl` file that SFT learns: the best of pairs and lists, good ones of unpaired rows.

    Of all its prompts, or of one half of them: see `chooses`. Not `good`: the bad ones of unpaired rows.
    """
    rows = [row for row in read_jsonl(path) if row.get("label", True) == good]
    rows = [row for row in rows if chosen_on is None or chooses(row) == chosen_on]
    if rows and "chosen" in rows[0]:
        columns = ([row[name] for row in rows] for name in ("prompt", "chosen", "rejected"))
        rows = [rows[index] for index in best_pairs(*columns)]
    names = ("id", "prompt", "language", "source", "chat_template_kwargs")
    return [Answered(answer=_best_answer(row), **{name: row[name] for name in names}) for row in rows]


def _best_answer(row: dict[str, Any]) -> list[Message]:
    if "candidates" in row:
        return [Message(role="assistant", content=row["candidates"][0]["text"])]
    answer: list[Message] = row["chosen"] if "chosen" in row else row["completion"]
    return answer


def chooses(row: Mapping[str, Any]) -> bool:
    """Whether a held-out row is of the half, by its prompt's hash, that may choose which checkpoint is the adapter.

    `eval` then reports the other half, for the best of many checkpoints looks better than it is where it was chosen.
    """
    return bool(hashlib.sha256(json.dumps(row["prompt"]).encode()).digest()[0] & 1)


def read_pairs(path: Path, *, chosen_on: bool | None = None) -> list[Pair]:
    """All pairs of a `data/*.jsonl` file, or those of one half of its prompts: see `chooses`.

    Of ranked lists, the best and the worst answers; of unpaired rows, the first good and the first bad answer of each
    prompt that has both.
    """
    rows = [row for row in read_jsonl(path) if chosen_on is None or chooses(row) == chosen_on]
    if not rows or "label" not in rows[0]:
        return [Pair.of_row(row) for row in rows]
    sides: dict[str, dict[bool, dict[str, Any]]] = {}
    for row in rows:
        sides.setdefault(json.dumps(row["prompt"]), {}).setdefault(row["label"], row)
    names = ("id", "prompt", "language", "source", "chat_template_kwargs")
    return [
        Pair(chosen=good["completion"], rejected=both[False]["completion"], **{name: good[name] for name in names})
        for both in sides.values()
        if (good := both.get(True)) and len(both) == 2
    ]
