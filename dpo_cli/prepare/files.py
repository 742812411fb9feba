"""Local files as rows: JSON, CSV, Parquet, Arrow, compressed or not. What can't be read is named for what it is."""

from __future__ import annotations

import codecs
import functools
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dpo_cli.errors import DpoError
from dpo_cli.prepare.encoding import SAVE_AS_UTF8, UTF8, UTF16_MARKS, Encoding, detect
from dpo_cli.prepare.feed import BATCH, Feed, Rows, Unreadable
from dpo_cli.prepare.text_files import csv_rows, json_rows

CSV = (".csv", ".tsv", ".tab")
TABLES = (b"PAR1", b"\xff\xff\xff\xff")  # first bytes of Parquet, and of Arrow's stream
COMPRESSED = (".gz", ".zst")
KINDS = (".jsonl", ".ndjson", ".json", *CSV, ".parquet", ".arrow")
SUFFIXES = (*KINDS, *(kind + packed for kind in KINDS[:6] for packed in COMPRESSED))


def file_feed(name: str, path: Path) -> Feed:
    """Return the feed of a local file, by what its first bytes say it is; CSV by its suffix.

    Reading raises DpoError where the file is of no kind that can be read, damaged, or in an unknown encoding.
    """
    encoding = functools.cache(lambda: detect(lambda: _opened(path)))  # cached, for it takes reading the file

    def read(feed: Feed) -> Rows:
        with _errors_named(name, path, "download or write it again"):
            with _opened(path) as (stream, _):
                head = stream.read(512)
            if head.startswith(TABLES):
                from dpo_cli.prepare import tables  # here, for it imports pyarrow

                yield from (tables.parquet_rows if head.startswith(b"PAR1") else tables.arrow_rows)(path, feed)
            else:
                _refuse(head)
                is_json = head.lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith((b"{", b"["))
                yield from _text_rows(path, feed, encoding(), is_csv=not is_json and _called_csv(path))

    return Feed(name, read)


def text_lines(path: Path) -> list[str]:
    """Return the lines of a text file in whatever encoding.

    Raises:
        DpoError: the encoding can't be detected, or a byte doesn't fit it.
    """
    with _errors_named(path.name, path, SAVE_AS_UTF8), _opened(path) as (stream, _):
        return str(stream.read().decode(detect(lambda: _opened(path)).codec)).removeprefix("\ufeff").splitlines()


@contextmanager
def _errors_named(name: str, path: Path, hint: str) -> Iterator[None]:
    try:
        yield
    except Unreadable as error:
        raise DpoError(f"can't read {name}: {error}", where=str(path), hint=error.hint) from error
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise DpoError(f"can't read {name}: {error}", where=str(path), hint=hint) from error


def _called_csv(path: Path) -> bool:
    return not {suffix.lower() for suffix in path.suffixes[-2:]}.isdisjoint(CSV)


def _text_rows(path: Path, feed: Feed, encoding: Encoding, is_csv: bool) -> Rows:
    if encoding.guessed:
        feed.note(f"read as {encoding.codec}, which its bytes look like; save it as UTF-8 to be sure")
    elif encoding.codec != UTF8:
        feed.note(f"read as {encoding.codec}")
    with _opened(path) as (stream, share):
        end = "" if is_csv else None
        text = io.TextIOWrapper(stream, encoding.codec, errors="surrogateescape", newline=end)
        rows = csv_rows(text, feed) if is_csv else json_rows(text, feed, encoding.clean)
        for index, row in enumerate(rows):
            if index % BATCH == 0:
                feed.share = share()
            yield row


def _zstd(raw: BinaryIO) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd"))


DECOMPRESSED: dict[bytes, Callable[[BinaryIO], Any]] = {  # by the first bytes
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"\x28\xb5\x2f\xfd": _zstd,
}


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Callable[[], float]]]:
    with path.open("rb") as raw:
        magic, size = raw.read(6), max(path.stat().st_size, 1)
        raw.seek(0)
        stream = next((opens(raw) for start, opens in DECOMPRESSED.items() if magic.startswith(start)), raw)
        yield stream, lambda: raw.tell() / size


_WEB_PAGE = ("it is a web page", "download the file itself: on the Hub, through 'resolve' instead of 'blob'")
NO_DATA = {  # text that people hand over for data, by how it begins
    b"version https://git-lfs": ("it is a Git LFS pointer, not the data", "git lfs pull"),
    b"<!doctype html": _WEB_PAGE,
    b"<html": _WEB_PAGE,
}


def _refuse(head: bytes) -> None:
    """Raise Unreadable for a file that can't hold rows, by its first bytes."""
    for begins, (what, hint) in NO_DATA.items():
        if head.lstrip().lower().startswith(begins):
            raise Unreadable(what, hint)
    if b"\0" in head and not head.startswith(UTF16_MARKS):
        hint = "unpack it if it is an archive; save it as UTF-8, in Excel as 'CSV UTF-8'"
        raise Unreadable("it is neither text nor Parquet or Arrow", hint)
