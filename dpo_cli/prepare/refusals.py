"""What makes the rows as a whole useless, so that `prepare` stops: said with its cause and the edit that fixes it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dpo_cli.errors import DpoError, either
from dpo_cli.prepare import remarks
from dpo_cli.prepare.funnel import Funnel
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.train import methods_of_answers, methods_with, trl_arguments
from dpo_cli.records import ROWS_ARE, CandidateSet

AT_LEAST, SHARE = 2, 0.1  # contradicting rows, and their share of a source, from which on they are more than slips


@dataclass
class Contradictions:
    """How many rows of a source have scores of their own for chosen and rejected, and in how many they contradict."""

    scored: int = 0
    against: int = 0
    columns: list[str] = field(default_factory=list)

    def add(self, item: CandidateSet) -> None:
        lead = item.lead()
        if lead is not None:
            self.scored += 1
            self.against += lead < 0
            self.columns = list(item.stated)

    def check(self, recipe: Recipe, rank: int, came: int) -> None:
        """Refuse a source of `came` rows where most scores call rejected the better answer.

        Raises:
            DpoError: they do.
        """
        few = self.against < AT_LEAST or self.against < SHARE * came
        if few or 2 * self.against <= self.scored or not recipe.data.filters.contradicts_scores:
            return
        mapped = recipe.data.sources[rank].columns or {}
        chosen, rejected = (mapped.get(column, column) for column in self.columns)
        swapped = f"score_chosen: {rejected}, score_rejected: {chosen}"
        raise DpoError(
            f"{rejected} is the higher one in {self.against:,} of {self.scored:,} rows of "
            f"{recipe.data.sources[rank].label}: is lower better?",
            where=recipe.where("data", "sources", rank, "id"),
            hint=f"if it is, columns: {{{swapped}}}; if chosen and rejected are swapped, {{chosen: rejected, "
            f"rejected: chosen, {swapped}}}; data.filters.contradicts_scores: false leaves such scores out",
        )


def check_labels(recipe: Recipe, labels: Counter[bool]) -> None:
    """Refuse labelled training rows that are all bad, or all good where the method compares; `labels` counts them.

    Raises:
        DpoError: they are.
    """
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
    """What to say where prompts are kept, and none of them is for training; `held` rows are held out."""
    gone = [f"{count:,} {reason}" for reason, count in list(funnel.reasons().items())[:3]]
    lost = f"; of {funnel.came.total():,} prompts went {', '.join(gone)}" if gone else ""
    return DpoError(
        f"none of the {held} {ROWS_ARE[recipe.data.format]} that are left is for training{lost}",
        where=recipe.where("data", "languages" if not held else "eval_fraction"),
        hint="give it more data, or look at data.languages, data.total and data.eval_fraction",
    )


def nothing_left(recipe: Recipe, funnel: Funnel, layouts: set[str]) -> DpoError:
    """What to say where no prompt is kept: the commonest reasons, a row and the fix. `layouts`: of the sources."""
    reasons = funnel.reasons()
    biggest = ", ".join(f"{count:,} {reason}" for reason, count in list(reasons.items())[:4])
    first = next(iter(reasons))
    shown = next(some[0][1] for (_, reason), some in funnel.examples.items() if reason == first)
    said = f" ({remarks.MEANS.get(first) or shown['detail']})" if shown["detail"] else ""
    such = " ".join(filter(None, [shown["where"], shown["prompt"][:80]])) + said
    hint = remarks.hint(first)
    if {"kto", "chat"} & layouts and recipe.data.format != "unpaired" and first in ("single_response", "tie"):
        labelled = "kto" in layouts
        what = "answers that are called good or bad" if labelled else "good answers, with no other to compare them with"
        fitting = methods_with("data", "unpaired") if labelled else methods_of_answers()
        way = "set" if recipe.train.method in fitting else f"take train.method: {fitting[0]} with"
        hint = f"these are {what}: {way} data.format: unpaired"
    return DpoError(
        f"nothing is left of {funnel.came.total():,} prompts: {biggest}; such as: {such}",
        where=recipe.where("data", "sources"),
        hint=hint,
    )
