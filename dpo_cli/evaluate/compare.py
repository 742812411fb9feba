"""Several runs side by side: what each was measured on, their differences prompt by prompt, and the best of them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from dpo_cli.disk import read_json
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.evaluate.summary import shown
from dpo_cli.evaluate.text_metrics import valid
from dpo_cli.evaluate.winrate import bradley_terry
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.reads import recipe_keys
from dpo_cli.records import read_answers, read_jsonl, read_pairs
from dpo_cli.run import Run
from dpo_cli.stats import Figure, share_change, win

HELD_OUT, JUDGE, VALID = "pairs", "judge", "valid_rate"  # what is measured; a test set is called by its name
SHOWN, DRAWN = 3, 2  # prompts whose answers differ most, and at random
BASE = "base"
OF_BASE = ("model.id", "model.revision", "model.adapter", "model.load_in_4bit", "model.dtype", "model.thinking")


@dataclass
class Compared:
    """One run of a comparison, as `eval` left it.

    Attributes:
        metrics, training: its `eval/metrics.json` and `train/metrics.json`.
        values: measure -> prompt -> 0..1.
        content: of measures on pairs, the digest of prompts and answers: where it differs they can't be compared.
        answers: prompt -> row of samples.jsonl. scores: prompt -> the judge's, 0..1.
        strength: Elo points above the base, from the judgments; None where no judge saw all runs alike.
        differs: what its recipe has otherwise than the first run's, `{key: value}`; of two methods, whose arguments
            are not the same, only what both have.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    content: dict[str, str] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    strength: Figure | None = None
    differs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """By how much a run's share is above another's, -1..1, on the prompts that both were measured on."""

    run: str
    against: str
    measure: str
    change: Figure


@dataclass(frozen=True)
class Best:
    """The run that leads by `measure`, the nearest other one, and whether its lead over every other is `clear`."""

    measure: str
    run: str
    nearest: Difference
    clear: bool


def read_runs(runs: Sequence[tuple[Recipe, Run]]) -> tuple[dict[str, Compared], list[str]]:
    """Read the runs, by name in their order, with remarks on what can't be compared.

    Strengths are Bradley-Terry's, each run's answers judged against the base's, which all runs share: so they need the
    same judge, the same base, the same held-out prompts and the same sampling.

    Raises:
        DpoError: a run is named twice.
    """
    if len({run.folder.resolve() for _, run in runs}) < len(runs):
        raise DpoError("a run stands twice in the comparison", hint="name each run once", exit_code=USAGE)
    short = [run.folder.name for _, run in runs]
    names = [name if short.count(name) == 1 else str(run.folder) for name, (_, run) in zip(short, runs, strict=True)]
    compared = {name: read(run) for name, (_, run) in zip(names, runs, strict=True)}
    recipes = [recipe for recipe, _ in runs]
    keys = [_keys(recipe) for recipe in recipes]
    for one, recipe, mine in zip(compared.values(), recipes, keys, strict=True):
        alike = recipe.train.method == recipes[0].train.method
        both = [key for key in {**keys[0], **mine} if alike or key in keys[0].keys() & mine.keys()]
        one.differs = {key: mine.get(key) for key in both if mine.get(key) != keys[0].get(key)}
    bases = {json.dumps([mine[key] for key in OF_BASE]) for mine in keys}
    remarks = _remarks(compared, bases)
    if not remarks and all(one.metrics["judge"] for one in compared.values()):
        games = [(prompt, name, BASE, score) for name, one in compared.items() for prompt, score in one.scores.items()]
        for name, strength in bradley_terry(games, BASE, recipes[0].seed).items():
            compared[name].strength = strength
    return compared, remarks


def _keys(recipe: Recipe) -> dict[str, Any]:
    return {key: value for stage in ("prepare", "train", "eval") for key, value in recipe_keys(recipe, stage).items()}


def _remarks(compared: Mapping[str, Compared], bases: set[str]) -> list[str]:
    """Why figures of the runs can't be compared."""
    remarks = []
    if len({one.content[HELD_OUT] for one in compared.values()}) > 1:
        remarks.append(
            "the runs were measured on different held-out pairs: only figures of test sets (eval.sets) can be compared"
        )
    judges = {name: one.metrics["judge"] for name, one in compared.items()}
    without = [name for name, judge in judges.items() if not judge]
    if without:
        if len(without) < len(judges):
            remarks.append(f"no judge has seen {', '.join(without)}, so there are no strengths")
        return remarks
    sampled = {json.dumps({**(one.metrics["sampling"] or {}), "prompts": None}) for one in compared.values()}
    if len({(judge["kind"], judge["model"], judge["template_sha256"]) for judge in judges.values()}) > 1:
        remarks.append("different judges, so no strengths: let one judge see all runs")
    elif len(bases) > 1:
        remarks.append("different base models, so no strengths: they are points over one base")
    elif len(sampled) > 1:
        remarks.append("answers sampled differently, so no strengths: give all runs the same eval settings")
    return remarks


def read(run: Run) -> Compared:
    """Read what `eval` left of a run: figures, rewards of pairs, judgments and answers."""
    folder = run["eval"]
    found = Compared(
        read_json(folder / "metrics.json"), read_json(run["train"] / "metrics.json"), content=_content(run)
    )
    wins: dict[str, dict[str, list[float]]] = {}
    for file in ("pairs", "sets"):
        for row in _rows(folder / f"{file}.jsonl"):
            chosen, rejected = (row[f"policy_{side}"] - row[f"reference_{side}"] for side in ("chosen", "rejected"))
            by_prompt = wins.setdefault(HELD_OUT if file == "pairs" else row["source"], {})
            by_prompt.setdefault(row["prompt"] or row["id"], []).append(win(chosen, rejected))
    found.values = {name: {one: fmean(some) for one, some in by.items()} for name, by in wins.items()}
    found.answers = {json.dumps(row["prompt"]): row for row in _rows(folder / "samples.jsonl")}
    prompts = {row["id"]: prompt for prompt, row in found.answers.items()}
    judged = [row for row in _rows(folder / "judgments.jsonl") if row["id"] in prompts]
    found.scores = {prompts[row["id"]]: row["score"] for row in judged if row["score"] is not None}
    if found.answers:
        found.values[VALID] = {prompt: _valid(row) for prompt, row in found.answers.items()}
    if found.scores:
        found.values[JUDGE] = found.scores
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(path)) if path.is_file() else []


