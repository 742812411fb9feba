"""The stage: score the held-out pairs, let both models answer, ask the judge, and write what it all shows.

Samples and judgments cost the most, so neither is lost: answers are kept in `.eval/` in the run while they are made
and found again after a crash, judgments in `.judgments.sqlite` beside the runs, for every run that asks again.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpo_cli import backends, chat, judging
from dpo_cli.disk import read_json, sha256, write_json
from dpo_cli.errors import DpoError
from dpo_cli.evaluate import summary, winrate, words
from dpo_cli.evaluate.pairs import (
    Scored,
    answer_metrics,
    as_pair,
    baselines,
    grouped_metrics,
    read_sets,
    score_pairs,
    set_metrics,
)
from dpo_cli.evaluate.report import write_report
from dpo_cli.evaluate.samples import Sample, draws, first_of_each_prompt, load_both, sample_pairs
from dpo_cli.evaluate.text_metrics import sample_metrics
from dpo_cli.evaluate.verdict import verdict, warnings
from dpo_cli.judging import Judgment
from dpo_cli.machine import versions
from dpo_cli.progress import Step
from dpo_cli.published import recipe_yaml, report_sections, without_paths
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.train import trl_arguments
from dpo_cli.records import Message, Pair, read_answers, read_jsonl, read_pairs, write_jsonl
from dpo_cli.run import Run, fingerprint
from dpo_cli.store import Store
from dpo_cli.terminal import print_answers


def evaluate(recipe: Recipe, run: Run, *, quiet: bool = False) -> dict[str, Any]:
    """Measure the trained adapter against its reference on `data/eval.jsonl`: one set of weights, adapter on and off.

    Returns:
        `eval/metrics.json`.

    Raises:
        DpoError: nothing was held out, or nothing fits; the judge can't be asked.
    """
    pairs, answers, bad = _held_out(recipe, run)
    tested = read_sets(recipe, run)
    backends.import_backend(backends.Backend("hf", "evaluation"))
    remark = judging.ready(recipe.eval.judge) if recipe.eval.judge else None
    model, tokenizer = load_both(recipe, run)
    if not quiet:
        what = f"{len(pairs)} held-out pairs" if pairs else f"{len(answers)} held-out answers"
        what += " that had no part in choosing the adapter" if recipe.keeps_best else ""
        print(f"eval: {what}, tuned and base from one set of weights", flush=True)
        if tested:
            print(f"eval: {len(tested):,} pairs of {', '.join(one.label for one in recipe.eval.sets)}", flush=True)
        print(f"eval: {remark}\n" if remark else "", end="", flush=True)
    with Step("scoring the held-out answers"):
        lists: list[Sequence[Pair]] = [pairs, tested, answers, bad]
        batch_size = 2 * recipe.train.per_device_eval_batch_size
        scored = Scores(*score_pairs(model, tokenizer, lists, recipe.model.max_length, batch_size))
    if not scored.pairs and (pairs or not scored.learned):
        raise DpoError(
            "every held-out prompt fills model.max_length, so there is no answer to score",
            where=recipe.where("model", "max_length"),
            hint="raise model.max_length, or leave data.filters.too_long on",
        )
    made_from = _made_from(recipe, run)
    asked = (pairs or answers) if recipe.eval.prompts else []
    samples = _sample(recipe, run, model, tokenizer, asked, made_from, quiet) if asked else []
    del model
    if torch.cuda.is_available():  # a judge of its own may need the room
        gc.collect()
        torch.cuda.empty_cache()
    judgments, calibration = _judge(recipe, run, samples, pairs, quiet) if recipe.eval.judge else ([], [])

    metrics = _metrics(recipe, run, scored, samples, judgments, calibration)
    with run.stage("eval", recipe) as draft:
        draft.record["samples"] = made_from
        judged = [*judgments, *calibration]
        rows: dict[str, Any] = {"pairs": scored.pairs, "sets": scored.sets, "samples": samples, "judgments": judged}
        for name, some in rows.items():
            if some or name == "pairs":
                write_jsonl(draft.folder / f"{name}.jsonl", map(asdict, some))
        write_json(draft.folder / "metrics.json", metrics)
        write_report(metrics, draft.folder)
    shutil.rmtree(_work(run), ignore_errors=True)
    return metrics


class Scores(NamedTuple):
    """The held-out pairs, those of the test sets, and held-out answers to be learned and bad ones."""

    pairs: list[Scored]
    sets: list[Scored]
    learned: list[Scored]
    bad: list[Scored]


def answer(recipe: Recipe, run: Run, prompt: str, count: int) -> None:
    """Print `count` answers of the base and of the tuned model to one prompt; nothing is written."""
    model, tokenizer = load_both(recipe, run)
    messages: list[Message] = [{"role": "user", "content": prompt}]
    options = chat.chat_template_kwargs(recipe)
    print_answers(prompt, *draws(model, tokenizer, messages, recipe.eval, recipe.seed, count, options))


def _held_out(recipe: Recipe, run: Run) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """The held-out pairs, and answers to be learned; the bad answers where every prompt has but one, good or bad.

    With early stopping, of those rows that did not choose the adapter.
    """
    half = False if recipe.keeps_best else None
    pairs = read_pairs(run.eval_pairs, chosen_on=half)
    good, bad = (list(map(as_pair, read_answers(run.eval_pairs, chosen_on=half, good=one))) for one in (True, False))
    if pairs:
        return pairs, good, []
    both = {one.language for one in good} & {one.language for one in bad}
    if not both and (not good or trl_arguments()[recipe.train.method]["compares"]):
        unpaired = recipe.data.format == "unpaired"
        what = "no language has both good and bad answers held out" if unpaired else "no pair was held out"
        raise DpoError(
            f"{what}, so there is nothing to evaluate on",
            where=recipe.where("data", "eval_fraction"),
            hint="raise data.eval_fraction, or add data",
        )
    return [], good, bad


def _made_from(recipe: Recipe, run: Run) -> str:
    """One sha256 over all that decides the answers: model, adapter, held-out pairs, sampling and seed."""
    inputs = {
        **{f"train: {key}": str(value) for key, value in run.record("train")["recipe"].items() if "model." in key},
        **run.input_hashes("eval", recipe),
        "pairs": run.record("prepare")["outputs"]["data/eval.jsonl"],
    }
    return fingerprint({"seed": recipe.seed, "against": recipe.eval.against, **_sampling(recipe)}, inputs)


def _work(run: Run) -> Path:
    """Where answers are kept while they are made; gone when `eval` is done."""
    return run.folder / ".eval"


def _sample(
    recipe: Recipe, run: Run, model: Any, tokenizer: Any, pairs: Sequence[Pair], made_from: str, quiet: bool
) -> list[Sample]:
    """The answers to the first `eval.prompts` held-out prompts; those of an earlier `eval` are taken as they are."""
    kept = _work(run) / f"samples-{made_from[:16]}.sqlite"
    if not kept.is_file():
        shutil.rmtree(_work(run), ignore_errors=True)  # answers of another adapter, or to other settings
    with Store(kept) as store:
        earlier, record = run["eval"] / "samples.jsonl", run.record("eval")
        written = record.get("outputs", {}).get("eval/samples.jsonl")  # what somebody has changed since is not reused
        if record.get("samples") == made_from and earlier.is_file() and sha256(earlier) == written:
            store.put({row["id"]: row for row in read_jsonl(earlier)})
        return sample_pairs(model, tokenizer, pairs, recipe.eval, recipe.seed, store, progress=not quiet)


def _judge(
    recipe: Recipe, run: Run, samples: Sequence[Sample], pairs: Sequence[Pair], quiet: bool
) -> tuple[list[Judgment], list[Judgment]]:
    """Judgments of tuned against base, and of the data's own chosen against rejected."""
    settings = recipe.eval.judge
    assert settings is not None
    matches = [judging.Match(one.id, one.prompt, one.tuned.text, one.base.text) for one in samples]
    for pair in first_of_each_prompt(pairs)[: settings.calibration]:
        answers = (answer[-1]["content"] for answer in (pair.chosen, pair.rejected))
        matches.append(judging.Match(f"calibration/{pair.id}", pair.prompt, *answers))
    judged = judging.judge(settings, matches, run.folder.parent / ".judgments.sqlite", progress=not quiet)
    return judged[: len(samples)], judged[len(samples) :]


