"""Keyed values that survive a kill: one SQLite file, which several processes may use at once."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from dpo_cli.errors import DpoError

BUSY = 60.0  # seconds to wait for another process's transaction; one lasts milliseconds
ASKED_AT_ONCE = 500  # keys of one query; SQLite's oldest limit on its variables is 999
TABLE = "CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID"


class Store:
    """A file of JSON values by their key, to be closed, or used as a context.

    The file is made by the first `put`. What `put` was given is on disk when it returns; where the process is killed
    in it, all of it or nothing is. An open store must not cross a fork.

    Raises:
        DpoError: of every method; the file can't be written, or is no store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: sqlite3.Connection | None = None

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return the values of those keys that are there."""
        asked = list(dict.fromkeys(keys))
        found: dict[str, Any] = {}
        for begin in range(0, len(asked), ASKED_AT_ONCE):
            some = asked[begin : begin + ASKED_AT_ONCE]
            found |= self._select(f"WHERE key IN ({', '.join('?' * len(some))})", some)
        return found

    def all(self) -> dict[str, Any]:
        """Return every value by its key."""
        return self._select("", [])

    def put(self, values: Mapping[str, Any]) -> None:
        """Keep values that JSON can hold, in one transaction; a float comes back to the last bit."""
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        with self._opened() as file:
            file.execute("BEGIN IMMEDIATE")
            try:
                file.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?)", rows)
                file.execute("COMMIT")
            except BaseException:
                if file.in_transaction:  # SQLite has rolled back already where the disk was full
                    file.execute("ROLLBACK")
                raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _select(self, where: str, keys: list[str]) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        with self._opened() as file:
            rows = file.execute(f"SELECT key, value FROM entries {where}", keys)
            return {key: json.loads(value) for key, value in rows}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """Yield the file, made where it is missing, and turn SQLite's errors into ours."""
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = sqlite3.connect(self.path, timeout=BUSY, isolation_level=None)
                with suppress(sqlite3.OperationalError):  # locked: another process that has just made it sets the same
                    # Readers and a writer at once, one fsync a transaction.
                    self._file.execute("PRAGMA journal_mode = WAL")
                self._file.execute(TABLE)
            yield self._file
        except sqlite3.OperationalError as error:  # disk full, no permission, no such folder
            raise DpoError(
                f"can't keep results: {error}",
                where=str(self.path),
                hint="free some disk space, check who may write there, or choose another folder with --runs-dir",
            ) from error
        except (sqlite3.DatabaseError, ValueError) as error:
            raise DpoError(
                f"this file is damaged, or no store of dpo-cli: {error}",
                where=str(self.path),
                hint="remove it; what it held is computed, or asked for, again",
            ) from error
