"""TRL's config for a recipe: every argument passed, because Unsloth changes the defaults of those that are not."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import torch

from dpo_cli import models
from dpo_cli.errors import DpoError
from dpo_cli.gpu import best_dtype
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run

# TRL tokenises 436 rows a second on one core (its 1.16, measured); another process takes about a second to start.
ROWS_A_TOKENISER, MOST_TOKENISERS = 1000, 8


def trl_config(recipe: Recipe, run: Run, config_class: Any, rows: int) -> Any:
    """TRL's config with every argument passed, because Unsloth changes the defaults of those that are not."""
    tokenisers = min(os.cpu_count() or 1, MOST_TOKENISERS, rows // ROWS_A_TOKENISER)
    on_gpu, dtype = torch.cuda.is_available(), models.resolve_dtype(recipe)
    _check_precision(recipe, dtype)
    mixed = on_gpu and recipe.train.bf16 is None and not recipe.train.fp16
    padded = getattr(recipe.train, "pad_to_multiple_of", None)
    arguments = recipe.train.model_dump(exclude={"method"}) | {
        "output_dir": str(run.checkpoints),
        "save_total_limit": None,  # `Fixes` keeps to it, by step
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "max_length": recipe.model.max_length,
        "use_cpu": not on_gpu,
        "bf16": dtype == torch.bfloat16 if mixed else bool(recipe.train.bf16),
        "fp16": dtype == torch.float16 if mixed else recipe.train.fp16,
        "dataset_num_proc": recipe.train.dataset_num_proc or (tokenisers if tokenisers > 1 else None),
        # TRL 1.16's "auto" is None but on Neuron; 1.15, which Unsloth takes, does not know the word.
        "pad_to_multiple_of": None if padded == "auto" else padded,
        # Where the recipe leaves it open, `engine.choose` decides.
        "gradient_checkpointing": bool(recipe.train.gradient_checkpointing),
        "disable_tqdm": True,
        # Else early stopping forgets, at a resume, how long nothing got better.
        "restore_callback_states_from_checkpoint": True,
        "run_name": recipe.train.run_name or recipe.name,
        # A LoRA that is trained is used, all of it; looking for what is not costs a walk over the graph at each step.
        "ddp_find_unused_parameters": bool(recipe.train.ddp_find_unused_parameters),
        # Two CPUs pin no memory, and asking for it prints a warning.
        "dataloader_pin_memory": recipe.train.dataloader_pin_memory and on_gpu,
    }
    arguments |= _of_early_stopping(recipe)
    known = {field.name for field in fields(config_class)}
    foreign = [name for name in recipe.train.model_fields_set if name not in known and name != "method"]
    if foreign:
        raise DpoError(
            f"the installed TRL has no argument {foreign[0]}",
            where=recipe.where("train", foreign[0]),
            hint="remove it, or install the TRL that `dpo-cli doctor` names",
        )
    config = config_class(**{name: value for name, value in arguments.items() if name in known})
    # One process with several cards would take DataParallel, which TRL refuses, and more pairs a step.
    config._n_gpu = min(config.n_gpu, 1)
    return config


def _check_precision(recipe: Recipe, dtype: torch.dtype) -> None:
    """Refuse a precision that this machine, or the model's own dtype, can't be trained in."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu and (recipe.train.fp16 or dtype == torch.float16):
        key = ("train", "fp16") if recipe.train.fp16 else ("model", "dtype")
        raise DpoError("float16 training needs a GPU", where=recipe.where(*key), hint="remove it; a CPU takes float32")
    if on_gpu and best_dtype() == torch.float16 and (recipe.train.bf16 or dtype == torch.bfloat16):
        key = ("train", "bf16") if recipe.train.bf16 else ("model", "dtype")
        hint = "remove it: float16 is taken on this card"
        raise DpoError("this GPU does not compute in bfloat16", where=recipe.where(*key), hint=hint)
    asked = torch.float16 if recipe.train.fp16 else torch.bfloat16 if recipe.train.bf16 else dtype
    if on_gpu and asked != dtype != torch.float32:
        key = ("train", "fp16") if recipe.train.fp16 else ("train", "bf16")
        name = str(dtype).removeprefix("torch.")
        raise DpoError(
            f"train.{key[1]} does not go with model.dtype: {name}", where=recipe.where(*key), hint="remove one of them"
        )


def _of_early_stopping(recipe: Recipe) -> dict[str, Any]:
    """What `engine.early_stopping` means in TRL's arguments."""
    if not recipe.engine.early_stopping:
        return {}
    metric = recipe.engine.early_stopping.metric
    return {
        "metric_for_best_model": metric,
        "greater_is_better": not metric.endswith("loss"),
        "load_best_model_at_end": True,
        # The best adapter is one of those that were saved, so each one that is evaluated is saved.
        "save_strategy": recipe.train.eval_strategy,
        "save_steps": recipe.train.eval_steps or recipe.train.logging_steps,
    }
