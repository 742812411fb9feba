"""Local files as rows: JSON, CSV, Parquet, Arrow, compressed or not. What can't be read is named for what it is."""

from __future__ import annotations

import bz2
import codecs
import functools
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dpo_cli.errors import DpoError
from dpo_cli.prepare.feed import BATCH, Feed, Rows, Unreadable
from dpo_cli.prepare.text_files import ESCAPED, csv_rows, json_rows

CSV = (".csv", ".tsv", ".tab")
TABLES = (b"PAR1", b"\xff\xff\xff\xff")  # first bytes of Parquet, and of Arrow's stream
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
KINDS = (".jsonl", ".ndjson", ".json", *CSV, ".parquet", ".arrow")
SUFFIXES = (*KINDS, *(kind + packed for kind in KINDS[:6] for packed in COMPRESSED))


def file_feed(name: str, path: Path) -> Feed:
    """Return the feed of a local file, by what its first bytes say it is; CSV by its suffix.

    Reading raises DpoError where the file is of no kind that can be read, damaged, or in an unknown encoding.
    """
    encoding = functools.cache(lambda: _detect(path))  # cached, for it takes reading the file

    def read(feed: Feed) -> Rows:
        with _errors_named(name, path, "download or write it again"):
            with _opened(path) as (stream, _):
                head = stream.read(512)
            if head.startswith(TABLES):
                from dpo_cli.prepare import tables  # here, for it imports pyarrow

                yield from (tables.parquet_rows if head.startswith(b"PAR1") else tables.arrow_rows)(path, feed)
            else:
                _refuse(path, head)
                is_json = head.lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith((b"{", b"["))
                yield from _text_rows(path, feed, encoding(), is_csv=not is_json and _called_csv(path))

    return Feed(name, read)


def text_lines(path: Path) -> list[str]:
    """Return the lines of a text file in whatever encoding.

    Raises:
        DpoError: the encoding can't be detected, or a byte doesn't fit it.
    """
    with _errors_named(path.name, path, SAVE_AS_UTF8), _opened(path) as (stream, _):
        return str(stream.read().decode(_detect(path).codec)).removeprefix("\ufeff").splitlines()


@contextmanager
def _errors_named(name: str, path: Path, hint: str) -> Iterator[None]:
    try:
        yield
    except Unreadable as error:
        raise DpoError(f"can't read {name}: {error}", where=str(path), hint=error.hint) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError) as error:
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
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _zstd,
}


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Callable[[], float]]]:
    with path.open("rb") as raw:
        magic, size = raw.read(6), max(path.stat().st_size, 1)
        raw.seek(0)
        stream = next((opens(raw) for start, opens in DECOMPRESSED.items() if magic.startswith(start)), raw)
        yield stream, lambda: raw.tell() / size


_FROM_EXCEL = "in Excel: Save As, 'CSV UTF-8'"
_UNPACK = "unpack it, and name the folder or the file inside"
_AS_LINES = "write it as JSON lines or Parquet"
_WEB_PAGE = ("a web page", "download the file itself: on the Hub, through 'resolve' instead of 'blob'")
NO_DATA = {  # what people hand over for data, by how it begins
    b"pk\x03\x04": ("a ZIP file", _UNPACK),
    b"\xd0\xcf\x11\xe0": ("an Excel or Word file of the old kind", _FROM_EXCEL),
    b"%pdf": ("a PDF", "get the data themselves"),
    b"arrow1": ("a Feather file", _AS_LINES),
    b"sqlite format 3": ("an SQLite data base", "export the table as CSV or JSON lines"),
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "git lfs pull"),
    b"<!doctype html": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"\x80\x04": ("a Python pickle", _AS_LINES),
    b"\x80\x05": ("a Python pickle", _AS_LINES),
}


def _refuse(path: Path, head: bytes) -> None:
    """Raise Unreadable for a file that can't hold rows, by its first bytes."""
    if head.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.startswith("xl/") for name in archive.namelist()):
                raise Unreadable("it is an Excel workbook", _FROM_EXCEL)
    if head[257:262] == b"ustar":
        raise Unreadable("it is a tar archive", _UNPACK)
    for begins, (what, hint) in NO_DATA.items():
        if head.lstrip().lower().startswith(begins):
            raise Unreadable(f"it is {what}", hint)
    if head.count(0) > FEW and not head.startswith(UTF16_MARKS):
        what = "it is neither text nor Parquet or Arrow, or UTF-16 without its mark"
        raise Unreadable(what, "save it as UTF-8, in Excel as 'CSV UTF-8'")


