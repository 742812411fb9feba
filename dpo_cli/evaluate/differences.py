"""What sets runs apart, prompt by prompt: differences with their intervals, and the best run where one can be told."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from dpo_cli.evaluate.text_metrics import valid
from dpo_cli.records import read_answers, read_jsonl, read_pairs
from dpo_cli.run import Run
from dpo_cli.stats import Figure, share_change, win

HELD_OUT, JUDGE, VALID = "pairs", "judge", "valid_rate"  # what is measured; a test set is called by its name
SHOWN, DRAWN = 3, 2  # prompts whose answers differ most, and at random


@dataclass
class Measured:
    """Of one run each share by prompt, and the answers that it gave.

    Attributes:
        values: what is measured -> prompt -> 0..1.
        content: of pairs that are measured, their digest: what differs in it can't be compared.
        answers: prompt -> row of samples.jsonl. scores: prompt -> the judge's, 0..1.
    """

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    content: dict[str, str] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """By how much a run's share is above another's, -1..1, on the prompts that both were measured on."""

    run: str
    against: str
    measure: str
    change: Figure


@dataclass(frozen=True)
class Best:
    """The run that leads by `measure`, the nearest other one, and whether its lead over every other can be told."""

    measure: str
    run: str
    nearest: Difference
    told: bool


def measured(run: Run) -> Measured:
    """Read what `eval` left of a run: rewards of pairs, judgments and answers."""
    found, folder = Measured(), run["eval"]
    for file in ("pairs.jsonl", "sets.jsonl"):
        wins: dict[str, dict[str, list[float]]] = {}
        for row in read_jsonl(folder / file) if (folder / file).is_file() else ():
            chosen, rejected = (row[f"policy_{side}"] - row[f"reference_{side}"] for side in ("chosen", "rejected"))
            name = HELD_OUT if file == "pairs.jsonl" else row["source"]
            wins.setdefault(name, {}).setdefault(row["prompt"] or row["id"], []).append(win(chosen, rejected))
        found.values |= {name: {one: fmean(some) for one, some in by.items()} for name, by in wins.items()}
    found.content = contents(run)
    if (folder / "samples.jsonl").is_file():
        found.answers = {json.dumps(row["prompt"]): row for row in read_jsonl(folder / "samples.jsonl")}
    by_id = {row["id"]: prompt for prompt, row in found.answers.items()}
    if (folder / "judgments.jsonl").is_file():
        judged = [row for row in read_jsonl(folder / "judgments.jsonl") if row["id"] in by_id]
        found.scores = {by_id[row["id"]]: row["score"] for row in judged if row["score"] is not None}
    if found.answers:
        found.values[VALID] = {prompt: _valid(row) for prompt, row in found.answers.items()}
    if found.scores:
        found.values[JUDGE] = found.scores
    return found


def contents(run: Run) -> dict[str, str]:
    """A digest of the held-out pairs and of each test set: the same for the same prompts and answers.

    Of ranked lists the best and the worst answers are the pair.
    """
    held_out = [(pair.prompt, pair.chosen, pair.rejected) for pair in read_pairs(run.eval_pairs)]
    answers = [(one.prompt, one.answer) for one in ([] if held_out else read_answers(run.eval_pairs))]
    pairs: dict[str, list[Any]] = {HELD_OUT: held_out or answers}
    if (run["sets"] / "pairs.jsonl").is_file():
        for row in read_jsonl(run["sets"] / "pairs.jsonl"):
            pairs.setdefault(row["source"], []).append((row["prompt"], row["chosen"], row["rejected"]))
    return {name: hashlib.sha256(json.dumps(some).encode()).hexdigest() for name, some in pairs.items()}


def difference(runs: Mapping[str, Measured], run: str, against: str, measure: str) -> Difference | None:
    """One run's share less another's, prompt by prompt; None where they have no prompts, or other pairs, in common."""
    one, other = runs[run], runs[against]
    if one.content.get(measure) != other.content.get(measure):
        return None
    after, before = one.values.get(measure, {}), other.values.get(measure, {})
    common = [prompt for prompt in before if prompt in after]
    if not common:
        return None
    change = share_change([before[prompt] for prompt in common], [after[prompt] for prompt in common])
    return Difference(run, against, measure, change)


def differences(runs: Mapping[str, Measured], judged_alike: bool) -> list[Difference]:
    """Every other run against the first, by all that both were measured on.

    Args:
        judged_alike: one judge saw all, each against the same base: else its scores can't be compared.
    """
    first, *others = runs
    names = dict.fromkeys([HELD_OUT, *([JUDGE] if judged_alike else []), VALID, *runs[first].content])
    found = (difference(runs, other, first, name) for other in others for name in names)
    return [one for one in found if one]


def best(runs: Mapping[str, Measured], judged_alike: bool, worse: Sequence[str]) -> Best | None:
    """The run with the highest share by the first of judge, held-out pairs and test sets that all can be compared by.

    Its lead can be told where no interval of its difference from another run holds 0. As it has to lead every other
    one, more runs make a wrong name no likelier. None where nothing is common to all.

    Args:
        worse: runs whose own verdict is that they are worse than what they started from; they are no candidates.
    """
    names = [name for name in runs if name not in worse]
    if len(names) < 2:
        return None
    for measure in dict.fromkeys([*([JUDGE] if judged_alike else []), HELD_OUT, *runs[names[0]].content]):
        leads = {name: [difference(runs, name, other, measure) for other in names if other != name] for name in names}
        known = {name: [one for one in some if one] for name, some in leads.items()}
        if any(len(known[name]) < len(names) - 1 for name in names):
            continue
        lowest = {name: min(some, key=lambda one: one.change["value"] or 0.0) for name, some in known.items()}
        run = max(names, key=lambda name: lowest[name].change["value"] or 0.0)
        nearest = min(known[run], key=lambda one: one.change["low"] or 0.0)
        return Best(measure, run, nearest, (nearest.change["low"] or 0.0) > 0)
    return None


def examples(runs: Mapping[str, Measured], seed: int) -> list[dict[str, Any]]:
    """Prompts that every run answered: those whose scores by the judge differ most, and some at random (seeded).

    Returns:
        {kind: changed or random, language, prompt, base, answers {run: answer}, scores {run: 0..1}}; `base` is None
        where the runs' bases did not all say the same.
    """
    first, *others = runs.values()
    common = [prompt for prompt in first.answers if all(prompt in other.answers for other in others)]
    spread = {prompt: _spread(runs, prompt) for prompt in common}
    changed = sorted((prompt for prompt in common if spread[prompt] > 0), key=lambda one: -spread[one])[:SHOWN]
    rest = [prompt for prompt in common if prompt not in changed]
    drawn = random.Random(seed).sample(rest, min(DRAWN, len(rest)))
    found = []
    for kind, some in (("changed", changed), ("random", drawn)):
        for prompt in some:
            rows = {name: one.answers[prompt] for name, one in runs.items()}
            bases = [row["base"] for row in rows.values()]
            found.append(
                {
                    "kind": kind,
                    "language": first.answers[prompt]["language"],
                    "prompt": first.answers[prompt]["prompt"],
                    "base": bases[0] if all(base["text"] == bases[0]["text"] for base in bases) else None,
                    "answers": {name: row["tuned"] for name, row in rows.items()},
                    "scores": {name: one.scores[prompt] for name, one in runs.items() if prompt in one.scores},
                }
            )
    return found


def _spread(runs: Mapping[str, Measured], prompt: str) -> float:
    """How far the judge's scores of a prompt are apart; below ½ of a tie where the answers differ and nobody judged."""
    scores = [one.scores[prompt] for one in runs.values() if prompt in one.scores]
    if len(scores) == len(runs):
        return max(scores) - min(scores)
    return 0.1 * (len({one.answers[prompt]["tuned"]["text"] for one in runs.values()}) > 1)


def _valid(row: Mapping[str, Any]) -> float:
    answer = row["tuned"]
    said = SimpleNamespace(text=answer["text"], finished=answer["finished"], said=answer["ids"][answer["thought"] :])
    return float(valid(row["prompt"][-1]["content"], said))
