"""Rows on their way in: what a file or a data set is read as, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Broken:
    """A row that can't be read at all, why, and its drop reason; `place` is its file and line (or row, see `Feed`)."""

    detail: str
    reason: str = "schema"
    place: str = ""
    notes: tuple[str, ...] = ()  # what else is to be said of it


BATCH = 256  # rows of a table in memory at a time

Row = dict[str, Any] | Broken
Rows = Iterator[tuple[int, Row]]
Ticker = Callable[[float], None]  # called now and then with the share of the file that is read, 0..1


@dataclass
class Feed:
    """One file, or one split of a Hub data set: what to call it, and how to read it.

    `rows(names, tick)` yields (line, row), lines from 1 and row numbers where there are no lines; from a table, only
    columns whose every part is in `names` (None: all). What reading found out stands in `notes` and `count` afterwards.
    """

    name: str
    rows: Callable[[frozenset[str] | None, Ticker], Rows]
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)  # notes that the user should look at
    count: int = 0

    def place(self, number: int) -> str:
        return f"{self.name}:{number}"

    def note(self, said: str, doubt: bool = False) -> None:
        """Keep what reading found out, once."""
        for kept in (self.notes, self.doubts) if doubt else (self.notes,):
            if said not in kept:
                kept.append(said)


class Unreadable(Exception):
    """Why a file can't be read, and what to do about it."""

    def __init__(self, why: str, hint: str = "download or write it again") -> None:
        super().__init__(why)
        self.hint = hint
