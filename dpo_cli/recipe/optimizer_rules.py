"""What the names of optimizers, schedules and loggers ask for: packages, arguments, other settings."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from dpo_cli.errors import did_you_mean
from dpo_cli.recipe.train import trl_arguments

Recipe = Any  # dpo_cli.recipe's, which imports this module

BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that follow a held-out figure


def schedule(recipe: Recipe, value: Any) -> str | None:
    """A schedule without what it needs."""
    kwargs = recipe.train.lr_scheduler_kwargs
    given = kwargs if isinstance(kwargs, dict) else {}
    if value in BY_METRIC and recipe.train.eval_strategy == "no":
        return f"{value} follows the held-out loss: set train.eval_strategy: steps, or epoch"
    known = _kwargs(recipe, value)
    missing = [name for name in known["needs"] if name not in given]
    if missing:
        return f"{value} needs train.lr_scheduler_kwargs: {{{', '.join(f'{name}: …' for name in missing)}}}"
    if (
        "min_lr" in known["takes"]
        and value != "greedy"
        and value not in BY_METRIC
        and ("min_lr" in given) == ("min_lr_rate" in given)
    ):
        return f"{value} needs train.lr_scheduler_kwargs with one of min_lr and min_lr_rate, as {{min_lr_rate: 0.1}}"
    return None


def _kwargs(recipe: Recipe, schedule: str) -> dict[str, list[str]]:
    """Which `lr_scheduler_kwargs` a schedule takes and needs."""
    schedules = trl_arguments()[recipe.train.method]["arguments"]["lr_scheduler_type"]["kwargs"]
    return dict(schedules[schedule])


def schedule_kwargs(recipe: Recipe, value: Any) -> str | None:
    """Arguments that the schedule does not take."""
    name = recipe.train.lr_scheduler_type
    takes = _kwargs(recipe, name)["takes"]
    if not isinstance(value, dict):
        return "must be a map"
    strange = [str(one) for one in value if one not in takes]
    if not strange:
        return None
    near = did_you_mean(strange[0], takes)
    said = f"did you mean {near}?" if near else f"it takes {', '.join(takes)}" if takes else "remove it"
    return f"{name} takes no {strange[0]}: {said}"


# By what an optimizer's name holds: the module it needs, and what to install.
OPTIMIZER_PACKAGES = {
    "galore_": ("galore_torch", "galore-torch"), "apollo_": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"), "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free_": ("schedulefree", "schedulefree"), "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_torch_4bit": ("torchao", "torchao"), "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_torch_xla": ("torch_xla", "torch-xla"), "adamw_torch_npu": ("torch_npu", "torch-npu"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"), "bnb": ("bitsandbytes", "bitsandbytes"),
    "8bit": ("bitsandbytes", "bitsandbytes"), "32bit": ("bitsandbytes", "bitsandbytes"),
    "ademamix": ("bitsandbytes", "bitsandbytes"),
}  # fmt: skip


def optimizer(recipe: Recipe, value: Any) -> str | None:
    module, package = next((found for part, found in OPTIMIZER_PACKAGES.items() if part in value), (None, None))
    if module and find_spec(module) is None:
        return f"{value} needs the package {package}, which is not installed: pip install {package}"
    if value.startswith(LOW_RANK) and not recipe.train.optim_target_modules:
        return f"{value} needs train.optim_target_modules, such as [q_proj, v_proj]"
    if value.endswith("_layerwise") and recipe.train.gradient_accumulation_steps > 1:
        return f"{value} can't accumulate gradients: set train.gradient_accumulation_steps: 1"
    return None


LOW_RANK = ("galore_", "apollo_")
WITHOUT_BETAS = (
    "adafactor", "sgd", "adagrad", "rmsprop", "galore_", "lomo", "adalomo", "grokadamw", "schedule_free_sgd",
)  # fmt: skip
# Of optimizers that torch has, what `optim_args` may hold; of the packages' own that is theirs to say.
OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
}  # fmt: skip
WITHOUT_ARGS = re.compile(
    r"adamw_torch(_fused|_xla|_npu_fused)?|adafactor|(paged_)?(adamw|lion)_(bnb_)?\d+bit|a?d?a?lomo"
)


def optim_args(recipe: Recipe, value: Any) -> str | None:
    optim = recipe.train.optim
    if WITHOUT_ARGS.fullmatch(optim):
        return f"is not read by {optim}: remove it"
    pairs = [part.split("=") for part in value.replace(" ", "").split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        return "must be name=value pairs with commas between them, such as momentum=0.9,nesterov=true"
    strange = [name for name, _ in pairs if name not in OPTIM_ARGS.get(optim, (name,))]
    return f"{optim} takes no {strange[0]}: it takes {', '.join(OPTIM_ARGS[optim])}" if strange else None


# By name in `report_to`: the modules of which one is needed, and what to install.
REPORTERS = {
    "azure_ml": (("azureml",), "azureml-core"), "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"), "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub mlflow"), "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"), "kubeflow": (("kubeflow",), "kubeflow"), "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"), "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"), "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}  # fmt: skip


def reporters(recipe: Recipe) -> list[str]:
    said = recipe.train.report_to
    return [said] if isinstance(said, str) else said or []


def report_to(recipe: Recipe, value: Any) -> str | None:
    for name in reporters(recipe):
        if name in ("none", "all"):
            continue
        if name not in REPORTERS:
            near = did_you_mean(name, list(REPORTERS))
            return f"must be none, all, or of {', '.join(REPORTERS)}, not {name}" + (
                f"; did you mean {near}?" if near else ""
            )
        modules, package = REPORTERS[name]
        if not any(find_spec(module) for module in modules):
            return f"{name} needs a package that is not installed: pip install {package}"
    return None
