"""What `prepare` has to say beyond its counts: what was lost, or is too little, and the edit that changes it."""

from __future__ import annotations

import math
import re
from typing import Any

from dpo_cli.prepare import split
from dpo_cli.prepare.feed import Feed
from dpo_cli.prepare.filters import REASONS
from dpo_cli.prepare.funnel import Entry, Funnel
from dpo_cli.prepare.layouts import MAPPABLE
from dpo_cli.prepare.survey import Read
from dpo_cli.recipe import OpenAIRater, Recipe
from dpo_cli.records import ROWS_ARE
from dpo_cli.stats import wilson

UNREAD_SHARE, DROPPED_SHARE = 0.1, 0.3  # of a source's prompts; more that can't be read, or go for one reason, is said
KEPT_BY_LENGTH = 0.95  # the share of prompts that a proposed model.max_length would keep
ENOUGH_HELD_OUT = 50  # pairs, from which on an accuracy says something
OWN = ("pairs", "kto", "chat", "alpaca", "swift", "sharegpt", "nectar")  # layouts of people's own files
LONGER = 0.6  # the share of prompts whose longer answer the rater prefers, from which on it is said
FOREIGN_SHARE = 0.5  # of a source's prompts

# What to look at where a reason took everything, or much.
HINTS = {
    "schema": "look at the file there; name its layout: or columns: where they are not what was detected",
    "unsupported": "only text can be trained on: take the rows without tools, images, sound and film",
    "contradicts_scores": "data.filters.contradicts_scores: false takes chosen and rejected without the scores",
    "contaminated": "check data.contamination and data.filters.contaminated",
    "language": "data.languages names the languages that may stay; a source's language: says what it is in",
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


# What a reason means, where its cause in a row says less.
MEANS = {
    "duplicate": "the same prompt again", "near_duplicate": "nearly the same prompt", "no_response": "no answer at all",
    "cut_off": "sampled answers that found no end",
    "think": "tags of thinking that are no closed block at the start of an answer",
    "markers": "special tokens, or another chat's role markers, in an answer or a prompt",
    "echo": "answers that are only their prompt", "template": "templated refusals or self-introductions",
    "short": "answers too short to prefer", "no_score": "answers without a score", "tie": "both answers score the same",
    "identical": "both answers are nearly the same", "contradicts_scores": "chosen scores below rejected",
    "contaminated": "prompts that must not be trained on",
}  # fmt: skip


def hint(reason: str) -> str:
    return HINTS.get(reason, f"data.filters.{reason} tunes it")


def all_of(recipe: Recipe, funnel: Funnel, entries: list[Entry], rows: dict[str, int], read: list[Read]) -> list[str]:
    """Everything there is to say; `rows` counts those of train and eval, and those over the quota."""
    said = [*losses(recipe, funnel, entries), *languages(funnel), *held_out(recipe, rows), *left_out(funnel)]
    said += more_held_out(recipe, entries)
    for one in read:
        said += files(one.source.label, one.feeds, one.overlooked)
        said += unread(one.source.label, one.layout, one.unread_columns)
    return said


def own_answers(recipe: Recipe, report: dict[str, Any]) -> list[str]:
    """What to know of answers that the model gave and of their rater, where `report` has `sampled` and `rated`."""
    said, sampled, rated, rater = list[str](), report.get("sampled"), report.get("rated"), recipe.data.rater
    if sampled and sampled["cut_off"] > DROPPED_SHARE * sampled["answers"]:
        lost = f"{sampled['cut_off']:,} of {sampled['answers']:,} answers found no end"
        said.append(f"{lost}: raise sample.max_new_tokens, or train the model on whole answers first")
    if sampled and sampled["identical"] > DROPPED_SHARE * sampled["answers"]:
        lost = f"{sampled['identical']:,} of {sampled['answers']:,} answers were given before to the same prompt"
        said.append(f"{lost}: raise sample.temperature")
    if rated and rated["failures"] > UNREAD_SHARE * rated["answers"]:
        said.append(f"the rater gave no score to {rated['failures']:,} of {rated['answers']:,} answers")
    if rated and (rated["longer_wins"]["low"] or 0) > 0.5 and rated["longer_wins"]["value"] > LONGER:
        share = f"{rated['longer_wins']['value']:.0%} of prompts"
        said.append(f"the rater prefers the longer answer in {share}: length is part of what will be learned")
    samples = [source.sample for source in recipe.data.sources if source.sample]
    named = {recipe.model.id, *(one.server.model for one in samples if one.server)}
    if isinstance(rater, OpenAIRater) and rater.model in named:
        said.append(f"{rater.model} rates its own answers: it may prefer its own ways, so look at some pairs yourself")
    return said


def losses(recipe: Recipe, funnel: Funnel, entries: list[Entry]) -> list[str]:
    """A sentence for every source and reason that took a bad share of it: the commonest cause, a row, and the fix."""
    said = []
    for source, came in funnel.came.items():
        for reason, count in sorted(funnel.reasons(source).items(), key=lambda one: REASONS.index(one[0])):
            if count <= (UNREAD_SHARE if reason == "schema" else DROPPED_SHARE) * came:
                continue
            cause = funnel.commonest(source, reason)
            fix = hint(reason)
            if reason == "too_long":
                needed = length_needed(recipe, [entry for entry in entries if entry.source == source])
                fix = f"model.max_length: {needed} would keep {KEPT_BY_LENGTH:.0%}" if needed else fix
            elif reason == "language":
                fix = f"data.languages has no such share; where that is not their language, set language: on {source}"
            means = f" ({MEANS[reason]})" if reason in MEANS else ""
            such = cause.place if means else f"{cause.place}: {cause.detail}"
            said.append(f"{source}: {count:,} of {came:,} dropped as {reason}{means}, such as {such}; {fix}")
    return said


def length_needed(recipe: Recipe, entries: list[Entry]) -> int | None:
    """The model.max_length that would keep 95 % of the prompts whose tokens were counted, up to the next 64."""
    options = recipe.data.filters.too_long
    share = options.max_prompt if options else 1.0
    needs = sorted(max(*one.tokens[1].values(), math.ceil(one.tokens[0] / share)) for one in entries if one.tokens)
    return math.ceil(needs[math.ceil(KEPT_BY_LENGTH * len(needs)) - 1] / 64) * 64 if needs else None


def files(label: str, feeds: list[Feed], overlooked: list[str]) -> list[str]:
    """What is to be known about the files of a source: guesses that were made, and what gave no rows."""
    said = [f"{label}: {feed.name} was {note}" for feed in feeds for note in feed.doubts]
    empty = [feed.name for feed in feeds if not feed.count]
    if empty:
        said.append(f"{label}: no rows in {_listed(empty)}")
    if overlooked:
        said.append(f"{label}: not read: {_listed(overlooked)}; data_files: names the files that are meant")
    return said


# Columns that change what a row means, by what they are called.
_TELLING = re.compile(
    r"input|context|system|passage|document|history|question|query|score|rating|reward|rank|margin|reason|think|thought"
    r"|\blang|language|标签|评分|分数|系统|上下文|输入",
    re.IGNORECASE,
)


def unread(label: str, layout: str, names: list[str]) -> list[str]:
    """Columns of a source of one's own that nothing reads, and that sound as if something should."""
    telling = [name for name in names if _TELLING.search(name)]
    if not telling or layout not in OWN:
        return []
    way = f"; columns: maps a column to one of {', '.join(MAPPABLE[layout])}" if layout in MAPPABLE else ""
    return [f"{label}: nothing reads {_listed(telling)} (read as {layout}){way}"]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def held_out(recipe: Recipe, rows: dict[str, int]) -> list[str]:
    """What can't be measured with so few held-out pairs, and how to hold out more."""
    held, every = rows["eval"], rows["train"] + rows["eval"] + rows["quota"]
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


def more_held_out(recipe: Recipe, entries: list[Entry]) -> list[str]:
    """That more than `data.eval_fraction` is held out, for that would be too few prompts."""
    clusters = {entry.cluster for entry in entries if entry.drop is None}
    fraction = recipe.data.eval_fraction
    below = split.held_below(clusters, fraction)
    held = sum(one < below for one in clusters)
    if held == sum(one < fraction * 2.0**64 for one in clusters):
        return []
    share = f"{fraction:.0%}"
    return [
        f"{held} of {len(clusters)} prompts are held out, not {share}: fewer would measure next to nothing; with more "
        "data the share falls to data.eval_fraction, and some of these prompts then train"
    ]


def languages(funnel: Funnel) -> list[str]:
    """Sources whose prompts are counted as English by their script, and read like another language."""
    said = []
    for source, found in funnel.latin.items():
        for name, count in found.most_common(1):
            if name != "en" and count > FOREIGN_SHARE * funnel.came[source]:
                seen = f"{count:,} of {found.total():,} prompts that are counted as en look like {name}"
                said.append(f"{source}: {seen}; set language: {name} on the source")
    return said


def left_out(funnel: Funnel) -> list[str]:
    """What layouts left out of rows that they read."""
    return [
        f"{source}: left out of {count:,} of {funnel.came[source]:,} prompts: {what}"
        for (source, what), count in sorted(funnel.notes.items())
    ]
