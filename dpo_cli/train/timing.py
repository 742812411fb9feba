"""How long a training would take, by some of its rows: the others are taken to cost as much a token."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dpo_cli import backends
from dpo_cli.progress import Step
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run
from dpo_cli.train.engine import choose, sees_pairs_again
from dpo_cli.train.methods import METHODS
from dpo_cli.train.preflight import row_lengths, seconds_of
from dpo_cli.train.reference_cache import LOGPS, unsupported
from dpo_cli.train.trainer import build, total_steps

LONG_ENOUGH = 3.0  # seconds of passes, after which no other is timed
MOST_PASSES = 5


@dataclass(frozen=True)
class Timed:
    """Seconds of a training's steps: its forwards and backwards, and its reference."""

    seconds: float
    steps: int
    rows: int  # that were timed
    rows_are: str
    evaluates: bool

    @property
    def sentence(self) -> str:
        """Say it in words a person plans with."""
        beside = ", without its evaluations" if self.evaluates else ""
        long, step = _duration(self.seconds), f"{self.seconds / self.steps:.2g} s"
        by = f"measured here on {self.rows} {self.rows_are}"
        return f"Time: about {long} for {self.steps} steps of {step}{beside}; {by}."


def timed(recipe: Recipe, run: Run, backend: backends.Backend) -> Timed:
    """Load the model, cut the step as `train` would, and time passes over rows drawn by the recipe's seed.

    Raises:
        DpoError: the model can't be loaded, or does not fit after all.
    """
    with TemporaryDirectory() as folder:  # for a plan writes nothing into the run
        trainer = build(recipe, run, backend, Path(folder))
    chosen = choose(recipe, trainer, None, lambda line: None)
    data = trainer.train_dataset
    rows = _one_pass(trainer, recipe.seed)
    with Step(f"timing {len(rows)} {chosen.unit}"):
        a_pass = known = _fastest(trainer, rows)
        if _caches_reference(recipe, trainer):
            trainer.precompute_ref_logps = True  # so that none is computed in these passes
            known = _fastest(trainer, [row | dict.fromkeys(LOGPS, 0.0) for row in rows])
    steps, step_rows = total_steps(trainer), trainer.get_total_train_batch_size(trainer.args)
    tokens = sum(sum(row_lengths(row)) for row in rows)
    all_tokens = sum(sum(row_lengths(row)) for row in data)
    epochs = steps * step_rows / len(data)
    seconds = all_tokens / tokens * (epochs * known + (a_pass - known))
    return Timed(seconds, steps, len(rows), chosen.unit, recipe.train.eval_strategy != "no")


def _caches_reference(recipe: Recipe, trainer: Any) -> bool:
    """Whether the reference of each row is computed once for all epochs."""
    asked = recipe.engine.reference_cache != "off" and "reference_cache" in METHODS[recipe.train.method].engine
    return asked and sees_pairs_again(trainer) and unsupported(recipe, trainer) is None


def _one_pass(trainer: Any, seed: int) -> list[dict[str, Any]]:
    """Rows that are computed at once: as many as the token budget takes, or as a micro-batch has."""
    data, most = trainer.train_dataset, trainer.args.per_device_train_batch_size
    order = random.Random(seed).sample(range(len(data)), min(most, len(data)))
    rows, tokens = list[dict[str, Any]](), 0
    for index in order:
        tokens += sum(row_lengths(data[index]))
        if rows and trainer.token_budget and tokens > trainer.token_budget:
            break
        rows.append(data[index])
    return rows


def _fastest(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """Seconds of the fastest of a few passes: the first ones may compile."""
    seconds: list[float] = []
    least = 2 if torch.cuda.is_available() else 1
    while len(seconds) < least or (sum(seconds) < LONG_ENOUGH and len(seconds) < MOST_PASSES):
        seconds.append(seconds_of(trainer, rows))
    return min(seconds)


def _duration(seconds: float) -> str:
    """Write a duration for a person: `40 seconds`, `12 minutes`, `3.5 hours`, `2.1 days`."""
    for unit, size, least in (("days", 86400, 2), ("hours", 3600, 2), ("minutes", 60, 2)):
        if seconds >= least * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{max(round(seconds), 1)} seconds" if round(seconds) > 1 else "a second"
