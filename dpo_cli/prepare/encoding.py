"""What encoding a text file is in: UTF-8, what a byte-order mark says, or what its bytes look like."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, BinaryIO

from dpo_cli.language import han_characters
from dpo_cli.prepare.feed import Unreadable

CHUNK = 1 << 20  # bytes
SAMPLE = 1 << 18  # bytes with characters in them that are not UTF-8, from which an encoding is guessed
FEW = 2  # so many bytes that are not UTF-8 are damage, not another encoding
EVIDENCE = 10  # different characters beyond ASCII below which two readings of the same bytes can't be distinguished

BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
# What people's files are in; the many others that some bytes would fit are left out.
KNOWN = [
    "gb18030", "big5", "cp932", "cp949", "euc_jp", "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256",
    "cp1257", "cp1258", "cp874", "koi8_r",
]  # fmt: skip
EAST_ASIAN = tuple(KNOWN[:5])
_HIGH = bytes(range(0x80, 0x100))
_BEYOND_ASCII = re.compile(rb"[^\n]*[\x80-\xff][^\n]*")
ASCII = set(map(chr, range(128)))
ESCAPED = re.compile("[\udc80-\udcff]")  # a byte that is not of the encoding, as "surrogateescape" leaves it
SAVE_AS_UTF8 = "save it as UTF-8: in Excel as 'CSV UTF-8', or iconv -f ENCODING -t UTF-8 OLD > NEW"


@dataclass(frozen=True)
class Encoding:
    """A codec's name; `clean` where every byte fits it, `guessed` where only the bytes speak for it."""

    codec: str
    clean: bool = True
    guessed: bool = False


def detect(opened: Callable[[], AbstractContextManager[tuple[Any, Any]]]) -> Encoding:
    """Detect the encoding of a file from all of it, so that no row far down is a surprise.

    Args:
        opened: opens it; the first of what it gives is a stream of bytes.

    Raises:
        Unreadable: it is not UTF-8, and the bytes fit several encodings alike.
    """
    with opened() as (stream, _):
        head = stream.read(CHUNK)
        for mark, codec in BOMS:
            if head.startswith(mark):
                return Encoding(codec, clean=codec != "utf-8-sig" or _is_utf8(head, stream))
        wide = _utf16(head)
        if wide:
            return Encoding(wide, guessed=True)
        if _is_utf8(head, stream):
            return Encoding("utf-8")
    with opened() as (stream, _):
        bad, good, sample = _survey(stream)
    return Encoding("utf-8", clean=False) if bad <= max(FEW, good) else _guess(sample)


def _is_utf8(chunk: bytes, stream: BinaryIO) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while chunk:
            decoder.decode(chunk)
            chunk = stream.read(CHUNK)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _utf16(head: bytes) -> str | None:
    """UTF-16 without a mark: the signs that JSON and CSV always hold have a zero on one side."""
    if head.count(0) < 8:
        return None
    head = head[: len(head) // 2 * 2]
    counts = {}
    for codec in ("utf-16-le", "utf-16-be"):
        text = head.decode(codec, errors="replace")
        counts[codec] = sum(map(text.count, '",:;{}\t\r\n '))
    few, many = sorted(counts, key=lambda codec: counts[codec])
    return many if counts[many] >= 8 and counts[few] < 0.05 * counts[many] else None


def _survey(stream: BinaryIO) -> tuple[int, int, bytes]:
    """How many bytes are not UTF-8, how many characters beyond ASCII are, and lines with the former."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    bad = good = 0
    sample = bytearray()
    while chunk := stream.read(CHUNK):
        beyond = re.findall("[^\x00-\x7f]+", decoder.decode(chunk))
        escaped = sum(len(ESCAPED.findall(run)) for run in beyond)
        bad, good = bad + escaped, good + sum(map(len, beyond)) - escaped
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
    readings = {name: _decoded(sample, name) for name in ("gb18030", "cp1252")} | found
    hangul, han = len(re.findall("[\uac00-\ud7a3]", text)), han_characters(text)
    if codec == "cp949" and han > 0.1 * (hangul + han) and readings["gb18030"]:  # Korean of today has no Han characters
        codec, text = "gb18030", readings["gb18030"]
    if text == readings["cp1252"]:
        codec = "cp1252"
    rivals = EAST_ASIAN if codec in EAST_ASIAN else ("gb18030", "cp1252")
    others = [name for name in rivals if readings.get(name) not in (None, text)]
    if others and len(set(text) - ASCII) < EVIDENCE:
        raise Unreadable(f"it is not UTF-8 but looks like {codec} or {others[0]}", SAVE_AS_UTF8)
    return Encoding(codec, guessed=True)


def _decoded(sample: bytes, codec: str) -> str | None:
    try:
        return sample.decode(codec)
    except UnicodeDecodeError:
        return None
