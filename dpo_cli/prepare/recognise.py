"""Which layout a source has, and its rows as candidate sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from dpo_cli.errors import USAGE, DpoError, did_you_mean
from dpo_cli.prepare.feed import Broken, Feed, Ticker
from dpo_cli.prepare.layouts import LAYOUTS, MAPPABLE, LayoutOf, Settings
from dpo_cli.prepare.turns import Malformed
from dpo_cli.recipe import Recipe, Source
from dpo_cli.records import CandidateSet

LOOKED_AT = 200  # rows from which a layout is told


def layout_of(recipe: Recipe, index: int, feeds: list[Feed]) -> str | None:
    """The name of a source's layout, the recipe's or the one its columns tell; None where it has no rows.

    Raises:
        DpoError: (exit code 2) the columns fit no layout or not the one the recipe names, files differ in their
            layout, or the column map names what isn't there.
    """
    source = recipe.data.sources[index]
    where = recipe.where("data", "sources", index, "layout" if source.layout != "auto" else "id")
    found: dict[str, str] = {}
    for feed in feeds:
        rows = [row for _, row in islice(feed.rows(None, lambda share: None), LOOKED_AT)]
        maps = [row for row in rows if isinstance(row, dict)]
        if maps:
            found.setdefault(_told(source, maps, feed.name, where), feed.name)
        elif rows:
            why = rows[0].detail if isinstance(rows[0], Broken) else f"the first is {type(rows[0]).__name__}, not a map"
            hint = "write one JSON object a line, a JSON array of them, CSV with commas, or Parquet; in UTF-8"
            raise DpoError(f"no row of {feed.name} can be read: {why}", where=where, hint=hint, exit_code=USAGE)
    if len(found) > 1:
        listed = ", ".join(f"{file} is {layout}" for layout, file in found.items())
        hint = "name the files you mean in data_files, or make them two sources"
        raise DpoError(f"the files of {source.label} differ: {listed}", where=where, hint=hint, exit_code=USAGE)
    return next(iter(found), None)


def _told(source: Source, rows: list[dict[str, Any]], file: str, where: str) -> str:
    seen = sorted({str(name) for row in rows for name in row})
    if source.columns:
        rows = [{**row, **_mapped(source, seen, where, row)} for row in rows]
    if source.layout != "auto":
        if not any(_fits(row, LAYOUTS[source.layout]) for row in rows):
            needs = " or ".join(", ".join(sorted(names)) for names in LAYOUTS[source.layout].needs)
            told = next((name for name, one in LAYOUTS.items() if any(_is(row, one) for row in rows)), None)
            raise DpoError(
                f"{file} is not laid out as {source.layout}, which needs the columns {needs}; it has {_listed(seen)}",
                where=where,
                hint=f"it looks like {told}: set layout: {told}, or auto" if told else _nearest(seen),
                exit_code=USAGE,
            )
        return source.layout
    told = next((name for name, one in LAYOUTS.items() if any(_is(row, one) for row in rows)), None)
    if source.columns and told not in MAPPABLE:
        told = next((name for name in MAPPABLE if any(_fits(row, LAYOUTS[name]) for row in rows)), None)
    if told is None:
        message = f"can't tell the layout of {file}: it has the columns {_listed(seen)}"
        raise DpoError(message, where=where, hint=_nearest(seen), exit_code=USAGE)
    return told


def _fits(row: dict[str, Any], layout: LayoutOf) -> bool:
    return any(names <= row.keys() for names in layout.needs)


def _is(row: dict[str, Any], layout: LayoutOf) -> bool:
    return _fits(row, layout) and layout.told_by(row)


def _listed(names: list[str]) -> str:
    return ", ".join(name[:40] for name in names[:12]) + (", …" if len(names) > 12 else "") if names else "none"


def _nearest(seen: list[str]) -> str:
    """The layout that shares most columns with `seen`, and what it would need."""
    name, needs = max(
        ((name, names) for name, layout in reversed(LAYOUTS.items()) for names in layout.needs if names - set(seen)),
        key=lambda one: len(one[1] & set(seen)) / len(one[1] | set(seen)),
    )
    missing = ", ".join(sorted(needs - set(seen)))
    plain = "layout: pairs with columns: {prompt: <yours>, …}"
    return f"the nearest is {name}, which also needs {missing}; for plain pairs: {plain}"


def _mapped(source: Source, seen: list[str], where: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row's mapped columns under our names, after a check of the map."""
    columns = source.columns or {}
    layouts = [source.layout] if source.layout != "auto" else list(MAPPABLE)
    known = [name for layout in layouts for name in MAPPABLE.get(layout, ())]
    for ours, theirs in columns.items():
        problem = hint = None
        if not known:
            problem, hint = f"layout {source.layout} takes no columns:", "use it with layout: pairs or kto"
        elif ours not in known:
            near = did_you_mean(ours, known)
            problem = f"columns: there is no '{ours}' to map" + (f"; did you mean '{near}'?" if near else "")
            hint = f"ours are {', '.join(dict.fromkeys(known))}"
        elif theirs not in seen:
            near = did_you_mean(theirs, seen)
            problem = f"columns: no column '{theirs}' in the data" + (f"; did you mean '{near}'?" if near else "")
            hint = f"the data have {_listed(seen)}"
        if problem:
            raise DpoError(problem, where=where.replace(".layout", ".columns"), hint=hint, exit_code=USAGE)
    return {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def candidate_sets(
    source: Source, feeds: list[Feed], layout: LayoutOf, settings: Settings, tick: Ticker
) -> Iterator[CandidateSet | Broken]:
    """Every row of a source as a candidate set, or as Broken; rows that belong together are one set.

    Grouped layouts (HelpSteer2, KTO) are held in memory, for rows of one prompt may stand anywhere; their answers come
    out in the order of their texts, so that the order of rows doesn't matter.
    """
    label = source.label
    groups: dict[tuple[tuple[str, str], ...], CandidateSet] = {}
    for number, feed in enumerate(feeds):
        for line, row in feed.rows(layout.reads, lambda share, number=number: tick((number + share) / len(feeds))):  # type: ignore[misc]
            if isinstance(row, Broken):
                yield replace(row, place=feed.place(line))
                continue
            try:
                if not isinstance(row, dict):
                    raise Malformed(f"the row is {type(row).__name__}, not a map")
                item = layout.read(row, settings)
            except Malformed as error:
                yield Broken(str(error), place=feed.place(line))
                continue
            item.place = feed.place(line)
            item.source, item.language = label, source.language or item.language
            if not layout.grouped:
                yield item
                continue
            key = tuple((turn["role"], turn["content"]) for turn in item.prompt)
            group = groups.setdefault(key, item)
            if group is not item:
                group.candidates += item.candidates
                group.language = min(filter(None, (group.language, item.language)), default=None)
    for item in groups.values():
        item.candidates.sort(key=lambda candidate: (candidate.text, candidate.score is None, candidate.score))
        yield item
