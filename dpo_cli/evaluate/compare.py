"""Runs side by side: what each one's evaluation says, and how strong each is where one judge saw them all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.errors import USAGE, DpoError
from dpo_cli.evaluate.differences import HELD_OUT, contents
from dpo_cli.evaluate.winrate import Comparison, bradley_terry
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.reads import recipe_keys
from dpo_cli.records import read_jsonl
from dpo_cli.run import Run
from dpo_cli.stats import Figure

BASE = "base"
OF_BASE = ("model.id", "model.revision", "model.adapter", "model.load_in_4bit", "model.dtype", "model.thinking")


@dataclass(frozen=True)
class Compared:
    """One run of a comparison.

    Attributes:
        metrics, training: its `eval/metrics.json` and `train/metrics.json`.
        strength: Elo points above the base, from the judgments; None where no judge saw all runs.
        differs: what its recipe has otherwise than the first run's, `{key: value}`; of two methods, whose arguments
            are not the same, only what both have.
    """

    name: str
    metrics: dict[str, Any]
    training: dict[str, Any]
    strength: Figure | None
    differs: dict[str, Any]


def compare(runs: Sequence[tuple[Recipe, Run]]) -> tuple[list[Compared], list[str]]:
    """The runs in their order, and remarks on what can't be compared.

    Strengths are Bradley-Terry's, each run's answers judged against the base's, which all runs share: so they need the
    same judge, the same base, the same held-out prompts and the same sampling.

    Raises:
        DpoError: a run stands there twice.
    """
    if len({run.folder.resolve() for _, run in runs}) < len(runs):
        raise DpoError("a run stands twice in the comparison", hint="name each run once", exit_code=USAGE)
    names = _names(runs)
    metrics = [json.loads((run["eval"] / "metrics.json").read_text(encoding="utf-8")) for _, run in runs]
    held_out = {contents(run)[HELD_OUT] for _, run in runs}
    judges = [figures["judge"] for figures in metrics]
    remarks = []
    if len(held_out) > 1:
        remarks.append(
            "the runs were measured on different held-out pairs: only figures of test sets (eval.sets) can be compared"
        )
    strengths: dict[str, Figure] = {}
    if all(judges):
        told = {(judge["kind"], judge["model"], judge["template_sha256"]) for judge in judges}
        sampled = {json.dumps({**(figures["sampling"] or {}), "prompts": None}) for figures in metrics}
        bases = {json.dumps([_keys(recipe)[key] for key in OF_BASE]) for recipe, _ in runs}
        if len(told) > 1:
            remarks.append("different judges, so no strengths: let one judge see all runs")
        elif len(bases) > 1:
            remarks.append("different base models, so no strengths: they are points over one base")
        elif len(sampled) > 1:
            remarks.append("answers sampled differently, so no strengths: give all runs the same eval settings")
        elif len(held_out) == 1:
            comparisons = [one for name, (_, run) in zip(names, runs, strict=True) for one in _comparisons(name, run)]
            strengths = bradley_terry(comparisons, BASE, runs[0][0].seed)
    elif any(judges):
        without = ", ".join(name for name, judge in zip(names, judges, strict=True) if not judge)
        remarks.append(f"no judge has seen {without}, so there are no strengths")
    first = _keys(runs[0][0])
    compared = []
    for name, figures, (recipe, run) in zip(names, metrics, runs, strict=True):
        keys = _keys(recipe)
        alike = recipe.train.method == runs[0][0].train.method
        both = [key for key in {**first, **keys} if alike or key in first.keys() & keys.keys()]
        differs = {key: keys.get(key) for key in both if keys.get(key) != first.get(key)}
        training = json.loads((run["train"] / "metrics.json").read_text(encoding="utf-8"))
        compared.append(Compared(name, figures, training, strengths.get(name), differs))
    return compared, remarks


def _names(runs: Sequence[tuple[Recipe, Run]]) -> list[str]:
    """The folders' names, with their parents where two are called alike."""
    short = [run.folder.name for _, run in runs]
    return [name if short.count(name) == 1 else str(run.folder) for name, (_, run) in zip(short, runs, strict=True)]


def _keys(recipe: Recipe) -> dict[str, Any]:
    return {**recipe_keys(recipe, "prepare"), **recipe_keys(recipe, "train"), **recipe_keys(recipe, "eval")}


def _comparisons(name: str, run: Run) -> list[Comparison]:
    rows = read_jsonl(run["eval"] / "judgments.jsonl")
    sampled = {row["id"] for row in read_jsonl(run["eval"] / "samples.jsonl")}
    return [(row["id"], name, BASE, row["score"]) for row in rows if row["score"] is not None and row["id"] in sampled]
