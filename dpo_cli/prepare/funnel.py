"""Every prompt on its way through `prepare`: what is kept of it meanwhile, where it went and why, and examples."""

from __future__ import annotations

import json
import pickle
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, TextIO, TypeVar

from dpo_cli.prepare.feed import Broken
from dpo_cli.prepare.text import hash64
from dpo_cli.records import CandidateSet

KEPT_EXAMPLES, DROPPED_EXAMPLES = 3, 2  # per source; per source and reason
EXCERPT = 200  # characters
KEPT_CAUSES = 200  # per source and reason
_NUMBER = re.compile(r"\d[\d,.]*|0x[\da-f]{2}")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")

Drop = tuple[str, str]  # a drop reason of the contract, and a detail


Record = TypeVar("Record")


class RowStore(Generic[Record]):
    """Records put aside on disk, so that memory holds only a line about each; gone when closed or the process ends."""

    def __init__(self, folder: Path) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._end = 0
        self._at_end = True  # to seek at every write would empty the buffer

    def add(self, record: Record) -> int:
        """Put a record aside, and return where it stands."""
        data = pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)
        place, self._end = self._end, self._end + len(data)
        if not self._at_end:
            self._file.seek(place)
        self._file.write(data)
        self._at_end = True
        return place

    def get(self, place: int) -> Record:
        self._file.seek(place)
        self._at_end = False
        record: Record = pickle.load(self._file)
        return record

    def close(self) -> None:
        self._file.close()


@dataclass(slots=True)
class Entry:
    """What memory keeps of a prompt that reached the duplicates; the rest is in the row store.

    Attributes:
        rank: its source's place in the recipe.
        hash: of the normalised prompt.
        content: a hash of prompt and answers as they came.
        picks: the candidates of each row to write: (chosen, rejected), or a whole ranking, best first.
        drop: why it is dropped, None where it is not (yet).
        edits: cuts by name and dropped answers by reason.
        place: where it is in the row store.
        cluster: the lowest hash among its near-duplicates.
        tokens: of the prompt, and of prompt + answer by candidate.
    """

    source: str
    rank: int
    language: str
    hash: int
    content: int
    picks: list[tuple[int, ...]]
    drop: Drop | None
    edits: Counter[str]
    place: int = 0
    cluster: int = 0
    tokens: tuple[int, dict[int, int]] | None = None


@dataclass
class Funnel:
    """Counts by source and language. Every prompt that came is kept, or dropped once.

    Attributes:
        edits: cuts by name and dropped answers by reason, by source.
        notes: rows, by source and what was left out of them.
        causes: of drops, by source and reason: how many, and of the one of lowest hash that, its place and its detail.
        file: for every dropped prompt, JSONL.
    """

    came: Counter[str] = field(default_factory=Counter)
    kept: Counter[tuple[str, str]] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    edits: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: Counter[tuple[str, str]] = field(default_factory=Counter)
    causes: dict[tuple[str, str], dict[str, tuple[int, int, str, str]]] = field(default_factory=dict)
    examples: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = field(default_factory=dict)
    file: TextIO | None = None

    def drop(
        self, source: str, language: str, drop: Drop, order: int, row: Callable[[], CandidateSet | Broken]
    ) -> None:
        """Count a dropped prompt; `order` is a hash that picks examples whatever the order of rows.

        `row` reads it, and is called for few.
        """
        reason, detail = drop
        self.dropped[source, language, reason] += 1

        def example() -> dict[str, Any]:
            item = row()
            asked = "" if isinstance(item, Broken) else item.prompt[-1]["content"]
            return {"prompt": excerpt(asked), "where": item.place, "detail": detail}

        causes = self.causes.setdefault((source, reason), {})
        kind = _NUMBER.sub("0", detail)  # "1,203 tokens" and "1,204 tokens" are one cause
        if kind in causes or len(causes) < KEPT_CAUSES:
            count, lowest, place, shown = causes.get(kind, (0, order + 1, "", ""))
            if order < lowest:
                lowest, place, shown = order, row().place, detail
            causes[kind] = (count + 1, lowest, place, shown)
        if self.file is not None:
            name = None if reason in ("schema", "unsupported") else row_id(source, order)
            line = {"id": name, "source": source, "language": language, "reason": reason, **example()}
            self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._example((source, reason), order, DROPPED_EXAMPLES, example)

    def commonest(self, source: str, reason: str) -> tuple[str, str]:
        """Return where a row stands that was dropped for the commonest cause of a reason, and that cause."""
        _, _, place, detail = max(self.causes[source, reason].values(), key=lambda one: (one[0], one[3]))
        return place, detail

    def keep(
        self, source: str, language: str, order: int, row: Callable[[], CandidateSet], picked: tuple[int, ...]
    ) -> None:
        self.kept[source, language] += 1

        def example() -> dict[str, Any]:
            item = row()
            best, worst = item.candidates[picked[0]], item.candidates[picked[-1]]
            return {
                "prompt": excerpt(item.prompt[-1]["content"]), "chosen": excerpt(best.text),
                "rejected": excerpt(worst.text), "score_chosen": best.score, "score_rejected": worst.score,
            }  # fmt: skip

        self._example((source, "kept"), order, KEPT_EXAMPLES, example)

    def _example(self, key: tuple[str, str], order: int, most: int, make: Callable[[], dict[str, Any]]) -> None:
        known = self.examples.setdefault(key, [])
        if len(known) < most or order <= known[-1][0]:
            known.append((order, make()))
            known.sort(key=lambda one: (one[0], json.dumps(one[1])))  # duplicates share their hash
            del known[most:]

    def reasons(self, source: str | None = None, language: str | None = None) -> dict[str, int]:
        """Return drops by reason, the most frequent first; of one source or language where one is given."""
        found: Counter[str] = Counter()
        for (name, tongue, reason), count in self.dropped.items():
            if source in (None, name) and language in (None, tongue):
                found[reason] += count
        return dict(sorted(found.items(), key=lambda one: (-one[1], one[0])))


def row_id(source: str, prompt_hash: int, picked: tuple[int, ...] = ()) -> str:
    """Return the id of a prompt's row; `picked` where several rows are made of one prompt."""
    return f"{hash64(source, prompt_hash, *picked):016x}"


def excerpt(text: str) -> str:
    """Return the first 200 characters on one line, without what a terminal would obey."""
    flat = " ".join(CONTROL.sub(" ", text[: 2 * EXCERPT]).split())
    return flat if len(flat) <= EXCERPT else flat[: EXCERPT - 1] + "…"
