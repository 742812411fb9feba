"""What `prepare` has to say beyond its counts, with the edit that changes it: warnings, and errors that stop it."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

from dpo_cli.errors import DpoError, either
from dpo_cli.prepare import split
from dpo_cli.prepare.filters import ANSWER_FILTERS, REASONS
from dpo_cli.prepare.funnel import Entry, Funnel
from dpo_cli.prepare.layouts import MAPPABLE
from dpo_cli.prepare.read import Read
from dpo_cli.prepare.text import listed
from dpo_cli.recipe import OpenAIRater, Recipe
from dpo_cli.recipe.sections import FILTERS
from dpo_cli.recipe.train import methods_of_answers, methods_with, trl_arguments
from dpo_cli.records import ROWS_ARE
from dpo_cli.stats import wilson

DROPPED_SHARE = 0.3  # of a source's prompts, dropped for one reason: more is reported; of unreadable rows, each
UNRATED_SHARE = 0.1  # of the answers without a score by the rater: more is reported
KEPT_BY_LENGTH = 0.95  # the share of prompts that a proposed model.max_length would keep
ENOUGH_HELD_OUT = 50  # pairs, from which on an accuracy says something
OWN = ("pairs", "kto", "chat", "alpaca", "swift", "sharegpt", "nectar")  # layouts of people's own files

# What to look at where a reason took everything, or much.
HINTS = {
    "schema": "look at the file there; name its layout: or columns: where they are not what was detected",
    "unsupported": "only text can be trained on: take the rows without tools, images, sound and film",
    "contradicts_scores": "data.filters.contradicts_scores: false takes chosen and rejected without the scores",
    "contaminated": "check data.contamination and data.filters.contaminated",
    "language": "data.languages names the languages that may stay; a source's language: says what it is in",
    "no_response": "look at the file there: its answers are empty, or stand where none were detected",
    "single_response": "this source has one answer per prompt; pairs need two",
    "cut_off": "raise sample.max_new_tokens, or train the model on whole answers first",
    "markers": "take the text without another model's template, or set data.filters.markers: false",
    "template": "for safety data set keep_refusals: true on the source",
    "no_score": "rate: true and data.rater give scores; if a rater gave none, its replies hold no rating from 1 to 5",
    "margin": "lower data.pairs.min_margin",
    "low_chosen": "lower data.pairs.min_chosen_score",
    "too_long": "raise model.max_length, or data.filters.too_long",
    "length_ratio": "raise data.filters.length_ratio",
}


def cause(reason: str, detail: str) -> str:
    """Why a row was dropped; where its detail only counts answers, in the words of the filter's key."""
    return FILTERS[reason][1].partition(";")[0].partition(":")[0] if reason in ANSWER_FILTERS else detail


def hint(reason: str) -> str:
    return HINTS.get(reason, f"data.filters.{reason} tunes it")


def warnings(recipe: Recipe, funnel: Funnel, entries: list[Entry], rows: dict[str, int], read: list[Read]) -> list[str]:
    """Return a sentence for all that the user should look at; `rows` counts those of train, eval and over the mix."""
    found = _losses(recipe, funnel, entries)
    found += _held_out(recipe, rows)
    found += _more_held_out(recipe, entries)
    for (source, what), count in sorted(funnel.notes.items()):
        found.append(f"{source}: left out of {count:,} of {funnel.came[source]:,} prompts: {what}")
    for one in read:
        label, empty = one.source.label, [feed.name for feed in one.feeds if not feed.count]
        if empty:
            found.append(f"{label}: no rows in {listed(empty, 5)}")
        if one.left_out:
            found.append(f"{label}: not read: {listed(one.left_out, 5)}; data_files: names the files that are meant")
        telling = [name for name in one.unread_columns if _TELLING.search(name)]
        if telling and one.layout in OWN:
            ours = ", ".join(MAPPABLE.get(one.layout, ()))
            way = f"; columns: maps a column to one of {ours}" if ours else ""
            found.append(f"{label}: nothing reads {listed(telling, 5)} (read as {one.layout}){way}")
    return found


