"""What language a text is in, detected by its script: what `prepare`, `eval` and `export` all go by."""

from __future__ import annotations

import re

HAN_CLASS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
HAN = re.compile(f"[{HAN_CLASS}]+")
_KANA = re.compile("[\u3041-\u30ff]+")
_HANGUL = re.compile("[\uac00-\ud7a3]+")
_LATIN_WORD = re.compile("[A-Za-z\u00c0-\u024f]+")
_OTHER_WORD = re.compile("[\u0370-\u10ff\u1200-\u1cff]+")  # Greek, Cyrillic, Arabic, Hebrew, Indic, Thai, …
_WORD = re.compile("[A-Za-z\u00c0-\u024f]{2,}")  # a single letter is a variable more often than a word
_CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`", re.DOTALL)

LANGUAGE_SAMPLE = 2000  # characters; more of a text hardly changes what language it is in
UNITS_SAMPLE = 300  # enough to tell whether a text is made of words or of Han characters
HAN_WORDS = 0.6  # words that a Han character is worth: Chinese words have 1.5 to 2 of them


def mostly_han(text: str) -> bool:
    """Whether a text is written in Han characters, so that characters and not words are its units."""
    if text.isascii():
        return False
    sample = text[:UNITS_SAMPLE]
    return han_characters(sample) * HAN_WORDS > len(_LATIN_WORD.findall(sample))


def han_characters(text: str) -> int:
    return _count(HAN, text)


def _count(runs: re.Pattern[str], text: str) -> int:
    return sum(map(len, runs.findall(text)))


def language(text: str) -> str:
    """`zh`, `en`, `ja`, `ko` or `other` by what the text is written in, `und` where it holds no letters.

    Han characters weigh 0.6 Latin words; kana make it Japanese. Spanish counts as `en`: a source in another language
    of Latin script has to say so (`language:`). Code doesn't count unless there is nothing else.
    """
    sample = text[:LANGUAGE_SAMPLE]
    if "`" in sample:
        sample = _CODE.sub(" ", sample)
        if not any(map(str.isalpha, sample)):
            sample = text[:LANGUAGE_SAMPLE]
    if sample.isascii():
        return "en" if _WORD.search(sample) else "und"
    han, kana = han_characters(sample), _count(_KANA, sample)
    japanese = kana > 0.15 * (han + kana)
    votes = {
        "en": float(len(_WORD.findall(sample))),
        "zh": 0.0 if japanese else han * HAN_WORDS,
        "ja": (han + kana) * HAN_WORDS if japanese else 0.0,
        "ko": _count(_HANGUL, sample) * HAN_WORDS,
        "other": float(len(_OTHER_WORD.findall(sample))),
    }
    best = max(votes, key=lambda name: votes[name])
    return best if votes[best] else "und"
