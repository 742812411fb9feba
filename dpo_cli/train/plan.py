"""`train --plan`: the memory that a run would take at its longest rows, without loading the model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from dpo_cli import backends, chat, model_files
from dpo_cli.inference import encode
from dpo_cli.recipe import Recipe
from dpo_cli.records import Pair
from dpo_cli.run import Run
from dpo_cli.show import say, terminal
from dpo_cli.train.engine import available_memory
from dpo_cli.train.memory import Lengths
from dpo_cli.train.memory import plan as predict
from dpo_cli.train.methods import METHODS, cannot_be_cut
from dpo_cli.train.rows import train_rows


def print_plan(recipe: Recipe, run: Run) -> bool:
    """Print what a run would take; returns whether that fits."""
    gpu, backend = torch.cuda.is_available(), backends.choose_backend(recipe)
    card = torch.cuda.get_device_name() if gpu else "this machine"
    method, engine = METHODS[recipe.train.method], recipe.engine
    tokenizer = chat.load_tokenizer(recipe)
    rows = [_lengths(tokenizer, row, recipe.model.max_length) for row in train_rows(recipe, run.train_pairs)]
    found = predict(
        recipe,
        rows,
        AutoConfig.from_pretrained(
            model_files.location(recipe.model.id), revision=recipe.model.revision, trust_remote_code=False
        ),
        available_memory(recipe),
        device="cuda" if gpu else "cpu",
        unsloth=backend.name == "unsloth",
        card=card,
        shared=engine.shared_prefix != "off" and "shared_prefix" in method.engine,
        budgeted=engine.token_budget != "off"
        and "token_budget" in method.engine
        and cannot_be_cut(recipe.train.losses) is None,
    )
    epochs = "one epoch" if recipe.train.num_train_epochs == 1 else f"{recipe.train.num_train_epochs:g} epochs"
    say(f"train: {len(rows)} {found.rows_are}, {epochs}, {card}")
    say(f"  backend {backend.name}: {backend.why}")
    terminal(width=80).print(found.table())
    return found.fits


def _lengths(tokenizer: Any, row: dict[str, Any], max_length: int) -> Lengths:
    """Tokens of a row's prompt and of each of its answers."""
    answers = [row[side] for side in ("chosen", "rejected", "completion") if side in row] + row.get("answers", [])
    common = {name: row[name] for name in ("id", "prompt", "chat_template_kwargs")} | {"language": "", "source": ""}
    sides = zip(answers[::2], [*answers[1::2], answers[-1]], strict=False)  # two at a time, the last one twice
    pairs = [Pair(chosen=one, rejected=other, **common) for one, other in sides]
    encoded = [one for pair in pairs for one in encode(tokenizer, pair, max_length)][: len(answers)]
    return (encoded[0].start, *(len(one.ids) - one.start for one in encoded))
