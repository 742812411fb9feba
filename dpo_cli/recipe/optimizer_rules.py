"""What the names of optimizers, schedules and loggers ask for: packages, arguments, other settings."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from dpo_cli.errors import did_you_mean, with_nearest
from dpo_cli.recipe.train import trl_arguments

BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that follow a held-out figure


def schedule(train: Any) -> str | None:
    """Say what a schedule needs and has not."""
    name, given = train.lr_scheduler_type, train.lr_scheduler_kwargs
    given = given if isinstance(given, dict) else {}
    if name in BY_METRIC and train.eval_strategy == "no":
        return f"{name} follows the held-out loss: set train.eval_strategy: steps, or epoch"
    known = _kwargs(train)
    lacking = [one for one in known["needs"] if one not in given]
    if lacking:
        return f"{name} needs train.lr_scheduler_kwargs: {{{', '.join(f'{one}: …' for one in lacking)}}}"
    one_of_two = "min_lr" in known["takes"] and name not in BY_METRIC
    if one_of_two and ("min_lr" in given) == ("min_lr_rate" in given):
        return f"{name} needs train.lr_scheduler_kwargs with one of min_lr and min_lr_rate, as {{min_lr_rate: 0.1}}"
    return None


def _kwargs(train: Any) -> dict[str, list[str]]:
    """Which `lr_scheduler_kwargs` the schedule takes and needs."""
    schedules = trl_arguments()[train.method]["arguments"]["lr_scheduler_type"]["kwargs"]
    return dict(schedules[train.lr_scheduler_type])


def schedule_kwargs(train: Any) -> str | None:
    """Say which arguments the schedule does not take."""
    given, takes = train.lr_scheduler_kwargs, _kwargs(train)["takes"]
    if not isinstance(given, dict):
        return "must be a map"
    strange = [str(one) for one in given if one not in takes]
    if not strange:
        return None
    near = did_you_mean(strange[0], takes)
    instead = f"did you mean {near}?" if near else f"it takes {', '.join(takes)}" if takes else "remove it"
    return f"{train.lr_scheduler_type} takes no {strange[0]}: {instead}"


def warmup(train: Any) -> str | None:
    """Say whether the schedule has no warm-up."""
    name = train.lr_scheduler_type
    if name not in ("constant", *BY_METRIC):
        return None
    instead = "constant_with_warmup has a warm-up" if name == "constant" else "remove it"
    return f"is not read by lr_scheduler_type {name}: {instead}"


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


def optimizer(train: Any) -> str | None:
    """Say what an optimizer needs and has not."""
    value = train.optim
    module, package = next((found for part, found in OPTIMIZER_PACKAGES.items() if part in value), (None, None))
    if module and find_spec(module) is None:
        return f"{value} needs the package {package}, which is not installed: pip install {package}"
    if value.startswith(LOW_RANK) and not train.optim_target_modules:
        return f"{value} needs train.optim_target_modules, such as [q_proj, v_proj]"
    if value.endswith("_layerwise") and train.gradient_accumulation_steps > 1:
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


def optim_args(train: Any) -> str | None:
    """Say which arguments the optimizer does not take."""
    optim = train.optim
    if not train.optim_args:
        return None
    if WITHOUT_ARGS.fullmatch(optim):
        return f"is not read by {optim}: remove it"
    pairs = [part.split("=") for part in train.optim_args.replace(" ", "").split(",")]
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


def reporters(train: Any) -> list[str]:
    """`train.report_to` as a list."""
    names = train.report_to
    return [names] if isinstance(names, str) else names or []


def report_to(train: Any) -> str | None:
    """Say which of the names is no tracker, or of one that is not installed."""
    for name in (one for one in reporters(train) if one not in ("none", "all")):
        if name not in REPORTERS:
            return with_nearest(f"must be none, all, or of {', '.join(REPORTERS)}, not {name}", name, [*REPORTERS])
        modules, package = REPORTERS[name]
        if not any(find_spec(module) for module in modules):
            return f"{name} needs a package that is not installed: pip install {package}"
    return None
