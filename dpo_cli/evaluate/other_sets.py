"""The test sets of `eval.sets`, as `prepare` left them: scored beside the held-out pairs, each with its own figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_cli.disk import read_json
from dpo_cli.evaluate.pairs import Scored, by_name, pair_metrics
from dpo_cli.recipe import Recipe
from dpo_cli.records import SetPair, read_jsonl
from dpo_cli.run import Run

COUNTS = ("in", "kept", "dropped", "overlap")


def read_sets(recipe: Recipe, run: Run) -> list[SetPair]:
    """The pairs of all test sets; `source` is the set's name."""
    return [SetPair(**row) for row in read_jsonl(run["sets"] / "pairs.jsonl")] if recipe.eval.sets else []


def set_metrics(
    recipe: Recipe, run: Run, pairs: Sequence[SetPair], scored: Sequence[Scored]
) -> dict[str, dict[str, Any]]:
    """The `sets` figures of `eval/metrics.json`, by the sets' names.

    Returns:
        in, kept, dropped: prompts of the set, as in data/report.json. overlap: how many of those kept are, or nearly
            are, prompts that were trained on.
        pairs: as of the held-out pairs. languages, subsets: name -> {"pairs"}, where there are several; a subset is
            what the set itself calls a part of it.
    """
    if not pairs:
        return {}
    report = read_json(run["sets"] / "report.json")
    subsets, how = {pair.id: pair.subset for pair in pairs}, (recipe.train.reward_scale, recipe.seed)

    def groups(some: Sequence[Scored], names: Sequence[str | None]) -> dict[str, Any]:
        return by_name(some, names, *how) if len({*names} - {None}) > 1 else {}

    found = {}
    for name, counts in report.items():
        some = [one for one in scored if one.source == name]
        found[name] = {
            **{key: counts[key] for key in COUNTS},
            "pairs": pair_metrics(some, *how),
            "languages": groups(some, [one.language for one in some]),
            "subsets": groups(some, [subsets[one.id] for one in some]),
        }
    return found