def _content(run: Run) -> dict[str, str]:
    """A digest of the held-out pairs (of ranked lists the best and the worst answer) and of each test set."""
    held_out = [(pair.prompt, pair.chosen, pair.rejected) for pair in read_pairs(run.eval_pairs)]
    pairs: dict[str, list[Any]] = {
        HELD_OUT: held_out or [(one.prompt, one.answer) for one in read_answers(run.eval_pairs)]
    }
    for row in _rows(run["sets"] / "pairs.jsonl"):
        pairs.setdefault(row["source"], []).append((row["prompt"], row["chosen"], row["rejected"]))
    return {name: hashlib.sha256(json.dumps(some).encode()).hexdigest() for name, some in pairs.items()}


def _valid(row: Mapping[str, Any]) -> float:
    answer = row["tuned"]
    shown = SimpleNamespace(
        text=answer["text"], finished=answer["finished"], answer_ids=answer["ids"][answer["thought"] :]
    )
    return float(valid(row["prompt"][-1]["content"], shown))


def _difference(runs: Mapping[str, Compared], run: str, against: str, measure: str) -> Difference | None:
    """One run's share less another's, prompt by prompt; None where they have no prompts, or other pairs, in common."""
    one, other = runs[run], runs[against]
    after, before = one.values.get(measure, {}), other.values.get(measure, {})
    common = [prompt for prompt in before if prompt in after]
    if not common or one.content.get(measure) != other.content.get(measure):
        return None
    change = share_change([before[prompt] for prompt in common], [after[prompt] for prompt in common])
    return Difference(run, against, measure, change)


def differences(runs: Mapping[str, Compared]) -> list[Difference]:
    """Every other run against the first, by all that both were measured on."""
    first, *others = runs
    names = dict.fromkeys([HELD_OUT, *_judge(runs), VALID, *runs[first].content])
    found = (_difference(runs, other, first, name) for other in others for name in names)
    return [one for one in found if one]


def _judge(runs: Mapping[str, Compared]) -> list[str]:
    """The judge as a measure, where one saw all runs alike: else its scores can't be compared."""
    return [JUDGE] if all(one.strength for one in runs.values()) else []


def best(runs: Mapping[str, Compared], worse: Sequence[str]) -> Best | None:
    """The run with the highest share by the first of judge, held-out pairs and test sets that all can be compared by.

    Its lead is clear where no interval of its difference from another run contains 0. As it has to lead every other
    one, more runs make a wrong name no likelier. None where nothing is common to all.

    Args:
        worse: runs whose own verdict is that they are worse than what they started from; they are no candidates.
    """
    names = [name for name in runs if name not in worse]
    if len(names) < 2:
        return None
    for measure in dict.fromkeys([*_judge(runs), HELD_OUT, *runs[names[0]].content]):
        leads = {name: [_difference(runs, name, other, measure) for other in names if other != name] for name in names}
        known = {name: [one for one in some if one] for name, some in leads.items()}
        if any(len(some) < len(names) - 1 for some in known.values()):
            continue
        run = max(names, key=lambda name: min(one.change["value"] or 0.0 for one in known[name]))
        nearest = min(known[run], key=lambda one: one.change["low"] or 0.0)
        return Best(measure, run, nearest, (nearest.change["low"] or 0.0) > 0)
    return None


def examples(runs: Mapping[str, Compared], seed: int) -> list[dict[str, Any]]:
    """Prompts that every run answered: those whose scores by the judge differ most, and some at random (seeded).

    Returns:
        As `summary.examples`; `base` is there where the runs' bases all answered the same.
    """
    first, *others = runs.values()
    common = [prompt for prompt in first.answers if all(prompt in other.answers for other in others)]
    spread = {prompt: _spread(runs, prompt) for prompt in common}
    changed = sorted((prompt for prompt in common if spread[prompt] > 0), key=lambda one: -spread[one])[:SHOWN]
    rest = [prompt for prompt in common if prompt not in changed]
    found = []
    for prompt in [*changed, *random.Random(seed).sample(rest, min(DRAWN, len(rest)))]:
        row = first.answers[prompt]
        alike = all(one.answers[prompt]["base"]["text"] == row["base"]["text"] for one in others)
        answers = {name: shown(one.answers[prompt]["tuned"], one.scores.get(prompt)) for name, one in runs.items()}
        found.append(
            {
                "kind": "changed" if prompt in changed else "random",
                "language": row["language"],
                "prompt": row["prompt"],
                "answers": ({"base": shown(row["base"])} if alike else {}) | answers,
            }
        )
    return found


def _spread(runs: Mapping[str, Compared], prompt: str) -> float:
    """How far the judge's scores of a prompt are apart; below ½ of a tie where the answers differ and nobody judged."""
    scores = [one.scores[prompt] for one in runs.values() if prompt in one.scores]
    if len(scores) == len(runs):
        return max(scores) - min(scores)
    return 0.1 * (len({one.answers[prompt]["tuned"]["text"] for one in runs.values()}) > 1)