def _metrics(
    recipe: Recipe,
    run: Run,
    scored: Scores,
    samples: Sequence[Sample],
    judgments: Sequence[Judgment],
    calibration: Sequence[Judgment],
) -> dict[str, Any]:
    """`eval/metrics.json`: every figure, and all that the report shows."""
    prepared, trained = read_json(run["prepare"] / "report.json"), run.record("train")
    device, beta = trained.get("device"), recipe.train.reward_scale
    margins = {one.id: beta * (one.chosen_drift - one.rejected_drift) for one in scored.pairs}
    scores = {one.id: one.score for one in judgments if one.score is not None}
    metrics = figures(recipe, prepared, scored, samples, judgments, calibration) | {
        "sets": set_metrics(recipe, run, scored.sets),
        "curves": summary.curves(list(read_jsonl(run["train"] / "log.jsonl"))),
        "examples": summary.examples(samples, scores, margins, recipe.seed),
        "data": {
            "pairs": prepared["pairs"],
            "came": sum(one["in"] for one in prepared["sources"].values()),
            "kept": sum(one["kept"] for one in prepared["sources"].values()),
            "warnings": prepared["warnings"],
            "report": report_sections(run["prepare"] / "report.md", ("Funnel", "Shortcuts")),
        },
        "about": {
            "model": without_paths(recipe.model.id),
            "method": recipe.train.method,
            "date": trained["started"][:10],
            "device": device,
            "seconds": read_json(run["train"] / "metrics.json")["seconds"],
        },
        "report_language": words.language(recipe.eval, [one.language for one in scored.pairs or scored.learned]),
        "environment": {**versions(), "device": device, "backend": trained.get("backend")},
        "recipe": recipe_yaml(recipe),
        "sampling": {"prompts": len(samples), **_sampling(recipe), "seed": recipe.seed} if samples else None,
    }
    metrics["warnings"] = [*warnings(metrics), *(f"data: {warning}" for warning in prepared["warnings"])]
    return {"name": recipe.name, "verdict": verdict(metrics), **metrics}


