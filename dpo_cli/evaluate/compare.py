"""Several runs side by side: what each was measured on, their differences prompt by prompt, and the best of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from dpo_cli.disk import read_json
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.evaluate.summary import CHANGED, chosen, shown
from dpo_cli.evaluate.text_metrics import valid
from dpo_cli.evaluate.winrate import bradley_terry
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.reads import recipe_keys
from dpo_cli.records import read_answers, read_jsonl, read_pairs
from dpo_cli.run import Run
from dpo_cli.stats import Figure, share_change, win

HELD_OUT, JUDGE, VALID = "pairs", "judge", "valid_rate"  # what is measured; a test set is called by its name
OF_BASE = ("model.id", "model.revision", "model.adapter", "model.load_in_4bit", "model.dtype", "model.thinking")


@dataclass
class Compared:
    """One run of a comparison, as `eval` left it.

    Attributes:
        metrics, training: its `eval/metrics.json` and `train/metrics.json`.
        values: measure -> prompt -> 0..1; of the judge only where it saw all runs alike.
        content: of measures on pairs, the digest of prompts and answers: where it differs they can't be compared.
        answers: prompt -> row of samples.jsonl. scores: prompt -> the judge's, 0..1.
        differs: what its recipe has otherwise than the first run's, `{key: value}`; of two methods, whose arguments
            are not the same, only what both have.
        strength: Elo points above the base, where the judge saw all runs alike.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    content: dict[str, str] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    differs: dict[str, Any] = field(default_factory=dict)
    strength: Figure | None = None


class Difference(NamedTuple):
    """By how much a run's share is above another's, -1..1, on the prompts that both were measured on."""

    run: str
    against: str
    measure: str
    change: Figure

    @property
    def clear(self) -> bool:
        """Whether the interval is above 0."""
        return (self.change["low"] or 0.0) > 0


def read_runs(runs: Sequence[tuple[Recipe, Run]]) -> tuple[dict[str, Compared], list[str]]:
    """Read the runs, by name in their order, with remarks on what can't be compared.

    Raises:
        DpoError: a run is named twice.
    """
    if len({run.folder.resolve() for _, run in runs}) < len(runs):
        raise DpoError("a run stands twice in the comparison", hint="name each run once", exit_code=USAGE)
    names = _names([run.folder.resolve() for _, run in runs])
    compared = {name: read(run) for name, (_, run) in zip(names, runs, strict=True)}
    stages = ("prepare", "train", "eval")
    keys = [{key: of for stage in stages for key, of in recipe_keys(recipe, stage).items()} for recipe, _ in runs]
    for one, mine in zip(compared.values(), keys, strict=True):
        alike = mine["train.method"] == keys[0]["train.method"]
        both = [key for key in {**keys[0], **mine} if alike or key in keys[0].keys() & mine.keys()]
        one.differs = {key: mine.get(key) for key in both if mine.get(key) != keys[0].get(key)}
    remarks = list(_remarks(compared, [[mine[key] for key in OF_BASE] for mine in keys]))
    if not remarks:
        for one in compared.values():
            one.values[JUDGE] = one.scores
        games = [(prompt, name, "", score) for name, one in compared.items() for prompt, score in one.scores.items()]
        for name, strength in bradley_terry(games, "", runs[0][0].seed).items():
            compared[name].strength = strength
    return compared, remarks


def _names(folders: Sequence[Path]) -> list[str]:
    """Name each folder by its last parts, as few as set it apart from the others."""

    def last(folder: Path, parts: int) -> str:
        return "/".join(folder.parts[-parts:])

    def alone(folder: Path, parts: int) -> bool:
        return [last(one, parts) for one in folders].count(last(folder, parts)) == 1

    return [next(last(one, parts) for parts in count(1) if alone(one, parts)) for one in folders]


def _remarks(compared: Mapping[str, Compared], bases: Sequence[Any]) -> Iterator[str]:
    """What can't be compared; a win rate is over the base's answers, so that those have to be the same."""
    metrics = [one.metrics for one in compared.values()]
    judges = [one["judge"] and [one["judge"][key] for key in ("kind", "model", "template_sha256")] for one in metrics]
    sampling = [one["sampling"] and {**one["sampling"], "prompts": None} for one in metrics]
    held_out = [one.content[HELD_OUT] for one in compared.values()]
    of_all: dict[str, Sequence[Any]] = {
        "held-out pairs": held_out,
        "judges": judges,
        "base models": bases,
        "sampling settings": sampling,
    }
    differ = [what for what, some in of_all.items() if any(one != some[0] for one in some)]
    if "held-out pairs" in differ:
        yield "different held-out pairs: of accuracies, only those of test sets (eval.sets) can be compared"
    if differ and any(judges):
        yield f"win rates can't be compared: the runs have different {', '.join(differ)}"


