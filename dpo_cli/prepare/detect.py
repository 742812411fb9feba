"""Which layout a source has, by its columns; and the line to write where they fit none."""

from __future__ import annotations

import json
import re
from typing import Any

from dpo_cli.errors import USAGE, DpoError, did_you_mean, either
from dpo_cli.prepare.feed import Broken, Row
from dpo_cli.prepare.layouts import MAPPABLE
from dpo_cli.prepare.messages import Malformed
from dpo_cli.prepare.preferred import LAYOUTS, LayoutOf
from dpo_cli.prepare.text import listed
from dpo_cli.recipe import Recipe, Source
from dpo_cli.recipe.train import trl_arguments

LOOKED_AT = 200  # rows of a file from which a layout is detected
Head = list[tuple[int, Row]]  # a file's first rows, by their lines
Layouts = dict[str, LayoutOf]


def layout_of(recipe: Recipe, index: int, heads: dict[str, Head]) -> str:
    """Return the name of a source's layout, the recipe's or the one detected from its columns.

    Args:
        heads: the first rows of each of its files.

    Raises:
        DpoError: it has no rows; or (exit code 2) the columns fit no layout or not the one the recipe names, files
            differ in their layout, or the column map names what isn't there.
    """
    source, key = recipe.data.sources[index], ("data", "sources", index)
    where = recipe.where(*key, "layout" if source.layout != "auto" else "id")
    alone = not trl_arguments()[recipe.train.method]["compares"]
    layouts = {
        name: one
        for name, one in LAYOUTS.items()
        if (alone or not one.lone) and (source.sample is not None or not one.sampled)
    }
    found: dict[str, str] = {}
    for file, head in heads.items():
        maps = [row for _, row in head if isinstance(row, dict)]
        if maps:
            found.setdefault(_detect(source, maps, file, where, recipe.where(*key, "columns"), layouts), file)
        elif head:
            line, row = head[0]
            why = row.detail if isinstance(row, Broken) else f"the first is {type(row).__name__}, not a map"
            hint = "write one JSON object a line, a JSON array of them, CSV with commas, or Parquet; in UTF-8"
            message = f"no row of {file} can be read; such as {file}:{line}: {why}"
            raise DpoError(message, where=where, hint=hint, exit_code=USAGE)
    if len(found) > 1:
        listed = ", ".join(f"{file} is {layout}" for layout, file in found.items())
        hint = "name the files you mean in data_files, or make them two sources"
        raise DpoError(f"the files of {source.label} differ: {listed}", where=where, hint=hint, exit_code=USAGE)
    if not found:
        hint = "check that the file is whole, and data_files and split"
        raise DpoError(f"{source.label} has no rows", where=recipe.where(*key, "id"), hint=hint)
    return next(iter(found))


def _detect(source: Source, rows: list[dict[str, Any]], file: str, where: str, map_where: str, layouts: Layouts) -> str:
    seen = sorted({str(name) for row in rows for name in row})
    columns = source.columns or {}
    if columns:
        _check_map(source.layout, columns, seen, map_where)
        rows = [{**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}} for row in rows]
    if source.layout != "auto" and any(_fits(row, LAYOUTS[source.layout]) for row in rows):
        return source.layout
    detected = next((name for name, one in layouts.items() if any(_is(row, one) for row in rows)), None)
    if source.layout != "auto":
        needs = " or ".join(", ".join(sorted(names)) for names in LAYOUTS[source.layout].needs)
        message = f"{file} is not laid out as {source.layout}, which needs the columns {needs}; it has {listed(seen)}"
        hint = f"it looks like {detected}: set layout: {detected}, or auto" if detected else None
        raise DpoError(message, where=where, hint=hint or _nearest(seen, file, layouts), exit_code=USAGE)
    if columns and detected not in MAPPABLE:
        mappable = (name for name in MAPPABLE if name in layouts)
        detected = next((name for name in mappable if any(_fits(row, LAYOUTS[name]) for row in rows)), None)
    if detected is not None:
        return detected
    message, hint = f"can't tell the layout of {file}: it has the columns {listed(seen)}", _nearest(seen, file, layouts)
    if WRITE_COLUMNS not in hint and any(_is(row, LAYOUTS["chat"]) for row in rows):
        message, hint = f"{file} has one answer a prompt: its columns are {listed(seen)}", ONE_ANSWER
    elif WRITE_COLUMNS not in hint and any(_is(row, LAYOUTS["prompts"]) for row in rows):
        hint = f"{hint}; {ANSWER_THEM}"
    raise DpoError(message, where=where, hint=hint, exit_code=USAGE)


