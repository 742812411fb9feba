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
from dpo_cli.prepare.feed import Broken, Feed, Rows, Ticker, Unreadable
from dpo_cli.prepare.text_files import csv_rows, json_rows

BATCH = 256  # rows of a table in memory at a time
CSV = (".csv", ".tsv", ".tab")
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
            table = next((read for magic, read in TABLES.items() if head.startswith(magic)), None)
            if not table:
                _refuse(path, head)
            for number, row in table(path, names, tick) if table else _text_rows(path, feed, encoding(), tick):
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


# ----------------------------------------------------------------------------------------------------------- tables

LIST_PARTS = {"list", "element", "item", "array"}  # what parquet writers put between a list and its elements


def _parquet_rows(path: Path, names: frozenset[str] | None, tick: Ticker) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            columns = [leaf for leaf in leaves if names is None or set(leaf.split(".")) <= names | LIST_PARTS]
            done, total = 0, max(file.metadata.num_rows, 1)
            for group in range(file.num_row_groups):  # over all at once, iter_batches keeps every group's buffers
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns, use_threads=False):
                    yield from _batch_rows(batch, done)
                    done += batch.num_rows
                    tick(done / total)
    except pa.ArrowException as error:
        raise OSError(str(error).splitlines()[0]) from error


def _arrow_rows(path: Path, names: frozenset[str] | None, tick: Ticker) -> Rows:
    """Arrow's stream or file format: what `datasets` keeps and `save_to_disk` writes, and Feather."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
            else:
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
            done, size = 0, max(path.stat().st_size, 1)
            for whole in batches:
                kept = [name for name in whole.schema.names if names is None or name in names]
                for start in range(0, whole.num_rows, BATCH):
                    batch = whole.select(kept).slice(start, BATCH)
                    yield from _batch_rows(batch, done)
                    done += batch.num_rows
                    tick(min(source.tell() / size, 1.0))
    except pa.ArrowException as error:
        raise OSError(str(error).splitlines()[0]) from error


def _batch_rows(batch: Any, done: int) -> Rows:
    """A batch's rows, one by one where a text of it is not UTF-8, or a date is none that Python has (read as null)."""
    try:
        yield from enumerate(batch.to_pylist(), done + 1)
        return
    except (UnicodeDecodeError, OverflowError, ValueError):
        pass
    for index in range(batch.num_rows):
        row: dict[str, Any] = {}
        for name in batch.schema.names:
            try:
                row[name] = batch.column(name)[index].as_py()
            except UnicodeDecodeError as error:
                yield done + index + 1, Broken(f"column {name} is not UTF-8: byte 0x{error.object[error.start]:02x}")
                break
            except (OverflowError, ValueError):
                row[name] = None
        else:
            yield done + index + 1, row


TABLES: dict[bytes, Callable[[Path, frozenset[str] | None, Ticker], Rows]] = {
    b"PAR1": _parquet_rows, b"ARROW1": _arrow_rows, b"\xff\xff\xff\xff": _arrow_rows,
}  # fmt: skip
