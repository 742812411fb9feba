"""The rows of a source as candidate sets, and what the source as a whole is like."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

from dpo_cli.prepare import scoring, sources
from dpo_cli.prepare.detect import LOOKED_AT, layout_of
from dpo_cli.prepare.feed import Broken, Feed
from dpo_cli.prepare.filters import begins_with
from dpo_cli.prepare.layouts import MAPPABLE
from dpo_cli.prepare.messages import Malformed, Unsupported, has_content
from dpo_cli.prepare.preferred import LAYOUTS
from dpo_cli.recipe import Recipe, Source
from dpo_cli.records import CandidateSet

MEDIA = re.compile(
    r"(?:(?:chosen|rejected|input|user)_?)?(?:images?|imgs?|pictures?|photos?|screenshots?|videos?|audios?|pixel_values"
    r"|multi_?modal\w*|图片|图像|视频|音频)(?:_?(?:paths?|urls?|files?|names?|ids?|bytes|base64|b64|data|list))?",
    re.IGNORECASE,
)
_is_media = cache(MEDIA.fullmatch)
TOOLS = ("tools", "functions")
_PLACED = re.compile(r"^(?:<(?:image|video|audio)>\s*)+|\s<(?:image|video|audio)>\s*$")  # as vision sets write it


@dataclass(frozen=True)
class Read:
    """What a source is read as.

    Attributes:
        layout: its name.
        commit: of a data set on the Hub.
        weights: of the recipe, for the ratings of an answer.
        left_out: its folder's data files that nothing says why they are not read.
        repeats_prompts: whether (nearly) every answer begins with its prompt.
        unread_columns: what no layout reads.
    """

    source: Source
    layout: str
    commit: str | None
    feeds: list[Feed]
    weights: scoring.Weights
    left_out: list[str]
    repeats_prompts: bool = False
    unread_columns: tuple[str, ...] = ()

    def sets(self) -> Iterator[CandidateSet | Broken]:
        """Yield every row as a candidate set, or as Broken; rows that belong together are one set.

        Grouped layouts (HelpSteer2, KTO) are held in memory, for rows of one prompt may stand anywhere; their answers
        come out in the order of their texts, so that the order of rows doesn't matter.
        """
        groups: dict[tuple[tuple[str, str], ...], CandidateSet] = {}
        for feed in self.feeds:
            feed.share = 0.0  # of all, before the first is read
        for place, row in ((f"{feed.name}:{line}", row) for feed in self.feeds for line, row in feed.rows()):
            if isinstance(row, Broken):
                yield replace(row, place=place)
                continue
            try:
                item = self.row(row)
            except Malformed as error:
                yield Broken(str(error), error.reason, place)
                continue
            item.notes += [f"the {name} column" for name in TOOLS if has_content(row.get(name))]
            item.place, item.source, item.language = place, self.source.label, self.source.language or item.language
            if not LAYOUTS[self.layout].grouped:
                yield item
                continue
            key = tuple((turn["role"], turn["content"].strip()) for turn in item.prompt)
            group = groups.setdefault(key, item)
            if group is not item:
                group.candidates += item.candidates
                group.notes += item.notes
                group.language = min(filter(None, (group.language, item.language)), default=None)
        for item in groups.values():
            item.candidates.sort(key=lambda candidate: (candidate.text, candidate.score is None, candidate.score))
            yield item

    def row(self, row: Any) -> CandidateSet:
        """Return a raw row as a candidate set.

        Raises:
            Malformed: it is not what the layout promises.
            Unsupported: it has images, sound or film, or an answer that calls a tool.
        """
        if not isinstance(row, dict):
            raise Malformed(f"the row is {type(row).__name__}, not a map")
        for name in row:
            if isinstance(name, str) and _is_media(name) and has_content(row[name]):
                raise Unsupported(f"{name} is not empty, and only text can be trained on")
        mapped = {ours: row.get(theirs) for ours, theirs in (self.source.columns or {}).items()}
        try:  # through a view of the row, so that what is read of it is known
            item = LAYOUTS[self.layout].read(ChainMap(mapped, row) if mapped else row, self.weights)
        except RecursionError as error:
            raise Malformed("lists or maps nested too deep") from error
        asked = item.prompt[-1]["content"]
        if "<" in asked and _PLACED.search(asked):
            raise Unsupported("an <image>, <video> or <audio> in the prompt, and only text can be trained on")
        return item

    @property
    def share(self) -> float:
        """How much of it has been read, 0..1."""
        return sum(feed.share for feed in self.feeds) / len(self.feeds)


def look(recipe: Recipe, rank: int) -> Read:
    """Look a source over before its rows are judged one by one.

    Raises:
        DpoError: it can't be read, or its layout can't be detected.
    """
    source, echo = recipe.data.sources[rank], recipe.data.filters.echo
    feeds, commit = sources.feeds(recipe, rank)
    heads = {feed.name: list(islice(feed.rows(), LOOKED_AT)) for feed in feeds}
    layout = layout_of(recipe, rank, heads)
    rows = [row for head in heads.values() for _, row in head if isinstance(row, dict)]
    weights = tuple(recipe.data.score_weights.model_dump().items())
    read = Read(source, layout, commit, feeds, weights, sources.left_out(recipe, rank))
    repeats = bool(echo) and _repeats_prompts(read, rows, echo.min_chars)
    return replace(read, repeats_prompts=repeats, unread_columns=_unread_columns(read, rows))


ENOUGH = 5  # answers to short prompts, below which a source's form is not judged
ALL_BUT = 0.9  # the share of a source's answers to short prompts that begin with them where that is its form


def _repeats_prompts(read: Read, first: list[dict[str, Any]], below: int) -> bool:
    """Whether (nearly) every answer begins with its prompt, by the prompts shorter than `below`.

    All rows are read for it only where at least half of the first ones do.
    """
    answers, repeated = _repetitions(read, first, below)
    if not answers or repeated < answers / 2:
        return False
    answers, repeated = _repetitions(read, (row for feed in read.feeds for _, row in feed.rows()), below)
    return answers >= ENOUGH and repeated >= ALL_BUT * answers


def _repetitions(read: Read, rows: Iterable[Any], below: int) -> tuple[int, int]:
    """How many answers to prompts shorter than `below` there are, and how many of them begin with it."""
    answers = repeated = 0
    for row in rows:
        with suppress(Malformed):
            item = read.row(row)
            asked = item.prompt[-1]["content"].strip()
            if 0 < len(asked) < below:
                answers += len(item.candidates)
                repeated += sum(begins_with(asked, candidate.text.lstrip()) for candidate in item.candidates)
    return answers, repeated


class _Watched(dict[str, Any]):
    """A row that remembers which of its columns were asked for."""

    def __init__(self, row: dict[str, Any], asked: set[str]) -> None:
        super().__init__(row)
        self.asked = asked

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)


def _unread_columns(read: Read, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    columns = read.source.columns or {}
    asked = {*columns.values(), *(MAPPABLE.get(read.layout, ()) if columns else ())}
    for row in rows:
        with suppress(Malformed):
            read.row(_Watched(row, asked))
    return tuple(name for name in dict.fromkeys(str(name) for row in rows for name in row) if name not in asked)