WRITE_COLUMNS = "write columns: "  # opens the map of a hint that is whole
ONE_ANSWER = "train.method: sft learns from such answers; pairs have a column of worse ones beside them"
ANSWER_THEM = (
    "if they are prompts without answers, sample: {answers: 4} on the source has the model answer them, "
    "and data.rater rates what it answers"
)


def _fits(row: dict[str, Any], layout: LayoutOf) -> bool:
    return any(names <= row.keys() for names in layout.needs)


def _is(row: dict[str, Any], layout: LayoutOf) -> bool:
    try:  # by what it holds: Arrow gives each row every column, and null for those that it hasn't got
        held = {name: value for name, value in row.items() if value is not None}
        return _fits(held, layout) and layout.looks_so(held)
    except (Malformed, RecursionError):
        return False


# What sets call the columns of `pairs` and `kto`, by the name that these have here.
ALSO_CALLED = {
    "prompt": "question query instruction problem input user human text_prompt prompt_text context conversation "
    "messages 问题 提问 指令 提示",
    "chosen": "chosen_response response_chosen chosen_answer answer_chosen accepted preferred better good positive win "
    "winner_response best preferred_output 好 好回答 优质回答 优选",
    "rejected": "rejected_response response_rejected rejected_answer answer_rejected dispreferred worse bad negative "
    "lose loser_response worst non_preferred_output 坏 差 差回答 坏回答 劣质回答 拒绝",
    "completion": "response answer output reply 回答 回复",
    "label": "kto_tag is_good good liked like thumbs_up thumb feedback desirable is_desirable is_chosen 标签",
}


def _nearest(seen: list[str], file: str, layouts: Layouts) -> str:
    """The column map to write, whole where the columns are known by other names."""
    maps = [
        (name, *_map(needs, seen))
        for name in MAPPABLE
        if name in layouts
        for needs in layouts[name].needs
        if {"prompt"} < needs <= set(ALSO_CALLED)
    ]
    layout, found, missing = max(maps, key=lambda one: (not one[2], len(one[1]) / (len(one[1]) + len(one[2]))))
    if not found and file.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        return "the first line has to name the columns, such as prompt,chosen,rejected: has this file no header?"
    written = [f"{ours}: {_quoted(theirs)}" for ours, theirs in found.items() if ours != theirs]
    if not missing and written:
        return f"for {layout}, {WRITE_COLUMNS}{{{', '.join(written)}}}"
    written += [f"{ours}: <yours>" for ours in missing]
    return f"for {layout}, set layout: {layout} and columns: {{{', '.join(written)}}}"


def _map(needs: frozenset[str], seen: list[str]) -> tuple[dict[str, str], list[str]]:
    folded = {name.strip().lower().replace("-", "_").replace(" ", "_"): name for name in reversed(seen)}
    found: dict[str, str] = {}
    for ours in sorted(needs, key=list(ALSO_CALLED).index):
        names = (name for name in [ours, *ALSO_CALLED[ours].split()] if name in folded)
        theirs = next((folded[name] for name in names if folded[name] not in found.values()), None)
        if theirs is not None:
            found[ours] = theirs
    missing, left = needs - found.keys(), [name for name in seen if name not in found.values()]
    if len(missing) == len(left) == 1 and len(found) > 1:  # the only column that it can be
        found |= dict(zip(missing, left, strict=True))
    return found, [ours for ours in ALSO_CALLED if ours in needs and ours not in found]


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"\w(?:[\w. -]*\w)?", name) else json.dumps(name, ensure_ascii=False)


def _check_map(layout: str, columns: dict[str, str], seen: list[str], where: str) -> None:
    """Raise a DpoError where the column map names what isn't there, or stands the other way round."""
    layouts = [layout] if layout != "auto" else list(MAPPABLE)
    known = list(dict.fromkeys(name for one in layouts for name in MAPPABLE.get(one, ())))
    for ours, theirs in columns.items():
        problem = hint = None
        if not known:
            problem, hint = f"layout {layout} takes no columns:", f"use it with layout: {either(list(MAPPABLE))}"
        elif ours not in known:
            problem = f"columns: there is no '{ours}' to map{_meant(ours, known)}"
            hint = f"our name comes first, which is one of {', '.join(known)}"
        elif theirs not in seen:
            problem, hint = (
                f"columns: no column '{theirs}' in the data{_meant(theirs, seen)}",
                f"the data have {listed(seen)}",
            )
        if problem:
            raise DpoError(problem, where=where, hint=hint, exit_code=USAGE)


def _meant(name: str, known: list[str]) -> str:
    near = did_you_mean(name, known)
    return f"; did you mean '{near}'?" if near else ""
