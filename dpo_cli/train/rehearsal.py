"""Everything that settings can be tried on without data or weights, before the work on either begins.

`check` knows most of it from the recipe. The rest only TRL, transformers and this machine know: whether the card has
TF32, whether a DeepSpeed file can be read, whether an optimizer takes its arguments. They are asked here, so that it
is said before hours of `prepare`, not after.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoConfig, Trainer
from transformers.optimization import get_scheduler

from dpo_cli import model_files
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.model_rules import against_model
from dpo_cli.recipe.optimizer_rules import LOW_RANK
from dpo_cli.run import Run
from dpo_cli.train.methods import METHODS
from dpo_cli.train.trainer import trl_config


def rehearse(recipe: Recipe, run: Run) -> None:
    """Read the model's config; build TRL's config, the optimizer's class and the schedule of a recipe.

    Raises:
        DpoError: (exit code 2) one of them refuses its arguments, or can't be had on this machine, or the model can't
            do what the recipe asks of it.
    """

    try:
        model = AutoConfig.from_pretrained(
            model_files.location(recipe.model.id), revision=recipe.model.revision, trust_remote_code=False
        ).to_dict()
    except (OSError, ValueError):  # its loading says what is wrong
        model = {}
    for at, sentence in against_model(recipe, model):
        problem, _, fix = sentence.partition(": ")
        raise DpoError(f"{'.'.join(map(str, at))} {problem}", where=recipe.where(*at), hint=fix)
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
        said = " ".join(str(error).split())
        key = next((name for name in recipe.train.model_fields_set if re.search(rf"\b{name}\b", said)), None)
        raise DpoError(
            f"the train section can't be used here: {said[:300] or type(error).__name__}",
            where=recipe.where("train", *([key] if key else [])),
            hint="change or remove that setting",
            exit_code=USAGE,
        ) from error
