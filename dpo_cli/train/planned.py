"""What `train --plan` prints: the memory and the time that a run would take on this machine."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dpo_cli import backends
from dpo_cli.chat import chat_tokens, load_tokenizer
from dpo_cli.errors import DpoError
from dpo_cli.hub import weights_are_here
from dpo_cli.models import load_config
from dpo_cli.progress import Step
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run
from dpo_cli.show import say, table
from dpo_cli.terminal import print_markdown
from dpo_cli.train.config import refuse_cpu
from dpo_cli.train.engine import choose, rows_of_a_pass, sees_pairs_again
from dpo_cli.train.memory import GIB, gib
from dpo_cli.train.methods import METHODS, cannot_be_cut
from dpo_cli.train.plan import Lengths, Plan, available_memory, plan
from dpo_cli.train.preflight import seconds_of
from dpo_cli.train.reference_cache import LOGPS, unsupported
from dpo_cli.train.rows import row_lengths, train_rows
from dpo_cli.train.trainer import build, total_steps

PARTS = {
    "weights": "weights",
    "adapter": "adapter (LoRA)",
    "gradients": "its gradients",
    "optimizer": "its optimizer state",
    "activations": "activations, kept for the backward",
    "workspace": "workspace of one layer",
    "head": "logits, a tile at a time",
    "context": "context: driver and libraries",
    "margin": "margin for fragments",
    "total": "total",
}


def print_plan(recipe: Recipe, run: Run) -> bool:
    """Print what a run would take on this machine; returns whether its memory fits.

    The memory is predicted from the model's config. The time is that of passes over some of the pairs, where the model
    can be loaded here.
    """
    on_gpu, backend = torch.cuda.is_available(), backends.choose_backend(recipe)
    method, engine = METHODS[recipe.train.method], recipe.engine
    tokenizer, config = load_tokenizer(recipe), load_config(recipe)
    rows = [_lengths(tokenizer, row) for row in train_rows(recipe, run.train_pairs)]
    found = plan(
        recipe,
        rows,
        config,
        available_memory(recipe),
        device="cuda" if on_gpu else "cpu",
        unsloth=backend.name == "unsloth",
        shared=engine.shared_prefix != "off" and "shared_prefix" in method.engine,
        budgeted=engine.token_budget != "off"
        and "token_budget" in method.engine
        and cannot_be_cut(recipe.train.losses) is None,
    )
    epochs = "one epoch" if recipe.train.num_train_epochs == 1 else f"{recipe.train.num_train_epochs:g} epochs"
    length = f"{recipe.train.max_steps} steps" if recipe.train.max_steps > 0 else epochs
    card = torch.cuda.get_device_name() if on_gpu else "this machine"
    say(f"plan: {len(rows)} {method.rows_are}, {length}, {card}\n  backend {backend.name}: {backend.why}")
    verdict = f"The longest row has {found.longest} tokens. {found.verdict}"
    parts = (memory_table(found, card, method.rows_are), verdict, _time(recipe, run, backend, found))
    print_markdown("\n\n".join(parts))
    return found.fits


def memory_table(found: Plan, card: str, unit: str) -> str:
    """The predicted peak by its parts, and how a step is cut."""
    places = 2 if found.memory.total >= GIB else 3
    rows = [
        *([label, f"{getattr(found.memory, name) / GIB:.{places}f}"] for name, label in PARTS.items()),
        [f"there is ({card})", gib(found.available)],
        ["at once", found.cut.at_once(unit)],
        ["gradient checkpointing", "on" if found.cut.checkpointing else "off"],
    ]
    return table(["predicted peak memory, GiB", "recipe"], rows)


# ------------------------------------------------------------------------------------------------------------ pieces


def _time(recipe: Recipe, run: Run, backend: backends.Backend, found: Plan) -> str:
    """How long it would take, or why that is not known."""
    if not found.fits:
        return "Time: not measured, for it does not fit."
    try:
        refuse_cpu(recipe, load_config(recipe))
    except DpoError as error:
        return f"Time: not measured: {error.message}."
    if not weights_are_here(recipe.model.id, recipe.model.revision):
        return f"Time: not measured: the weights of {recipe.model.id} are not here yet, and --plan downloads none."
    return _measured_time(recipe, run, backend)


def _measured_time(recipe: Recipe, run: Run, backend: backends.Backend) -> str:
    """Load the model, cut the step as `train` would, and time passes over rows drawn by the recipe's seed.

    The other rows are taken to cost as much a token.
    """
    with TemporaryDirectory() as folder:  # for a plan writes nothing into the run
        trainer = build(recipe, run, backend, Path(folder))
    unit = choose(recipe, trainer, None, lambda line: None).unit
    data = trainer.train_dataset
    rows = rows_of_a_pass(trainer, random.Random(recipe.seed).sample(range(len(data)), len(data)))
    with Step(f"timing {len(rows)} {unit}"):
        a_pass = known = _seconds(trainer, rows)
        if _caches_reference(recipe, trainer):
            trainer.precompute_ref_logps = True  # so that none is computed in these passes
            known = _seconds(trainer, [row | dict.fromkeys(LOGPS, 0.0) for row in rows])
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


def _seconds(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """Of the faster of two passes: the first may compile."""
    return min(seconds_of(trainer, rows) for _ in range(2))


def _duration(seconds: float) -> str:
    """Write a duration for a person: `40 seconds`, `12 minutes`, `3.5 hours`, `2.1 days`."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{max(round(seconds), 1)} seconds" if round(seconds) > 1 else "a second"


def _lengths(tokenizer: Any, row: dict[str, Any]) -> Lengths:
    """Tokens of a row's prompt and of each of its answers."""
    answers = [row[side] for side in ("chosen", "rejected", "completion") if side in row] + row.get("answers", [])
    kwargs = row["chat_template_kwargs"]
    prompt = len(chat_tokens(tokenizer, row["prompt"], add_generation_prompt=True, **kwargs))
    return prompt, *(len(chat_tokens(tokenizer, row["prompt"] + answer, **kwargs)) - prompt for answer in answers)
