"""The stage: score the held-out pairs, say what they show, and write metrics and report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_cli import models
from dpo_cli.errors import DpoError
from dpo_cli.evaluate.report import write_report
from dpo_cli.evaluate.score import pair_metrics, score_pairs
from dpo_cli.recipe import Recipe
from dpo_cli.records import read_pairs, write_jsonl
from dpo_cli.run import Run, write_json
from dpo_cli.stats import Figure


@dataclass(frozen=True)
class Evaluated:
    """What `eval` prints: `eval/metrics.json`, and where the report is."""

    metrics: dict[str, Any]
    report: Path


def evaluate(recipe: Recipe, run: Run, *, quiet: bool = False) -> Evaluated:
    """Score `data/eval.jsonl` with the trained adapter on and off.

    Raises:
        DpoError: no pair was held out.
    """
    pairs = read_pairs(run.eval_pairs)
    if not pairs:
        raise DpoError(
            "no pair was held out, so there is nothing to evaluate on",
            where=recipe.where("data", "eval_fraction"),
            hint="raise data.eval_fraction, or add data",
        )
    models.import_backend(models.Backend("hf", "evaluation"))
    model, tokenizer = models.load_tuned(recipe, run.adapter)
    if not quiet:
        print(f"eval: {len(pairs)} held-out pairs, tuned and base from one set of weights", flush=True)
    batch_size = 2 * recipe.train.per_device_eval_batch_size
    scored = score_pairs(model, tokenizer, pairs, recipe.model.max_length, batch_size)

    beta = recipe.train.beta
    languages = sorted({pair.language for pair in scored})
    metrics: dict[str, Any] = {
        "pairs": pair_metrics(scored, beta, recipe.seed),
        "languages": {
            language: {"pairs": pair_metrics([s for s in scored if s.language == language], beta, recipe.seed)}
            for language in languages
        },
    }
    metrics["verdict"] = verdict(metrics)
    prepared = json.loads((run["prepare"] / "report.json").read_text(encoding="utf-8"))
    metrics["warnings"] = [*warnings(metrics), *(f"data: {warning}" for warning in prepared["warnings"])]
    with run.stage("eval", recipe) as draft:
        write_jsonl(draft.folder / "pairs.jsonl", (asdict(one) for one in scored))
        write_json(draft.folder / "metrics.json", metrics)
        margins = [beta * (one.chosen_drift - one.rejected_drift) for one in scored]
        write_report(recipe, run, metrics, margins, draft.folder)
    return Evaluated(metrics, run["eval"] / "report.html")


def verdict(metrics: dict[str, Any]) -> str:
    """One sentence: did training teach the preference, as far as these pairs can tell."""
    figure: Figure = metrics["pairs"]["reward_accuracy"]
    longer: Figure = metrics["pairs"]["longer_wins"]
    low, high = figure["low"] or 0.0, figure["high"] or 0.0
    seen = (
        f"moved towards the chosen answer in {percent(figure['value'])} of {figure['n']} held-out pairs "
        f"(95% interval {percent(low)} to {percent(high)}; 50% before training"
    )
    seen += f", {percent(longer['value'])} for always taking the longer answer)"
    if low <= 0.5 <= high:
        return f"Not distinguishable from no training: the tuned model {seen}."
    if high < 0.5:
        return f"Worse than no training: the tuned model {seen}."
    if low <= (longer["value"] or 0.0):
        return f"It learned something, but no more than length would explain: the tuned model {seen}."
    return f"It learned the preference: the tuned model {seen}."


def warnings(metrics: dict[str, Any]) -> list[str]:
    """What a reader should know before trusting the figures."""
    found = []
    pairs = metrics["pairs"]
    if (pairs["chosen_drift"]["value"] or 0.0) < 0:
        found.append(
            f"the chosen answers became less likely ({pairs['chosen_drift']['value']:.2f} nats on average): normal up "
            "to a point with DPO; where text gets worse add an sft term to train.loss_type or lower train.learning_rate"
        )
    for language, figures in metrics["languages"].items():
        accuracy = figures["pairs"]["reward_accuracy"]
        if accuracy["n"] < 30:
            found.append(f"only {accuracy['n']} held-out pairs in {language}: its interval is wide")
        elif accuracy["low"] <= 0.5:
            found.append(f"in {language} the accuracy is not distinguishable from 50%")
    return found


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"
