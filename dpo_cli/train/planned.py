"""What `train --plan` prints: the memory and the time that a run would take on this machine."""

from __future__ import annotations

from typing import Any

import torch

from dpo_cli.backends import Backend, choose_backend
from dpo_cli.chat import load_tokenizer
from dpo_cli.errors import DpoError
from dpo_cli.hub import weights_are_here
from dpo_cli.inference import encode
from dpo_cli.models import load_config
from dpo_cli.recipe import Recipe
from dpo_cli.records import Pair
from dpo_cli.run import Run
from dpo_cli.show import say, table
from dpo_cli.terminal import print_markdown
from dpo_cli.train.memory import GIB, gib
from dpo_cli.train.methods import METHODS, cannot_be_cut
from dpo_cli.train.plan import Lengths, Plan, available_memory, plan
from dpo_cli.train.rehearsal import refuse_cpu
from dpo_cli.train.rows import train_rows
from dpo_cli.train.timing import time_needed

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
    on_gpu, backend = torch.cuda.is_available(), choose_backend(recipe)
    method, engine = METHODS[recipe.train.method], recipe.engine
    tokenizer, config = load_tokenizer(recipe), load_config(recipe)
    rows = [_lengths(tokenizer, row, recipe.model.max_length) for row in train_rows(recipe, run.train_pairs)]
    found = plan(
        recipe,
        rows,
        config,
        available_memory(recipe),
        device="cuda" if on_gpu else "cpu",
        unsloth=backend.name == "unsloth",
        card=torch.cuda.get_device_name() if on_gpu else "this machine",
        shared=engine.shared_prefix != "off" and "shared_prefix" in method.engine,
        budgeted=engine.token_budget != "off"
        and "token_budget" in method.engine
        and cannot_be_cut(recipe.train.losses) is None,
    )
    epochs = "one epoch" if recipe.train.num_train_epochs == 1 else f"{recipe.train.num_train_epochs:g} epochs"
    length = f"{recipe.train.max_steps} steps" if recipe.train.max_steps > 0 else epochs
    say(f"plan: {len(rows)} {found.rows_are}, {length}, {found.card}\n  backend {backend.name}: {backend.why}")
    print_markdown("\n\n".join([memory_table(found), *sentences(found), _time(recipe, run, backend, config, found)]))
    return found.fits


def memory_table(found: Plan) -> str:
    """The predicted peak by its parts, and how a step is cut; of the recipe, and of what is proposed instead."""
    columns = {"recipe": found.recipe}
    if found.proposal and found.proposal != found.recipe:
        columns["proposed"] = found.proposal
    places = 2 if found.recipe.memory.total >= GIB else 3
    there_is = "not known" if found.available is None else gib(found.available)
    by = "at once" if found.recipe.token_budget else f"{found.rows_are} at once x accumulation"
    rows = [
        *(
            [label, *(f"{getattr(one.memory, name) / GIB:.{places}f}" for one in columns.values())]
            for name, label in PARTS.items()
        ),
        [f"there is ({found.card})", *(there_is for _ in columns)],
        [by, *(one.at_once for one in columns.values())],
        ["gradient checkpointing", *("on" if one.checkpointing else "off" for one in columns.values())],
    ]
    return table(["predicted peak memory, GiB", *columns], rows)


def sentences(found: Plan) -> list[str]:
    """What the table comes to."""
    made = [f"The longest row has {found.longest} tokens. {found.verdict}", *found.notes]
    host = max(one.host for one in (found.recipe, found.proposal or found.recipe))
    if host:
        made.append(f"Unsloth's checkpointing keeps {gib(host)} GiB more in the machine's own memory.")
    return made


# ------------------------------------------------------------------------------------------------------------ pieces


def _time(recipe: Recipe, run: Run, backend: Backend, config: Any, found: Plan) -> str:
    """How long it would take, or why that is not known."""
    if not found.fits:
        return "Time: not measured, for it does not fit."
    try:
        refuse_cpu(recipe, config)
    except DpoError as error:
        return f"Time: not measured: {error.message}."
    if not weights_are_here(recipe.model.id, recipe.model.revision):
        return f"Time: not measured: the weights of {recipe.model.id} are not here yet, and --plan downloads none."
    return time_needed(recipe, run, backend)


def _lengths(tokenizer: Any, row: dict[str, Any], max_length: int) -> Lengths:
    """Tokens of a row's prompt and of each of its answers."""
    answers = [row[side] for side in ("chosen", "rejected", "completion") if side in row] + row.get("answers", [])
    common = {name: row[name] for name in ("id", "prompt", "chat_template_kwargs")} | {"language": "", "source": ""}
    sides = zip(answers[::2], [*answers[1::2], answers[-1]], strict=False)  # two at a time, the last one twice
    pairs = [Pair(chosen=one, rejected=other, **common) for one, other in sides]
    encoded = [one for pair in pairs for one in encode(tokenizer, pair, max_length)][: len(answers)]
    return encoded[0].start, *(len(one.ids) - one.start for one in encoded)
