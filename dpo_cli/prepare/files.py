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
from dpo_cli.prepare.encoding import SAVE_AS_UTF8, Encoding, detect
from dpo_cli.prepare.feed import BATCH, Feed, Rows, Unreadable
from dpo_cli.prepare.text_files import csv_rows, json_rows

CSV = (".csv", ".tsv", ".tab")
TABLES = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # first bytes of Parquet, and of Arrow's two formats
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
KINDS = (".jsonl", ".ndjson", ".json", *CSV, ".parquet", ".arrow", ".feather")
SUFFIXES = (*KINDS, *(kind + packed for kind in KINDS[:6] for packed in COMPRESSED))


def file_feed(name: str, path: Path) -> Feed:
    """Return the feed of a local file, by what its first bytes say it is; the suffix distinguishes JSON from CSV.

    Reading raises DpoError where the file is of no kind that can be read, damaged, or in an unknown encoding.
    """
    encoding = functools.cache(lambda: detect(lambda: _opened(path)))  # cached, for it takes reading the file

    def read(feed: Feed, names: frozenset[str] | None) -> Rows:
        with _errors_named(name, path, "download or write it again"):
            with _opened(path) as (stream, _):
                head = stream.read(512)
            if head.startswith(TABLES):
                from dpo_cli.prepare import tables  # here, for it imports pyarrow

                yield from (tables.parquet_rows if head.startswith(b"PAR1") else tables.arrow_rows)(path, feed, names)
            else:
                _refuse(path, head)
                yield from _text_rows(path, feed, encoding())

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
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError) as error:
        raise DpoError(f"can't read {name}: {error}", where=str(path), hint=hint) from error


def _text_rows(path: Path, feed: Feed, encoding: Encoding) -> Rows:
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
                feed.share = share()
            yield row


def _zstd(raw: BinaryIO) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd"))


DECOMPRESSED: dict[bytes, Callable[[BinaryIO], Any]] = {  # by the first bytes
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw), b"BZh": bz2.BZ2File, b"\xfd7zXZ": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _zstd,
}  # fmt: skip


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Callable[[], float]]]:
    with path.open("rb") as raw:
        magic, size = raw.read(6), max(path.stat().st_size, 1)
        raw.seek(0)
        stream = next((opens(raw) for start, opens in DECOMPRESSED.items() if magic.startswith(start)), raw)
        yield stream, lambda: raw.tell() / size


# What people hand over that holds no rows as it is: its first bytes, what it is, and the way on.
_CSV_FROM_EXCEL = "in Excel: Save As, 'CSV UTF-8'"
_WEB_PAGE = ("a web page", "download the file itself: on the Hub, through 'resolve' instead of 'blob'")
_PICKLE = ("a Python pickle", "write it as JSON lines or Parquet")
OTHERS = {
    b"\xd0\xcf\x11\xe0": ("an Excel or Word file of the old kind", _CSV_FROM_EXCEL),
    b"%pdf": ("a PDF", "get the data themselves"),
    b"sqlite format 3": ("an SQLite data base", "export the table as CSV or JSON lines"),
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "git lfs pull"),
    b"<!doctype html": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"\x80\x04": _PICKLE,
    b"\x80\x05": _PICKLE,
}


def _refuse(path: Path, head: bytes) -> None:
    if head.startswith(b"PK\x03\x04"):
        raise Unreadable(*_zipped(path))
    if head[257:262] == b"ustar":
        raise Unreadable("it is a tar archive", "unpack it, and name the folder or the file inside")
    for magic, (what, hint) in OTHERS.items():
        if head.lstrip().lower().startswith(magic):
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
