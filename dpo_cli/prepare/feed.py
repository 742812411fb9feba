"""Rows on their way in: what a file or a data set is read as, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

BATCH = 256  # rows of a table in memory at a time


@dataclass(frozen=True)
class Broken:
    """A row that can't be read at all, why, its drop reason, and its file and line."""

    detail: str
    reason: str = "schema"
    place: str = ""


Row = dict[str, Any] | Broken
Rows = Iterator[tuple[int, Row]]


@dataclass
class Feed:
    """One file, or one split of a Hub data set.

    Attributes:
        read: see `rows`.
        notes: what reading found out.
        count: rows that have been read.
        share: of the file that has been read, 0..1.
    """

    name: str
    read: Callable[[Feed], Rows]
    notes: list[str] = field(default_factory=list)
    count: int = 0
    share: float = 0.0

    def rows(self) -> Rows:
        """Yield (line, row), lines from 1, or row numbers where there are no lines."""
        self.count, self.share = 0, 0.0
        for number, row in self.read(self):
            self.count += 1
            yield number, row

    def note(self, text: str) -> None:
        if text not in self.notes:  # for a feed is read several times
            self.notes.append(text)


class Unreadable(Exception):
    """Why a file can't be read, and what to do about it."""

    def __init__(self, why: str, hint: str = "download or write it again") -> None:
        super().__init__(why)
        self.hint = hint
