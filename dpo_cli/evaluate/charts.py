"""The report's charts as plain SVG: no library, no script, coloured by the page's style sheet, read out by their label.

All are 360 units wide, so that text of 13 units is legible on a phone, where they are shown at nine tenths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import ceil, floor, isfinite
from typing import NamedTuple

from dpo_cli.evaluate.words import Say
from dpo_cli.evaluate.words import say as english
from dpo_cli.show import shorten, show_figure
from dpo_cli.stats import Figure

WIDTH, LEFT, RIGHT = 360, 50, 352  # of the drawing, and between which x the data lie
TOP, BASE, HEIGHT = 10, 148, 170  # the y of the highest value, of the lowest, and of the drawing's end


class Dot(NamedTuple):
    """A row of `dots`: a name, a share with its interval, and what it is compared with."""

    label: str
    figure: Figure
    rival: Figure | None = None

    @property
    def text(self) -> str:
        """The share in words."""
        return show_figure(self.figure)


Points = Sequence[tuple[float, float | None]]


def curve(points: Points, title: str, held_out: Points = (), say: Say = english) -> str:
    """A line over training steps, dashed on held-out pairs; empty where training has fewer than two finite values."""
    known, held = _finite(points), _finite(held_out)
    if len(known) < 2:
        return ""
    steps, values = zip(*known, *held, strict=True)
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5

    def at(step: float, value: float) -> tuple[float, float]:
        return _across((step - first) / ((last - first) or 1)), _up((value - low) / (high - low))

    def line(some: Sequence[tuple[float, float]], kind: str) -> str:
        corners = (at(*one) for one in some)
        return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)}"/>'

    label = say("curve", title=title, first=_number(known[0][1]), last=_number(known[-1][1]))
    lines = [line(known, "line")]
    if held:
        label += say("curve_held_out", first=_number(held[0][1]), last=_number(held[-1][1]))
        lines.append(line(held, "line held"))
        lines += [f'<circle class="held" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in (at(*one) for one in held)]
    return _svg([*lines, *_axes(_number(high), _number(low), say("step", n=f"{first:g}"), f"{last:g}")], label)


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(step, value) for step, value in points if value is not None and isfinite(value)]


def histogram(edges: Sequence[float], counts: Sequence[int], right: int, say: Say = english) -> str:
    """Reward margins as bars, those below 0 in another colour, with a line at 0.

    Args:
        edges: of the bins, ascending, in nats, as far below 0 as above.
        counts: one a bin, so one fewer than the edges.
        right: how many margins are above 0.
    """
    if not any(counts):
        return ""
    low, high, most = edges[0], edges[-1], max(counts)
    span = (high - low) or 1.0
    bars = []
    for left, end, count in zip(edges, edges[1:], counts, strict=False):
        x, width = _across((left - low) / span), (end - left) / span * (RIGHT - LEFT)
        kind = "bar wrong" if left + end < 0 else "bar"
        size = f'width="{max(width - 1, 0.5):.1f}" height="{BASE - _up(count / most):.1f}"'
        bars.append(f'<rect class="{kind}" x="{x:.1f}" y="{_up(count / most):.1f}" {size}/>')
    zero = _across(-low / span)
    middle = [_line(zero, TOP, zero, BASE, "mark"), _text(zero, HEIGHT - 6, "0", "middle")]
    axes = _axes(f"{most:,}", "0", _number(low), _number(high))
    return _svg([*bars, *middle, *axes], say("histogram", n=f"{sum(counts):,}", right=f"{right:,}"))


def scale(rows: Iterable[Dot]) -> tuple[float, float]:
    """The tenths between which these rows lie with their intervals, and 50 % as well."""
    known = [0.45, 0.55]
    for row in rows:
        rival = row.rival["value"] if row.rival else None
        bounds = (row.figure["value"], row.figure["low"], row.figure["high"], rival)
        known += [bound for bound in bounds if bound is not None]
    return floor(10 * min(known) + 1e-9) / 10, ceil(10 * max(known) - 1e-9) / 10


def dots(rows: Sequence[Dot], low: float, high: float, title: str) -> str:
    """Shares as dots with their intervals, a row each under its name, with a line at 50 %.

    Names stand above their rows and not beside them: there is room for long ones, on a phone as well.

    Args:
        low, high: the axis' ends, shares: see `scale`.
    """
    if not rows:
        return ""
    left, step = 8, 38
    bottom = step * len(rows) + 4

    def x(share: float) -> float:
        return left + (min(max(share, low), high) - low) / (high - low) * (RIGHT - left)

    tenths = range(round(10 * low), round(10 * high) + 1)
    parts = []
    for tenth in (tenths[0], 5, tenths[-1]):
        at = x(tenth / 10)
        anchor = "start" if at == left else "end" if at == RIGHT else "middle"
        parts.append(_text(at, bottom + 16, f"{10 * tenth}%", anchor))
    for index, row in enumerate(rows):
        y = step * index + 28
        room = 46 - len(row.text)  # columns that the name may take beside the figure
        parts += [_text(left, y - 12, shorten(row.label, room)), _text(RIGHT, y - 12, row.text, "end", "said")]
        parts += [_line(x(t / 10), y - 7, x(t / 10), y + 7, "mark" if t == 5 else "grid") for t in tenths]
        value, lowest, highest = row.figure["value"], row.figure["low"], row.figure["high"]
        if lowest is not None and highest is not None:
            parts.append(_line(x(lowest), y, x(highest), y, "whisker"))
        if row.rival is not None and row.rival["value"] is not None:
            at = x(row.rival["value"])
            parts.append(f'<path class="rival" d="M{at:.1f} {y - 5}l5 5l-5 5l-5 -5z"/>')
        if value is not None:
            parts.append(f'<circle class="dot" cx="{x(value):.1f}" cy="{y}" r="4.5"/>')
    return _svg(parts, f"{title}. {'; '.join(f'{row.label}: {row.text}' for row in rows)}", bottom + 22)


def _across(share: float) -> float:
    return LEFT + share * (RIGHT - LEFT)


def _up(share: float) -> float:
    return BASE - share * (BASE - TOP)


def _number(value: float) -> str:
    return (f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "−")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _axes(top: str, base: str, left: str, right: str) -> list[str]:
    """The horizontal axis, and the numbers at the ends of both."""
    return [
        _line(LEFT, BASE, RIGHT, BASE, "axis"),
        _text(LEFT - 6, TOP + 4, top, "end"),
        _text(LEFT - 6, BASE, base, "end"),
        _text(LEFT, HEIGHT - 6, left),
        _text(RIGHT, HEIGHT - 6, right, "end"),
    ]


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    extra = f' class="{kind}"' if kind else ""
    return f'<text{extra} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], title: str, height: float = HEIGHT) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">{body}</svg>'