def _losses(recipe: Recipe, funnel: Funnel, entries: list[Entry]) -> list[str]:
    """A sentence for every source and reason that took a bad share of it, or a row that can't be read: and the fix."""
    found = []
    for source, came in funnel.came.items():
        for reason, count in sorted(funnel.reasons(source).items(), key=lambda one: REASONS.index(one[0])):
            if count <= DROPPED_SHARE * came and reason != "schema":
                continue
            fix, (place, detail) = hint(reason), funnel.commonest(source, reason)
            if reason == "too_long":
                needed = _length_needed(recipe, [entry for entry in entries if entry.source == source])
                fix = f"model.max_length: {needed} would keep {KEPT_BY_LENGTH:.0%}" if needed else fix
            elif reason == "language":
                fix = f"data.languages has no such share; where that is not their language, set language: on {source}"
            such = f"{place}: {cause(reason, detail)}"
            found.append(f"{source}: {count:,} of {came:,} dropped as {reason}, such as {such}; {fix}")
    return found


def _length_needed(recipe: Recipe, entries: list[Entry]) -> int | None:
    """The model.max_length that would keep 95 % of the prompts whose tokens were counted, up to the next 64."""
    options = recipe.data.filters.too_long
    share = options.max_prompt if options else 1.0
    needs = sorted(max(*one.tokens[1].values(), math.ceil(one.tokens[0] / share)) for one in entries if one.tokens)
    return math.ceil(needs[math.ceil(KEPT_BY_LENGTH * len(needs)) - 1] / 64) * 64 if needs else None


# Columns that change what a row means, by what they are called.
_TELLING = re.compile(
    r"input|context|system|passage|document|history|question|query|score|rating|reward|rank|margin|reason|think|thought"
    r"|\blang|language|标签|评分|分数|系统|上下文|输入",
    re.IGNORECASE,
)


def _held_out(recipe: Recipe, rows: dict[str, int]) -> list[str]:
    """What can't be measured with so few held-out pairs, and how to hold out more."""
    held, every = rows["eval"], sum(rows.values())
    if held >= min(ENOUGH_HELD_OUT, recipe.data.eval_size):
        return []
    kind = ROWS_ARE[recipe.data.format]
    if not held:
        known = f"no {kind[:-1]} is held out, so eval can measure nothing"
    else:
        chance = wilson(held / 2, held)
        are = f"{kind} are" if held > 1 else f"{kind[:-1]} is"
        known = f"only {held} {are} held out: eval can't tell an accuracy of 50% from one of {chance['high']:.0%}"
    if every < 2 * ENOUGH_HELD_OUT:
        return [f"{known}; data.eval_fraction: 0.5 would hold out half of the {every}, but gather some hundreds"]
    share = math.ceil(100 * ENOUGH_HELD_OUT / every) / 100
    return [f"{known}; data.eval_fraction: {share:g} would hold out about {ENOUGH_HELD_OUT} of {every:,}"]


def _more_held_out(recipe: Recipe, entries: list[Entry]) -> list[str]:
    """That more than `data.eval_fraction` is held out, for that would be too few prompts."""
    clusters, fraction = {entry.cluster for entry in entries if entry.drop is None}, recipe.data.eval_fraction
    below = split.held_below(clusters, fraction)
    if below == int(fraction * 2.0**64):
        return []
    held = sum(one < below for one in clusters)
    return [
        f"{held} of {len(clusters)} prompts are held out, not {fraction:.0%}: fewer would measure next to nothing; "
        "with more data the share falls to data.eval_fraction, and some of these prompts then train"
    ]


def own_answers(recipe: Recipe, figures: dict[str, Any]) -> list[str]:
    """Return what to know of answers that the model gave and of their rater, by the report's figures of both."""
    found, sampled, rated, rater = list[str](), figures.get("sampled"), figures.get("rated"), recipe.data.rater
    for lost, says, fix in (
        ("cut_off", "found no end", hint("cut_off")),
        ("identical", "were given before to the same prompt", "raise sample.temperature"),
    ):
        if sampled and sampled[lost] > DROPPED_SHARE * sampled["answers"]:
            found.append(f"{sampled[lost]:,} of {sampled['answers']:,} answers {says}: {fix}")
    if rated and rated["failures"] > UNRATED_SHARE * rated["answers"]:
        found.append(f"the rater gave no score to {rated['failures']:,} of {rated['answers']:,} answers")
    samples = [source.sample for source in recipe.data.sources if source.sample]
    named = {recipe.model.id, *(one.server.model for one in samples if one.server)}
    if isinstance(rater, OpenAIRater) and rater.model in named:
        found.append(f"{rater.model} rates its own answers: it may prefer its own ways, so look at some pairs yourself")
    return found


