"""What a source as a whole is like, looked at before its rows are judged one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from dpo_cli.prepare import sources
from dpo_cli.prepare.detect import LOOKED_AT, candidate_sets, layout_of
from dpo_cli.prepare.feed import Broken, Feed
from dpo_cli.prepare.filters import ALL_BUT, begins_with
from dpo_cli.prepare.layouts import LAYOUTS, MAPPABLE, LayoutOf
from dpo_cli.prepare.messages import Malformed
from dpo_cli.prepare.preferred import Settings
from dpo_cli.prepare.read_row import read_row
from dpo_cli.recipe import Recipe, Source
from dpo_cli.records import CandidateSet

ENOUGH = 5  # answers to short prompts, below which nothing is said of a source's form


@dataclass(frozen=True)
class Read:
    """What a source was read as.

    Attributes:
        commit: of a data set on the Hub.
        settings: what its layout needs besides the rows.
        repeats_prompts: whether (nearly) every answer begins with its prompt.
        unread_columns: what no layout reads.
        left_out: its folder's data files that are not read.
        overlooked: those of them that no name of another split and no `data_files` accounts for.
    """

    source: Source
    layout: str
    commit: str | None
    feeds: list[Feed]
    settings: Settings
    repeats_prompts: bool
    unread_columns: list[str]
    left_out: list[str]
    overlooked: list[str]


def look(recipe: Recipe, rank: int) -> Read:
    """Look a source over before its rows are judged.

    Raises:
        DpoError: it can't be read, or its layout can't be detected.
    """
    source, echo = recipe.data.sources[rank], recipe.data.filters.echo
    settings = Settings(tuple(recipe.data.score_weights.model_dump().items()), source.columns or {})
    feeds, commit = sources.feeds(recipe, rank)
    name = layout_of(recipe, rank, feeds)
    layout = LAYOUTS[name]
    repeats = bool(echo) and repeats_prompts(source, feeds, layout, settings, echo.min_chars)
    left_out = sources.left_out(recipe, rank)
    return Read(
        source, name, commit, feeds, settings, repeats, unread_columns(feeds, name, layout, settings),
        left_out, sources.overlooked(source, left_out),
    )  # fmt: skip


def repeats_prompts(source: Source, feeds: list[Feed], layout: LayoutOf, settings: Settings, below: int) -> bool:
    """Whether (nearly) every answer of a source begins with its prompt, by the prompts shorter than `below`.

    All rows are read for it only where at least half of the first ones do.
    """
    alone = replace(layout, grouped=False)

    def sets() -> Iterator[CandidateSet | Broken]:
        return candidate_sets(source, feeds, alone, settings, lambda share: None)

    answers, repeated = _repetitions(islice(sets(), LOOKED_AT), below)
    if not answers or repeated < answers / 2:
        return False
    answers, repeated = _repetitions(sets(), below)
    return answers >= ENOUGH and repeated >= ALL_BUT * answers


def _repetitions(sets: Iterator[CandidateSet | Broken], below: int) -> tuple[int, int]:
    answers = repeated = 0
    for item in sets:
        asked = "" if isinstance(item, Broken) else item.prompt[-1]["content"].strip()
        if isinstance(item, Broken) or not 0 < len(asked) < below:
            continue
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


def unread_columns(feeds: list[Feed], name: str, layout: LayoutOf, settings: Settings) -> list[str]:
    """The columns of a source's first rows that nothing reads."""
    asked = {*settings.columns.values(), *(MAPPABLE.get(name, ()) if settings.columns else ())}
    seen: dict[str, None] = {}
    for feed in feeds:
        for _, row in islice(feed.rows(None, lambda share: None), LOOKED_AT):
            if isinstance(row, dict):
                seen |= dict.fromkeys(map(str, row))
                try:
                    read_row(_Watched(row, asked), layout, settings)
                except Malformed:
                    continue
    return [column for column in seen if column not in asked]
