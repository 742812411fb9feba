"""TRL's config for a recipe: every argument passed, because Unsloth changes the defaults of those that are not.

And what only TRL, transformers and this machine know of the settings, asked before hours of `prepare`: whether the card
has TF32, whether a DeepSpeed file can be read, whether an optimizer takes its arguments.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.optimization import get_scheduler

from dpo_cli import models
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.gpu import best_dtype
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run
from dpo_cli.train.methods import METHODS

# TRL tokenises 436 rows a second on one core (its 1.16, measured); another process takes about a second to start.
ROWS_A_TOKENISER, MOST_TOKENISERS = 1000, 8
LARGEST_ON_CPU = 3e8  # weights; a step of Qwen3-0.6B takes minutes there
PAIR_TOKENS = 600  # prompt and both answers of UltraFeedback and HelpSteer2, on average


def trl_config(recipe: Recipe, run: Run, config_class: Any, rows: int) -> Any:
    """Build the config of the method's TRL trainer, for so many training rows."""
    train, on_gpu, dtype = recipe.train, torch.cuda.is_available(), models.resolve_dtype(recipe)
    _check_precision(recipe, dtype)
    tokenisers = min(os.cpu_count() or 1, MOST_TOKENISERS, rows // ROWS_A_TOKENISER)
    mixed = on_gpu and train.bf16 is None and not train.fp16
    padded = getattr(train, "pad_to_multiple_of", None)
    arguments = train.model_dump(exclude={"method"}) | {
        "output_dir": str(run.checkpoints),
        "save_total_limit": None,  # `Fixes` keeps to it, by step
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "max_length": recipe.model.max_length,
        "use_cpu": not on_gpu,
        "bf16": dtype == torch.bfloat16 if mixed else bool(train.bf16),
        "fp16": dtype == torch.float16 if mixed else train.fp16,
        "dataset_num_proc": train.dataset_num_proc or (tokenisers if tokenisers > 1 else None),
        # TRL 1.16's "auto" is None but on Neuron; 1.15, which Unsloth takes, does not know the word.
        "pad_to_multiple_of": None if padded == "auto" else padded,
        "gradient_checkpointing": bool(train.gradient_checkpointing),  # left open, `engine.choose` decides
        "disable_tqdm": True,
        # Else early stopping forgets, at a resume, how long nothing got better.
        "restore_callback_states_from_checkpoint": True,
        "run_name": train.run_name or recipe.name,
        # A LoRA that is trained is used, all of it; looking for what is not costs a walk over the graph at each step.
        "ddp_find_unused_parameters": bool(train.ddp_find_unused_parameters),
        # Two CPUs pin no memory, and asking for it prints a warning.
        "dataloader_pin_memory": train.dataloader_pin_memory and on_gpu,
    }
    if stopping := recipe.engine.early_stopping:
        arguments |= {
            "metric_for_best_model": stopping.metric,
            "greater_is_better": not stopping.metric.endswith("loss"),
            "load_best_model_at_end": True,
            # The best adapter is one of those that were saved, so each one that is evaluated is saved.
            "save_strategy": train.eval_strategy,
            "save_steps": train.eval_steps or train.logging_steps,
        }
    known = {field.name for field in fields(config_class)}
    foreign = [name for name in train.model_fields_set if name not in known and name != "method"]
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


def rehearse(recipe: Recipe, run: Run) -> None:
    """Read the model's config; build TRL's config, the trackers, the optimizer's class and the schedule of a recipe.

    Raises:
        DpoError: (exit code 2) one of them refuses its arguments, or can't be had on this machine, or the model can't
            do what the recipe asks of it.
    """
    try:
        config = models.load_config(recipe)
    except (OSError, ValueError):  # its loading says what is wrong
        config = None
    if config is not None:
        refuse_cpu(recipe, config)
    models.check_config(recipe, {} if config is None else config.to_dict())
    config_class, _ = METHODS[recipe.train.method].classes()
    try:
        args = trl_config(recipe, run, config_class, 0)
        optimizer: Any = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()  # raises where its package is not installed
        if not recipe.train.optim.startswith(("galore_", "apollo_", "lomo", "adalomo")):  # these want the model
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
            optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
        schedule = args.lr_scheduler_kwargs or {}
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(100), 100, schedule)
    except DpoError:
        raise
    except Exception as error:  # whatever a library raises of a setting: it is the setting that is wrong
        problem = " ".join(str(error).split())
        key = next((name for name in recipe.train.model_fields_set if re.search(rf"\b{name}\b", problem)), None)
        raise DpoError(
            f"the train section can't be used here: {problem[:300] or type(error).__name__}",
            where=recipe.where("train", *([key] if key else [])),
            hint="change or remove that setting",
            exit_code=USAGE,
        ) from error


def refuse_cpu(recipe: Recipe, config: Any) -> None:
    """Raise where a model too large for a CPU would be trained on one, unless `engine.allow_cpu` says so.

    The time is that of 8 operations a weight and token (Kaplan et al. 2020: 2 for a forward, 2 for the backward to the
    activations; of policy and reference, and the layers computed twice), at the speed of matrix products here.
    """
    if torch.cuda.is_available() or recipe.engine.allow_cpu or recipe.model.id.startswith("builtin:"):
        return
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, ImportError):
        return  # loading it says why
    parameters = sum(one.numel() for one in model.parameters())
    if parameters <= LARGEST_ON_CPU:
        return
    pairs, one, start = recipe.data.total or 1000, torch.ones(1024, 1024), time.perf_counter()
    for _ in range(10):
        one @ one
    hours = 8 * parameters * pairs * PAIR_TOKENS * (time.perf_counter() - start) / (10 * 2 * 1024**3) / 3600
    long = f"{hours / 24:.0f} days" if hours > 72 else f"{hours:.0f} hours" if hours > 1 else "an hour"
    raise DpoError(
        f"torch sees no GPU, and {recipe.model.id} has {parameters / 1e9:.1f}B weights: on this CPU {pairs:,} pairs "
        f"would take about {long}",
        where=recipe.where("model", "id"),
        hint="`dpo-cli doctor` says what is missing for a GPU; to train on the CPU all the same add "
        "--set engine.allow_cpu=true",
    )


def _check_precision(recipe: Recipe, dtype: torch.dtype) -> None:
    """Refuse a precision that this machine, or the model's own dtype, can't be trained in."""
    train, on_gpu = recipe.train, torch.cuda.is_available()
    asked = torch.float16 if train.fp16 else torch.bfloat16 if train.bf16 else dtype
    name = "fp16" if train.fp16 else "bf16"
    if not on_gpu and torch.float16 in (asked, dtype):
        of_train, problem, hint = train.fp16, "float16 training needs a GPU", "remove it; a CPU takes float32"
    elif on_gpu and best_dtype() == torch.float16 and (train.bf16 or dtype == torch.bfloat16):
        of_train, problem = train.bf16, "this GPU does not compute in bfloat16"
        hint = "remove it: float16 is taken on this card"
    elif on_gpu and asked != dtype != torch.float32:
        of_train, hint = True, "remove one of them"
        problem = f"train.{name} does not go with model.dtype: {str(dtype).removeprefix('torch.')}"
    else:
        return
    raise DpoError(problem, where=recipe.where(*(("train", name) if of_train else ("model", "dtype"))), hint=hint)