def figures(
    recipe: Recipe,
    prepared: Mapping[str, Any],
    scored: Scores,
    samples: Sequence[Sample],
    judgments: Sequence[Judgment],
    calibration: Sequence[Judgment],
) -> dict[str, Any]:
    """The figures of all and by language, under their names in `eval/metrics.json`; pure.

    Args:
        prepared: `data/report.json`.
        judgments: of tuned (first) against base, one a sample. calibration: of the data's chosen against rejected.
    """
    seed, judge = recipe.seed, recipe.eval.judge
    longer_by = {one.id: len(one.tuned.answer_ids) - len(one.base.answer_ids) for one in samples}
    scores = {one.id: one.score for one in judgments if one.score is not None}
    groups = grouped_metrics(scored.pairs, recipe.train.reward_scale, seed)
    found: dict[str, Any] = {
        **groups,
        "pairs": groups["pairs"] if scored.pairs else None,
        "answers": answer_metrics(scored.learned, scored.bad, seed),
        "samples": sample_metrics(samples, seed) if samples else None,
        "judge": winrate.judge_metrics(judge, judgments, calibration, longer_by, seed) if judge else None,
        "baselines": baselines(scored.pairs, prepared),
    }
    for language in sorted({*groups["languages"], *(one.language for one in scored.learned)}):
        good, bad = ([one for one in of if one.language == language] for of in (scored.learned, scored.bad))
        some = [one for one in samples if one.language == language]
        rates = {one.id: scores[one.id] for one in some if one.id in scores}
        found["languages"].setdefault(language, {"pairs": None}).update(
            answers=answer_metrics(good, bad, seed),
            samples=sample_metrics(some, seed) if some else None,
            judge=winrate.rates(rates, longer_by, seed) if judge else None,
        )
    return found


def _sampling(recipe: Recipe) -> dict[str, Any]:
    """What of `eval` changes the answers; how many prompts there are, the batch and the judge do not."""
    settings = recipe.eval.model_dump(mode="json")
    return {name: settings[name] for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
