"""How figures, tables and texts from outside are written, for a terminal and in Markdown.

A stage lays out its figures once, in Markdown. Text from outside is shown as it stands: what a terminal would obey is
escaped, and what Markdown or HTML would take for markup is too.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TextIO

# Controls (C0 but tab and line feed, DEL, C1), line and paragraph separators, directional embeddings, overrides and
# isolates, and halves of surrogate pairs, which stand for bytes of a file name that is not UTF-8.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Escape what a terminal obeys instead of showing, such as ESC as `\x1b`; lines stay lines."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """Make one visible line of a text, so that no part of it looks like a line of ours."""
    return visible(" ".join(text.splitlines())) if "\n" in text or "\r" in text else visible(text)


def takes_unicode() -> bool:
    """Whether stdout has every character; what is read by a program must come without loss where it has not."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")


def say(text: str, file: TextIO | None = None) -> None:
    """Print a text as `visible`, on stdout where no other stream is named."""
    print(visible(text), file=file, flush=True)


# ------------------------------------------------------------------------------------------------------------ figures


class Unit(NamedTuple):
    """How a figure is written.

    Attributes:
        places: decimal places at most, and of what has no interval.
        factor: 100 for percent.
        mark: the value that an interval is compared with; an end beside it is not rounded to it.
    """

    places: int
    factor: float = 1
    signed: bool = False
    before: str = ""
    after: str = ""
    mark: float | None = None

    @property
    def change(self) -> Unit:
        """What a difference of two such figures is written in: percent points for shares."""
        return self._replace(signed=True, after=" pp" if self.after == "%" else self.after, mark=0.0)

    def places_of(self, figure: Mapping[str, Any], interval: bool = True) -> int:
        """How many decimal places a figure's interval supports: up to the first digit of half its width.

        Args:
            interval: it is shown, and must not seem to reach `mark`.
        """
        low, high = figure["low"], figure["high"]
        if low is None or high is None or high <= low:
            return self.places
        places = min(self.places, max(0, math.ceil(-math.log10(self.factor * (high - low) / 2))))
        beside = [self.factor * end for end in (low, high) if self.mark not in (None, end)]
        while interval and places < 6 and any(round(end, places) == self.factor * (self.mark or 0.0) for end in beside):
            places += 1
        return places

    def write(self, value: float, places: int | None = None) -> str:
        """Write a value without what stands around it."""
        places = self.places if places is None else places
        number = round(self.factor * value, places) + 0.0  # + 0.0: no minus before a nought
        text = f"{number:+,.{places}f}" if self.signed else f"{number:,.{places}f}"
        return text.replace("-", "−")


SHARE = Unit(1, 100, after="%", mark=0.5)
NATS, RATIO, LOSS = Unit(2, signed=True, mark=0.0), Unit(2, before="×", mark=1.0), Unit(3)


def show_figure(figure: Mapping[str, Any], unit: Unit = SHARE, interval: bool = True, to: str = " to ") -> str:
    """Write a figure {value, low, high}: `98% (94–100)`, `+1.66 (+1.58 to +1.73)`; – where there is none.

    Args:
        interval: with its 95 % interval, where it has one.
        to: what stands between two signed ends.
    """
    if figure["value"] is None:
        return "–"
    places = unit.places_of(figure, interval)
    text = unit.before + unit.write(figure["value"], places) + unit.after
    low, high = figure["low"], figure["high"]
    if not interval or low is None or high is None:
        return text
    return f"{text} ({unit.write(low, places)}{to if unit.signed else '–'}{unit.write(high, places)})"


def show_interval(figure: Mapping[str, Any], unit: Unit = SHARE, to: str = " to ") -> str:
    """Write the interval alone, `58% to 69%`; – where there is none."""
    if figure["low"] is None or figure["high"] is None:
        return "–"
    places = unit.places_of(figure)
    return to.join(unit.before + unit.write(figure[end], places) + unit.after for end in ("low", "high"))


# ----------------------------------------------------------------------------------------------------------- Markdown


def escaped(text: str) -> str:
    """Write a text so that Markdown shows it as it stands, on one line; an underscore in a word is plain already."""
    text = re.sub(r"([\\`*\[\]<|&~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", " ".join(text.split()))
    return re.sub(r"^(\d{0,9})([>#]|[.)+=-](?=[ =-]|$))", r"\1\\\2", text)  # a heading, list, quote or rule


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Write a Markdown table of texts as they stand, the first column and those in `left` set to the left."""
    marks = ["---" if column in (0, *left) else "---:" for column in range(len(heads))]
    lines = [[*map(escaped, heads)], marks, *([*map(escaped, row)] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(text: str, most: int | None = None) -> str:
    """Write a block of code, with a fence longer than any in it, cut after so many characters."""
    if most and len(text) > most:
        text = f"{text[:most].rstrip()}… ({len(text):,} characters)"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def shorten(text: str, columns: int) -> str:
    """Cut a text with an ellipsis where it takes more columns than that; a Chinese character takes two."""
    widths = [2 if ord(letter) > 0x2E7F else 1 for letter in text]
    if sum(widths) <= columns:
        return text
    while text and sum(widths[: len(text)]) >= columns:
        text = text[:-1]
    return text.rstrip() + "…"
