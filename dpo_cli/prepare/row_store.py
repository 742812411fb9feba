"""Candidate sets put aside on disk between reading and writing, so that memory holds only a line about each."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

Record = TypeVar("Record")


class RowStore(Generic[Record]):
    """A file that is gone when closed, or when the process ends."""

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
