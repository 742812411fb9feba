"""What only TRL, transformers and this machine know of the settings, asked before hours of `prepare`.

Such as whether the card has TF32, whether a DeepSpeed file can be read, whether an optimizer takes its arguments.
"""

from __future__ import annotations

import re
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer
from transformers.optimization import get_scheduler

from dpo_cli.errors import USAGE, DpoError
from dpo_cli.models import check_config, load_config
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.optimizer_rules import LOW_RANK
from dpo_cli.run import Run
from dpo_cli.train.config import trl_config
from dpo_cli.train.methods import METHODS

LARGEST_ON_CPU = 3e8  # weights; a step of Qwen3-0.6B takes minutes there
PAIR_TOKENS = 600  # prompt and both answers of UltraFeedback and HelpSteer2, on average


def rehearse(recipe: Recipe, run: Run) -> None:
    """Read the model's config; build TRL's config, the optimizer's class and the schedule of a recipe.

    Raises:
        DpoError: (exit code 2) one of them refuses its arguments, or can't be had on this machine, or the model can't
            do what the recipe asks of it.
    """
    try:
        config = load_config(recipe)
    except (OSError, ValueError):  # its loading says what is wrong
        config = None
    if config is not None:
        refuse_cpu(recipe, config)
    check_config(recipe, {} if config is None else config.to_dict())
    config_class, _ = METHODS[recipe.train.method].classes()
    try:
        args = trl_config(recipe, run, config_class, 0)
        optimizer: Any = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        if not recipe.train.optim.startswith((*LOW_RANK, "lomo", "adalomo")):  # these want the model
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
    activations; of policy and reference, and the layers computed twice), at the speed of one matrix product here.
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
    pairs = recipe.data.total or 1000
    hours = pairs * PAIR_TOKENS * 8 * parameters / _operations_a_second() / 3600
    long = f"{hours / 24:.0f} days" if hours > 72 else f"{hours:.0f} hours" if hours > 1 else "an hour"
    raise DpoError(
        f"torch sees no GPU, and {recipe.model.id} has {parameters / 1e9:.1f}B weights: on this CPU {pairs:,} pairs "
        f"would take about {long}",
        where=recipe.where("model", "id"),
        hint="`dpo-cli doctor` says what is missing for a GPU; to train on the CPU all the same add "
        "--set engine.allow_cpu=true",
    )


def _operations_a_second() -> float:
    """Of a matrix product, measured for a tenth of a second."""
    one = torch.ones(512, 512)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        one @ one
        done += 1
    return done * 2 * 512**3 / (time.perf_counter() - start)