AT_LEAST, SHARE = 2, 0.1  # contradicting rows, and their share of a source, from which on they are more than slips


def check_scores(recipe: Recipe, rank: int, leads: Counter[bool], columns: list[str], came: int) -> None:
    """Raise a DpoError for a source where most scores call rejected the better answer.

    Args:
        leads: how many rows score chosen above rejected, or alike (True), and how many below (False).
        columns: of the two scores.
        came: rows of the source.
    """
    against = leads[False]
    few = against < AT_LEAST or against < SHARE * came
    if few or 2 * against <= leads.total() or not recipe.data.filters.contradicts_scores:
        return
    source = recipe.data.sources[rank]
    chosen, rejected = ((source.columns or {}).get(column, column) for column in columns)
    swapped = f"score_chosen: {rejected}, score_rejected: {chosen}"
    raise DpoError(
        f"{rejected} is the higher one in {against:,} of {leads.total():,} rows of {source.label}: is lower better?",
        where=recipe.where("data", "sources", rank, "id"),
        hint=f"if it is, columns: {{{swapped}}}; if chosen and rejected are swapped, {{chosen: rejected, "
        f"rejected: chosen, {swapped}}}; data.filters.contradicts_scores: false leaves such scores out",
    )


def check_labels(recipe: Recipe, labels: Counter[bool]) -> None:
    """Raise a DpoError for labelled training rows that are all bad, or all good where the method compares."""
    if len(labels) != 1:
        return
    [(good, count)] = labels.items()
    method, compares = recipe.train.method, trl_arguments()[recipe.train.method]["compares"]
    if good and not compares:
        return
    kind, other = ("good", "bad") if good else ("bad", "good")
    alone = f"; good answers alone are for train.method: {either(methods_of_answers())}" if good else ""
    raise DpoError(
        f"all {count:,} training rows are {kind} answers, and {method} learns from good ones"
        f"{' and bad ones' if compares else ''}",
        where=recipe.where("data", "sources"),
        hint=f"add {other} answers, or look for what drops them in data.filters{alone}",
    )


def nothing_to_train_on(recipe: Recipe, funnel: Funnel, held: int) -> DpoError:
    """Return the error where prompts are kept, and none of them is for training; `held` rows are held out."""
    gone = [f"{count:,} {reason}" for reason, count in list(funnel.reasons().items())[:3]]
    lost = f"; of {funnel.came.total():,} prompts went {', '.join(gone)}" if gone else ""
    return DpoError(
        f"none of the {held} {ROWS_ARE[recipe.data.format]} that are left is for training{lost}",
        where=recipe.where("data", "languages" if not held else "eval_fraction"),
        hint="give it more data, or look at data.languages, data.total and data.eval_fraction",
    )


def nothing_left(recipe: Recipe, funnel: Funnel, layouts: set[str]) -> DpoError:
    """Return the error where no prompt is kept: the commonest reasons, a row and the fix. `layouts`: of the sources."""
    reasons = funnel.reasons()
    biggest = ", ".join(f"{count:,} {reason}" for reason, count in list(reasons.items())[:4])
    first = next(iter(reasons))
    shown = next(some[0][1] for (_, reason), some in funnel.examples.items() if reason == first)
    such = " ".join(filter(None, [shown["where"], shown["prompt"][:80], f"({cause(first, shown['detail'])})"]))
    fix = hint(first)
    if {"kto", "chat"} & layouts and recipe.data.format != "unpaired" and first in ("single_response", "tie"):
        labelled = "kto" in layouts
        what = "answers that are called good or bad" if labelled else "good answers, with no other to compare them with"
        fitting = methods_with("data", "unpaired") if labelled else methods_of_answers()
        way = "set" if recipe.train.method in fitting else f"take train.method: {fitting[0]} with"
        fix = f"these are {what}: {way} data.format: unpaired"
    return DpoError(
        f"nothing is left of {funnel.came.total():,} prompts: {biggest}; such as: {such}",
        where=recipe.where("data", "sources"),
        hint=fix,
    )
