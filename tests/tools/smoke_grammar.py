"""Whether a sentence is one that the generator of the smoke data could have written, and in which style."""

from __future__ import annotations

import re
from functools import cache

from tests.tools import smoke_words as words
from tests.tools.smoke_data import SOURCES

END = {"en": ".", "zh": "。"}


def styles(answer: str, language: str) -> list[str | None]:
    """`direct`, `hedging`, or None for what is no sentence of the generator in this language, one a sentence.

    What follows the last full stop is a sentence too, which the generator did not write.
    """
    end = re.escape(END[language])
    return [_sentences(language).get(one.strip()) for one in re.findall(f"[^{end}]+{end}?", answer) if one.strip()]


@cache
def _sentences(language: str) -> dict[str, str]:
    """Every sentence on every topic, and its style."""
    topics = [line for one in SOURCES.values() if one.language == language for line in one.topics.strip().splitlines()]
    return {
        wording.format(tool=tool, act=act, sign=sign): style
        for _, tool, act, sign in (topic.split("|") for topic in topics)
        for style, wordings in (("direct", words.DIRECT), ("hedging", words.HEDGING))
        for position in wordings[language]
        for wording in position
    }
