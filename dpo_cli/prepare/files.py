"""Local files as rows: JSON, CSV, Parquet, Arrow, compressed or not. What can't be read is named for what it is."""

from __future__ import annotations

import bz2
import codecs
import functools
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dpo_cli.errors import DpoError
from dpo_cli.prepare.encoding import Encoding, UnknownEncoding, detect
from dpo_cli.prepare.feed import BATCH, Feed, Rows, Ticker, Unreadable
from dpo_cli.prepare.text_files import csv_rows, json_rows

CSV = (".csv", ".tsv", ".tab")
TABLES = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # first bytes of Parquet, and of Arrow's two formats
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
KINDS = (".jsonl", ".ndjson", ".json", *CSV, ".parquet", ".arrow", ".feather")
SUFFIXES = (*KINDS, *(kind + packed for kind in KINDS[:6] for packed in COMPRESSED))


def file_feed(name: str, path: Path) -> Feed:
    """A feed of a local file, by what its first bytes say it is; the suffix distinguishes JSON from CSV.

    Reading raises DpoError where the file is of no kind that can be read, damaged, or in an unknown encoding.
    """
    encoding = functools.cache(lambda: _encoding(path))  # looked for once, for it takes reading the file

    def rows(names: frozenset[str] | None, tick: Ticker) -> Rows:
        feed.count = 0
        try:
            with _opened(path) as (stream, _):
                head = stream.read(512)
            if head.startswith(TABLES):
                from dpo_cli.prepare import tables  # here, for it imports pyarrow

                found = (tables.parquet_rows if head.startswith(b"PAR1") else tables.arrow_rows)(path, names, tick)
            else:
                _refuse(path, head)
                found = _text_rows(path, feed, encoding(), tick)
            for number, row in found:
                feed.count += 1
                yield number, row
        except Unreadable as error:
            raise DpoError(f"can't read {name}: {error}", where=str(path), hint=error.hint) from error
        except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError) as error:
            raise DpoError(f"can't read {name}: {error}", where=str(path), hint="download or write it again") from error

    feed = Feed(name, rows)
    return feed


def text_lines(path: Path) -> list[str]:
    """The lines of a text file, in whatever encoding it is.

    Raises:
        DpoError: the encoding can't be detected, or a byte doesn't fit it.
    """
    try:
        with _opened(path) as (stream, _):
            return str(stream.read().decode(_encoding(path).codec)).removeprefix("\ufeff").splitlines()
    except Unreadable as error:
        raise DpoError(f"can't read {path.name}: {error}", where=str(path), hint=error.hint) from error
    except (OSError, EOFError, UnicodeError) as error:
        raise DpoError(f"can't read {path.name}: {error}", where=str(path), hint=SAVE_AS_UTF8) from error


def _text_rows(path: Path, feed: Feed, encoding: Encoding, tick: Ticker) -> Rows:
    if encoding.guessed:
        feed.note(f"read as {encoding.codec}, which its bytes look like; save it as UTF-8 to be sure", doubt=True)
    elif encoding.codec not in ("utf-8", "utf-8-sig"):
        feed.note(f"read as {encoding.codec}")
    *others, last = ("", *(suffix.lower() for suffix in path.suffixes))
    kind = others[-1] if last in COMPRESSED and others else last
    with _opened(path) as (stream, share):
        end = "" if kind in CSV else None
        text = io.TextIOWrapper(stream, encoding.codec, errors="surrogateescape", newline=end)
        clean = encoding.clean and encoding.codec.startswith("utf-8")
        rows = csv_rows(text, feed, tabs=kind != ".csv") if kind in CSV else json_rows(text, feed, clean)
        for index, row in enumerate(rows):
            if index % BATCH == 0:
                tick(share())
            yield row


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Callable[[], float]]]:
    """A file's bytes, decompressed where its first bytes say so, and what share of it has been read, 0..1."""
    with path.open("rb") as raw:
        magic, size = raw.read(6), max(path.stat().st_size, 1)
        raw.seek(0)
        stream: Any = raw
        if magic.startswith(b"\x1f\x8b"):
            stream = gzip.GzipFile(fileobj=raw)
        elif magic.startswith(b"BZh"):
            stream = bz2.BZ2File(raw)
        elif magic.startswith(b"\xfd7zXZ"):
            stream = lzma.LZMAFile(raw)  # noqa: SIM115 (it owns nothing: raw is closed here)
        elif magic.startswith(b"\x28\xb5\x2f\xfd"):
            import pyarrow as pa

            stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd"))
        yield stream, lambda: raw.tell() / size


def _encoding(path: Path) -> Encoding:
    @contextmanager
    def opened() -> Iterator[BinaryIO]:
        with _opened(path) as (stream, _):
            yield stream

    try:
        return detect(opened)
    except UnknownEncoding as error:
        raise Unreadable(str(error), SAVE_AS_UTF8) from error


SAVE_AS_UTF8 = "save it as UTF-8: in Excel as 'CSV UTF-8', or iconv -f ENCODING -t UTF-8 OLD > NEW"

# What people hand over that holds no rows as it is: its first bytes, what it is, and the way on.
_CSV_FROM_EXCEL = "in Excel: Save As, 'CSV UTF-8'"
OTHERS = {
    b"\xd0\xcf\x11\xe0": ("an Excel or Word file of the old kind", _CSV_FROM_EXCEL),
    b"%PDF": ("a PDF", "get the data themselves"),
    b"SQLite format 3": ("an SQLite data base", "export the table as CSV or JSON lines"),
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "git lfs pull"),
    b"<!doctype html": ("a web page", "download the file itself: on the Hub, through 'resolve' instead of 'blob'"),
    b"<html": ("a web page", "download the file itself: on the Hub, through 'resolve' instead of 'blob'"),
    b"\x80\x04": ("a Python pickle", "write it as JSON lines or Parquet"),
    b"\x80\x05": ("a Python pickle", "write it as JSON lines or Parquet"),
}


def _refuse(path: Path, head: bytes) -> None:
    """Say what a file is that is neither text nor a table."""
    if head.startswith(b"PK\x03\x04"):
        raise Unreadable(*_zipped(path))
    if head[257:262] == b"ustar":
        raise Unreadable("it is a tar archive", "unpack it, and name the folder or the file inside")
    lower = head.lstrip().lower()
    for magic, (what, hint) in OTHERS.items():
        if lower.startswith(magic.lower()) or head.startswith(magic):
            raise Unreadable(f"it is {what}", hint)
    if path.suffix.lower() == ".parquet" and head:
        raise Unreadable("it is no Parquet file")
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if path.suffix.lower() in (".txt", ".md") and text and text[:1] not in (b"{", b"["):
        raise Unreadable("it is plain text", "write one JSON object a line, or CSV, with the columns of a layout")


def _zipped(path: Path) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "it is a ZIP file that is damaged", "download it again"
    if any(name.startswith("xl/") for name in names):
        return "it is an Excel workbook", _CSV_FROM_EXCEL
    if any(name.startswith("word/") for name in names):
        return "it is a Word document", "write one JSON object a line, or CSV"
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"it is a ZIP file of {shown}", f"unzip it: unzip {path.name}, and name the folder or the file inside"