# ---- what encoding a text is in: UTF-8, UTF-16 by its mark, or what its bytes look like

CHUNK = 1 << 20  # bytes
SAMPLE = 1 << 18  # bytes with characters in them that are not UTF-8, from which an encoding is guessed
FEW = 2  # so many bytes that are not UTF-8, or zeros in a text, are damage, and not a file of another kind
EVIDENCE = 10  # different characters beyond ASCII below which two readings of the same bytes can't be distinguished

# What people's files are in; the many others that some bytes would fit are left out.
KNOWN = [
    "gb18030", "big5", "cp932", "cp949", "euc_jp", "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256",
    "cp1257", "cp1258", "cp874", "koi8_r",
]  # fmt: skip
EAST_ASIAN = tuple(KNOWN[:5])
UTF8 = "utf-8-sig"  # with a mark in front or without
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_HIGH = bytes(range(0x80, 0x100))
_BEYOND_ASCII = re.compile(rb"[^\n]*[\x80-\xff][^\n]*")
ASCII = set(map(chr, range(128)))
SAVE_AS_UTF8 = "save it as UTF-8: in Excel as 'CSV UTF-8', or iconv -f ENCODING -t UTF-8 OLD > NEW"


@dataclass(frozen=True)
class Encoding:
    """A codec's name; `clean` where every byte is UTF-8, `guessed` where only the bytes speak for the codec."""

    codec: str
    clean: bool = False
    guessed: bool = False


def _detect(path: Path) -> Encoding:
    """Detect the encoding of a file from all of it, so that no row far down is a surprise."""
    with _opened(path) as (stream, _):
        if stream.read(2) in UTF16_MARKS:
            return Encoding("utf-16")
    with _opened(path) as (stream, _):
        bad, good, sample = _survey(stream)
    return Encoding(UTF8, clean=not bad) if bad <= max(FEW, good) else _guess(sample)


def _survey(stream: BinaryIO) -> tuple[int, int, bytes]:
    """How many bytes are not UTF-8, how many characters beyond ASCII are, and lines with the former."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    bad = good = 0
    sample = bytearray()
    chunk = b"more"
    while chunk:
        chunk = stream.read(CHUNK)
        text = decoder.decode(chunk, final=not chunk)
        good += len(text) - len(text.encode("ascii", "ignore"))
        try:
            text.encode()
        except UnicodeEncodeError:  # which tells it much faster than a look for such characters
            escaped = len(ESCAPED.findall(text))
            bad, good = bad + escaped, good - escaped
            if len(sample) < SAMPLE:  # cut between characters: half of one would fit no encoding
                lines = b"\n".join(_BEYOND_ASCII.findall(chunk.strip(_HIGH)))
                sample += lines[:SAMPLE].strip(_HIGH) + b"\n"
    return bad, good, bytes(sample)


def _guess(sample: bytes) -> Encoding:
    """What `charset_normalizer` makes of a sample; where it has few different characters, other readings count too."""
    import charset_normalizer

    found = {one.encoding: str(one) for one in charset_normalizer.from_bytes(sample, cp_isolation=KNOWN)}
    if not found:
        raise Unreadable("it is neither UTF-8 nor any encoding known here", SAVE_AS_UTF8)
    codec, text = next(iter(found.items()))
    rivals = EAST_ASIAN if codec in EAST_ASIAN else ("gb18030", "cp1252")
    readings = {name: sample.decode(name, "replace") for name in ("gb18030", "cp1252")} | found
    others = [name for name in rivals if "\ufffd" not in readings.get(name, "\ufffd") and readings[name] != text]
    if others and len(set(text) - ASCII) < EVIDENCE:
        raise Unreadable(f"it is not UTF-8 but looks like {codec} or {others[0]}", SAVE_AS_UTF8)
    return Encoding(codec, guessed=True)
