"""How long a training would take, by some of its rows: the others are taken to cost as much a token."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dpo_cli import backends
from dpo_cli.progress import Step
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run
from dpo_cli.train.engine import choose, rows_of_a_pass, sees_pairs_again
from dpo_cli.train.methods import METHODS
from dpo_cli.train.preflight import row_lengths, seconds_of
from dpo_cli.train.reference_cache import LOGPS, unsupported
from dpo_cli.train.trainer import build, total_steps

LONG_ENOUGH = 3.0  # seconds of passes, after which no other is timed
MOST_PASSES = 5


def time_needed(recipe: Recipe, run: Run, backend: backends.Backend) -> str:
    """Load the model, cut the step as `train` would, time passes over rows drawn by the recipe's seed, and say it.

    Raises:
        DpoError: the model can't be loaded, or does not fit after all.
    """
    with TemporaryDirectory() as folder:  # for a plan writes nothing into the run
        trainer = build(recipe, run, backend, Path(folder))
    unit = choose(recipe, trainer, None, lambda line: None).unit
    data = trainer.train_dataset
    rows = rows_of_a_pass(trainer, random.Random(recipe.seed).sample(range(len(data)), len(data)))
    with Step(f"timing {len(rows)} {unit}"):
        a_pass = known = _fastest(trainer, rows)
        if _caches_reference(recipe, trainer):
            trainer.precompute_ref_logps = True  # so that none is computed in these passes
            known = _fastest(trainer, [row | dict.fromkeys(LOGPS, 0.0) for row in rows])
    steps, tokens = total_steps(trainer), sum(sum(row_lengths(row)) for row in rows)
    all_tokens = sum(sum(row_lengths(row)) for row in data)
    epochs = steps * trainer.get_total_train_batch_size(trainer.args) / len(data)
    seconds = all_tokens / tokens * (epochs * known + (a_pass - known))
    beside = ", without its evaluations" if recipe.train.eval_strategy != "no" else ""
    return (
        f"Time: about {_duration(seconds)} for {steps} steps of {seconds / steps:.2g} s{beside}; "
        f"measured here on {len(rows)} {unit}."
    )


def _caches_reference(recipe: Recipe, trainer: Any) -> bool:
    """Whether the reference of each row is computed once for all epochs."""
    asked = recipe.engine.reference_cache != "off" and "reference_cache" in METHODS[recipe.train.method].engine
    return asked and sees_pairs_again(trainer) and unsupported(recipe, trainer) is None


def _fastest(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """Seconds of the fastest of a few passes: the first ones may compile."""
    seconds: list[float] = []
    least = 2 if torch.cuda.is_available() else 1
    while len(seconds) < least or (sum(seconds) < LONG_ENOUGH and len(seconds) < MOST_PASSES):
        seconds.append(seconds_of(trainer, rows))
    return min(seconds)


def _duration(seconds: float) -> str:
    """Write a duration for a person: `40 seconds`, `12 minutes`, `3.5 hours`, `2.1 days`."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{max(round(seconds), 1)} seconds" if round(seconds) > 1 else "a second"