def read(run: Run) -> Compared:
    """Read what `eval` left of a run: figures, rewards of pairs, judgments and answers."""
    folder = run["eval"]
    metrics, training = read_json(folder / "metrics.json"), read_json(run["train"] / "metrics.json")
    found = Compared(metrics, training, content=_content(run))
    wins: dict[str, dict[str, list[float]]] = {}
    for file in ("pairs", "sets"):
        for row in _rows(folder / f"{file}.jsonl"):
            chosen, rejected = (row[f"policy_{side}"] - row[f"reference_{side}"] for side in ("chosen", "rejected"))
            by_prompt = wins.setdefault(HELD_OUT if file == "pairs" else row["source"], {})
            by_prompt.setdefault(row["prompt"] or row["id"], []).append(win(chosen, rejected))
    found.values = {name: {one: fmean(some) for one, some in by.items()} for name, by in wins.items()}
    found.answers = {json.dumps(row["prompt"]): row for row in _rows(folder / "samples.jsonl")}
    found.values[VALID] = {prompt: _valid(row) for prompt, row in found.answers.items()}
    scores = {row["id"]: row["score"] for row in _rows(folder / "judgments.jsonl") if row["score"] is not None}
    found.scores = {prompt: scores[row["id"]] for prompt, row in found.answers.items() if row["id"] in scores}
    return found


def _valid(row: Mapping[str, Any]) -> float:
    answer = row["tuned"]
    ids = answer["ids"][answer["thought"] :]
    return float(valid(row["prompt"][-1]["content"], answer["text"], ids, answer["finished"]))


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
    names = dict.fromkeys([HELD_OUT, JUDGE, VALID, *runs[first].content])
    found = (_difference(runs, other, first, name) for other in others for name in names)
    return [one for one in found if one]


def best(runs: Mapping[str, Compared]) -> Difference | None:
    """The run with the highest share by the first of judge, held-out pairs and test sets that all can be compared by.

    Its lead is clear where no interval of its difference from another run contains 0. As it has to lead every other
    one, more runs make a wrong name no likelier.

    Returns:
        Its difference from the nearest other run; None where nothing is common to all.
    """
    for measure in dict.fromkeys([JUDGE, HELD_OUT, *next(iter(runs.values())).content]):
        leads = {name: [_difference(runs, name, other, measure) for other in runs if other != name] for name in runs}
        known = {name: [one for one in some if one] for name, some in leads.items()}
        if all(len(some) == len(runs) - 1 for some in known.values()):
            run = max(known, key=lambda name: min(one.change["value"] or 0.0 for one in known[name]))
            return min(known[run], key=lambda one: one.change["low"] or 0.0)
    return None


def examples(runs: Mapping[str, Compared], seed: int) -> list[dict[str, Any]]:
    """Prompts that every run answered: those whose scores by the judge differ most, and some at random (seeded).

    Returns:
        As `summary.examples`; `base` is there where the runs' bases all answered the same.
    """
    first, *others = runs.values()
    common = [prompt for prompt in first.answers if all(prompt in other.answers for other in others)]
    spread = {prompt: _spread(runs, prompt) for prompt in common}
    changed = sorted((prompt for prompt in common if spread[prompt] > 0), key=lambda one: -spread[one])[:CHANGED]
    found = []
    for kind, prompt in chosen(common, changed, seed):
        row = first.answers[prompt]
        alike = all(one.answers[prompt]["base"]["text"] == row["base"]["text"] for one in others)
        answers = {name: shown(one.answers[prompt]["tuned"], one.scores.get(prompt)) for name, one in runs.items()}
        answers = ({"base": shown(row["base"])} if alike else {}) | answers
        found.append({"kind": kind, "language": row["language"], "prompt": row["prompt"], "answers": answers})
    return found


def _spread(runs: Mapping[str, Compared], prompt: str) -> float:
    """How far the judge's scores of a prompt are apart; below ½ of a tie where the answers differ and nobody judged."""
    scores = [one.scores[prompt] for one in runs.values() if prompt in one.scores]
    if len(scores) == len(runs):
        return max(scores) - min(scores)
    return 0.1 * (len({one.answers[prompt]["tuned"]["text"] for one in runs.values()}) > 1)
