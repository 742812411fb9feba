"""Text as the filters see it: normalised for comparing, cut into words. Output text stays as it is."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

from dpo_cli.language import HAN, HAN_CLASS, mostly_han
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
    """Words, and every Han character as a word of its own; punctuation is left out."""
    return _WORD.findall(text)


def is_han(word: str) -> bool:
    """Whether a word of `words` is a Han character."""
    return bool(HAN.match(word))


_CONTROLS = bytes(sorted({*range(32), 127} - {9, 10, 13}))  # all but tab and line ends


def has_controls(text: str) -> bool:
    """Whether a text holds a control character, or U+FFFD where some decoder gave up."""
    data = text.encode()
    return len(data.translate(None, _CONTROLS)) < len(data) or "\ufffd" in text


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
    if isinstance(units, str):
        different = len({units[start : start + size] for start in range(total)})
    else:
        different = len({tuple(units[start : start + size]) for start in range(total)})
    return total - different > limit * total


def similarity(one: str, other: str, least: float) -> float:
    """Dice coefficient of two texts' word pairs (Han characters are words), 0..1; 0 without a look where the lengths
    alone put it below `least`.

    Word pairs, because "A beats B" and "B beats A" hold the same words.
    """
    if one == other:
        return 1.0
    if 2 * min(len(one), len(other)) < 0.9 * least * (len(one) + len(other)):
        return 0.0
    cut = [words(unicodedata.normalize("NFKC", text).lower()) for text in (one, other)]
    if cut[0] == cut[1]:
        return 1.0
    one_pairs, other_pairs = (set(pairwise(units)) for units in cut)
    total = len(one_pairs) + len(other_pairs)
    return 2 * len(one_pairs & other_pairs) / total if total else 0.0
