"""Text as the filters see it: normalised for comparing, cut into words. Output text stays as it is."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

from dpo_cli.language import HAN_CLASS, mostly_han
from dpo_cli.records import Message

_WORD = re.compile(f"[{HAN_CLASS}]|[^\\W{HAN_CLASS}]+")

# What sets two spellings of one prompt apart: whitespace and punctuation. Signs that carry meaning in maths and code
# stay (C++ is not C#, 5*3 is not 5/3), and so do the point, colon, comma and hyphen inside a number (3.5 is not 35).
_SPELLING = re.compile(r"[^\w#%&*/@\\+<=>|~$^.:,\-]+")
_SPELLING_ASCII = bytes(code for code in range(128) if _SPELLING.match(chr(code)))
_POINTS = re.compile(r"[.:,\-](?:(?!\d)|(?<!\d.))")


def normalise(text: str) -> str:
    """`text` for comparing prompts: NFKC, lower case, no whitespace, no punctuation."""
    folded = unicodedata.normalize("NFKC", text).lower()
    ascii_bytes = folded.encode() if folded.isascii() else None  # for a way to the same that is five times as fast
    bare = ascii_bytes.translate(None, _SPELLING_ASCII).decode() if ascii_bytes else _SPELLING.sub("", folded)
    return _POINTS.sub("", bare) or "".join(folded.split())


def prompt_key(prompt: Sequence[Message]) -> str:
    """The normalised conversation; of a lone user turn, just its text. Prompts with one key are one prompt."""
    if len(prompt) == 1:
        return normalise(prompt[0]["content"])
    return "\x1f".join(f"{turn['role']}:{normalise(turn['content'])}" for turn in prompt)


def hash64(*parts: object) -> int:
    """A stable hash in 0 .. 2**64 - 1, the same on every machine."""
    joined = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def words(text: str) -> list[str]:
    """Return words, and every Han character as a word of its own; punctuation is left out."""
    return _WORD.findall(text)


_CONTROLS = bytes(sorted({*range(32), 127} - {9, 10, 13}))  # all but tab and line ends
_BEYOND_ASCII = re.compile("[\x80-\x9f\ufffd]")  # C1 controls, and what a decoder leaves where it gave up

# UTF-8 that was read as Windows-1252. Signs of that code page stand for the bytes 80 to BF behind a letter that stands
# for the first byte: after "â€" they are quotes and dashes, after "Ã" in lower-case words accented letters, after "Â"
# signs; two letters in a row with two signs each are Han characters. And what GBK makes of replacement characters.
_HIGH = re.escape("".join(bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xC0)))
_MISREAD = re.compile(f"â€[{_HIGH}]|[a-z]Ã[{_HIGH}]|Â[\xa0-\xbf]|(?:[à-ï][{_HIGH}]{{2}}){{2}}|(?:锟斤拷){{2}}")
_LEADING = re.compile("[\xc2-\xef锟]")  # which is rare, and quickly seen


def garbled_by(text: str) -> str | None:
    """What a text holds that no writer meant: "control characters", "replacement characters" or "mojibake"; or None."""
    data = text.encode()
    if len(data.translate(None, _CONTROLS)) < len(data):
        return "control characters"
    if len(data) == len(text):
        return None
    found = _BEYOND_ASCII.search(text)
    if found:
        return "replacement characters" if found[0] == "\ufffd" else "control characters"
    return "mojibake" if _LEADING.search(text) and _MISREAD.search(text) else None


def repeats(text: str, limit: float) -> bool:
    """Whether more than `limit` of a text's runs of 4 words (in Chinese of 8 characters) have stood in it before."""
    if mostly_han(text):  # as it is, which is cheap, and then without the dashes of a table
        return _repeats(text, 8, limit) and _repeats("".join(words(text)), 8, limit)
    return _repeats(text.split(), 4, limit)


def _repeats(units: str | list[str], size: int, limit: float) -> bool:
    total = len(units) - size + 1
    enough = (1 - limit) * total + size  # so many different units can't make up so few different runs
    if total < 40 or len(set(units)) >= enough:
        return False
    runs = (units[start : start + size] for start in range(total))
    different = len(set(runs if isinstance(units, str) else map(tuple, runs)))
    return total - different > limit * total


def similarity(one: str, other: str, least: float) -> float:
    """Return the Dice coefficient of two texts' word pairs (Han characters are words), 0..1; 0 if surely below `least`.

    Word pairs, because "A beats B" and "B beats A" hold the same words.
    """
    if one == other:
        return 1.0
    if 2 * min(len(one), len(other)) < 0.9 * least * (len(one) + len(other)):
        return 0.0
    cut = [words(unicodedata.normalize("NFKC", text).lower()) for text in (one, other)]
    if cut[0] == cut[1]:
        return 1.0
    if len(set(cut[0]) ^ set(cut[1])) > 2 * (1 - least) * (len(cut[0]) + len(cut[1])):
        return 0.0  # each of these words is in a pair that isn't shared, and a pair has two words
    one_pairs, other_pairs = (set(pairwise(units)) for units in cut)
    total = len(one_pairs) + len(other_pairs)
    return 2 * len(one_pairs & other_pairs) / total if total else 0.0


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(name[:40] for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "nothing"
