"""What encoding a text file is in: UTF-8, UTF-16 by its mark, or what its bytes look like."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, BinaryIO

from dpo_cli.prepare.feed import Unreadable

CHUNK = 1 << 20  # bytes
SAMPLE = 1 << 18  # bytes with characters in them that are not UTF-8, from which an encoding is guessed
FEW = 2  # so many bytes that are not UTF-8 are damage, not another encoding
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
ESCAPED = re.compile("[\udc80-\udcff]")  # a byte that is not of the encoding, as "surrogateescape" leaves it
SAVE_AS_UTF8 = "save it as UTF-8: in Excel as 'CSV UTF-8', or iconv -f ENCODING -t UTF-8 OLD > NEW"


@dataclass(frozen=True)
class Encoding:
    """A codec's name; `clean` where every byte is UTF-8, `guessed` where only the bytes speak for the codec."""

    codec: str
    clean: bool = False
    guessed: bool = False


def detect(opened: Callable[[], AbstractContextManager[tuple[Any, Any]]]) -> Encoding:
    """Detect the encoding of a file from all of it, so that no row far down is a surprise.

    Args:
        opened: opens it; the first of what it gives is a stream of bytes.

    Raises:
        Unreadable: it is not UTF-8, and the bytes fit several encodings alike.
    """
    with opened() as (stream, _):
        if stream.read(2) in UTF16_MARKS:
            return Encoding("utf-16")
    with opened() as (stream, _):
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
        if text.isascii():
            continue
        escaped = len(ESCAPED.findall(text))
        bad, good = bad + escaped, good + len(text) - len(text.encode("ascii", "ignore")) - escaped
        if escaped and len(sample) < SAMPLE:  # cut between characters: half of one would fit no encoding
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
