"""The rows of a source as candidate sets, and what the source as a whole is like."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

from dpo_cli.prepare import sources
from dpo_cli.prepare.detect import LOOKED_AT, layout_of
from dpo_cli.prepare.feed import Broken, Feed
from dpo_cli.prepare.filters import begins_with
from dpo_cli.prepare.layouts import MAPPABLE
from dpo_cli.prepare.messages import Malformed, Unsupported, has_content
from dpo_cli.prepare.preferred import LAYOUTS, LayoutOf, Settings
from dpo_cli.recipe import Recipe, Source
from dpo_cli.records import CandidateSet

MEDIA = re.compile(
    r"(?:(?:chosen|rejected|input|user)_?)?(?:images?|imgs?|pictures?|photos?|screenshots?|videos?|audios?|pixel_values"
    r"|multi_?modal\w*|图片|图像|视频|音频)(?:_?(?:paths?|urls?|files?|names?|ids?|bytes|base64|b64|data|list))?",
    re.IGNORECASE,
)
_is_media = cache(MEDIA.fullmatch)
TOOLS = ("tools", "functions")
_PLACEHOLDER = re.compile("<(?:image|video|audio)>")
_PLACED = re.compile(r"^(?:<(?:image|video|audio)>\s)+|\s<(?:image|video|audio)>\s*$")  # as vision sets write it


def read_row(row: Any, layout: LayoutOf, settings: Settings) -> CandidateSet:
    """Return a raw row as a candidate set.

    Raises:
        Malformed: it is not what the layout promises.
        Unsupported: it has images, sound or film, or an answer that calls a tool.
    """
    if not isinstance(row, dict):
        raise Malformed(f"the row is {type(row).__name__}, not a map")
    media = [name for name in row if isinstance(name, str) and _is_media(name)]
    for name in media:
        if has_content(row[name]):
            raise Unsupported(f"{name} is not empty, and only text can be trained on")
    mapped = {ours: row.get(theirs) for ours, theirs in settings.columns.items()}
    try:  # through a view of the row, so that what is read of it is known
        item = layout.read(ChainMap(mapped, row) if mapped else row, settings)
    except RecursionError as error:
        raise Malformed("lists or maps nested too deep") from error
    asked = item.prompt[-1]["content"]
    if "<" in asked and _PLACED.search(asked):
        raise Unsupported("an <image>, <video> or <audio> in the prompt, and only text can be trained on")
    if media:
        texts = [*(turn["content"] for turn in item.prompt), *(candidate.text for candidate in item.candidates)]
        found = next(filter(None, map(_PLACEHOLDER.search, texts)), None)
        if found:
            raise Unsupported(f"{found[0]} in the text, and only text can be trained on")
    return item


def candidate_sets(
    source: Source, feeds: list[Feed], layout: LayoutOf, settings: Settings
) -> Iterator[CandidateSet | Broken]:
    """Yield every row of a source as a candidate set, or as Broken; rows that belong together are one set.

    Grouped layouts (HelpSteer2, KTO) are held in memory, for rows of one prompt may stand anywhere; their answers come
    out in the order of their texts, so that the order of rows doesn't matter.
    """
    groups: dict[tuple[tuple[str, str], ...], CandidateSet] = {}
    for feed in feeds:
        feed.share = 0.0  # of all, before the first is read
    for feed in feeds:
        for line, row in feed.rows(layout.reads):
            place = f"{feed.name}:{line}"
            if isinstance(row, Broken):
                yield replace(row, place=place)
                continue
            filled = [name for name in TOOLS if has_content(row.get(name))] if isinstance(row, dict) else []
            tools = [f"the {name} column" for name in filled]
            try:
                item = read_row(row, layout, settings)
            except Malformed as error:
                yield Broken(str(error), error.reason, place, tuple(tools))
                continue
            item.notes += tools
            item.place, item.source, item.language = place, source.label, source.language or item.language
            if not layout.grouped:
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


@dataclass(frozen=True)
class Read:
    """What a source was read as.

    Attributes:
        layout: its name.
        commit: of a data set on the Hub.
        settings: what its layout needs besides the rows.
        left_out: its folder's data files that are not read.
        repeats_prompts: whether (nearly) every answer begins with its prompt.
        unread_columns: what no layout reads.
    """

    source: Source
    layout: str
    commit: str | None
    feeds: list[Feed]
    settings: Settings
    left_out: list[str]
    repeats_prompts: bool = False
    unread_columns: tuple[str, ...] = ()

    def sets(self) -> Iterator[CandidateSet | Broken]:
        return candidate_sets(self.source, self.feeds, LAYOUTS[self.layout], self.settings)

    @property
    def share(self) -> float:
        """How much of it has been read, 0..1."""
        return sum(feed.share for feed in self.feeds) / len(self.feeds)

    @property
    def overlooked(self) -> list[str]:
        """Those of `left_out` that no name of another split and no `data_files` accounts for."""
        split, named = self.source.split, self.source.data_files
        return [] if named else [name for name in self.left_out if not sources.of_another_split(name, split)]


def look(recipe: Recipe, rank: int) -> Read:
    """Look a source over before its rows are judged one by one.

    Raises:
        DpoError: it can't be read, or its layout can't be detected.
    """
    source, echo = recipe.data.sources[rank], recipe.data.filters.echo
    settings = Settings(tuple(recipe.data.score_weights.model_dump().items()), source.columns or {})
    feeds, commit = sources.feeds(recipe, rank)
    read = Read(source, layout_of(recipe, rank, feeds), commit, feeds, settings, sources.left_out(recipe, rank))
    repeats = bool(echo) and _repeats_prompts(read, echo.min_chars)
    return replace(read, repeats_prompts=repeats, unread_columns=_unread_columns(read))


ENOUGH = 5  # answers to short prompts, below which a source's form is not judged
ALL_BUT = 0.9  # the share of a source's answers to short prompts that begin with them where that is its form


def _repeats_prompts(read: Read, below: int) -> bool:
    """Whether (nearly) every answer begins with its prompt, by the prompts shorter than `below`.

    All rows are read for it only where at least half of the first ones do.
    """
    layout = LAYOUTS[read.layout]

    def repetitions(most: int | None) -> tuple[int, int]:
        answers = repeated = 0
        rows = (row for feed in read.feeds for _, row in feed.rows(layout.reads))
        for row in islice(rows, most):
            with suppress(Malformed):
                item = read_row(row, layout, read.settings)
                asked = item.prompt[-1]["content"].strip()
                if 0 < len(asked) < below:
                    answers += len(item.candidates)
                    repeated += sum(begins_with(asked, candidate.text.lstrip()) for candidate in item.candidates)
        return answers, repeated

    answers, repeated = repetitions(LOOKED_AT)
    if not answers or repeated < answers / 2:
        return False
    answers, repeated = repetitions(None)
    return answers >= ENOUGH and repeated >= ALL_BUT * answers


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


def _unread_columns(read: Read) -> tuple[str, ...]:
    columns = read.settings.columns
    asked = {*columns.values(), *(MAPPABLE.get(read.layout, ()) if columns else ())}
    seen: dict[str, None] = {}
    for feed in read.feeds:
        for _, row in islice(feed.rows(), LOOKED_AT):
            if isinstance(row, dict):
                seen |= dict.fromkeys(map(str, row))
                with suppress(Malformed):
                    read_row(_Watched(row, asked), LAYOUTS[read.layout], read.settings)
    return tuple(column for column in seen if column not in asked)
