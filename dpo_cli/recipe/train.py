"""The recipe's `train` section: TRL's own argument names, our defaults and ranges, and deprecated names.

Nothing here imports TRL: what its arguments are called stands in the generated `trl_arguments.json`.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from dpo_cli.errors import either, with_nearest
from dpo_cli.recipe.foreign import OWNED_TRAIN_ARGUMENTS
from dpo_cli.recipe.slips import one_as_list


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, types are exact, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# What dpo-cli sets otherwise than TRL: the contract's learning rate and batch, and checkpoints often enough that a
# crash costs minutes (TRL's every 500 steps would leave a 313-step run without any).
OUR_TRAIN_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-5,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 24,
    "num_train_epochs": 1.0,
    "per_device_eval_batch_size": 4,
    "logging_steps": 5,
    "save_steps": 25,
    "save_total_limit": 2,
    "gradient_checkpointing": None,  # where the memory asks for it
}

# Figures of the held-out pairs during training that tell a better adapter from a worse one.
HELD_OUT = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen")

DEFAULT_METHOD = "dpo"

# What values are possible, by pydantic's names, and of which arguments.
_RANGES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "learning_rate beta num_train_epochs adam_epsilon desirable_weight undesirable_weight logging_steps "
        "save_steps eval_steps neftune_noise_alpha discopop_tau",
        {"gt": 0},
    ),
    (
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit "
        "dataset_num_proc dataloader_prefetch_factor torch_empty_cache_steps ddp_timeout ddp_bucket_cap_mb",
        {"ge": 1},
    ),
    ("warmup_steps weight_decay max_grad_norm simpo_gamma cpo_alpha dataloader_num_workers eval_delay", {"ge": 0}),
    ("adam_beta1 adam_beta2", {"ge": 0, "lt": 1}),
    ("label_smoothing", {"ge": 0, "lt": 0.5}),
    ("ld_alpha", {"ge": 0, "le": 1}),
)
TRAIN_RANGES = {name: limits for names, limits in _RANGES for name in names.split()}


@cache
def trl_arguments() -> dict[str, Any]:
    """By method, what `train/methods.py` says of it and what TRL declares: see `tests/tools/trl_arguments.py`."""
    described = json.loads((Path(__file__).parent / "trl_arguments.json").read_text(encoding="utf-8"))
    shared = described.pop("shared")
    return {method: {**one, "arguments": {**shared, **one["arguments"]}} for method, one in described.items()}


def method_of(train: Any) -> str:
    """The method that a `train` section as it was written asks for; dpo where it says nothing that is known."""
    given = train.get("method") if isinstance(train, dict) else None
    return given if isinstance(given, str) and given in trl_arguments() else DEFAULT_METHOD


def methods_with(what: Literal["arguments", "data", "losses"], name: Any) -> list[str]:
    """List the methods that have an argument, learn from a `data.format`, or have a `train.loss_type`."""
    return [method for method, one in trl_arguments().items() if name in one[what]]


def methods_of_answers() -> list[str]:
    """The methods that learn from good answers alone."""
    return [method for method, one in trl_arguments().items() if not one["compares"]]


def held_out_metric_problem(metric: str) -> str | None:
    """What is wrong with the name of a held-out figure, such as `eval_loss` or `eval_zh_rewards/margins`."""
    if re.fullmatch(rf"eval_([a-z]+_)?({'|'.join(HELD_OUT)})", metric):
        return None
    known = [f"eval_{name}" for name in HELD_OUT]
    return with_nearest(f"must be one of {', '.join(known)}, or of one language, as eval_zh_loss", metric, known)


def not_logged(method: str, metric: str) -> str | None:
    """What is wrong with a held-out figure that a method's trainer does not log."""
    unlogged = trl_arguments()[method]["not_logged"]
    if not metric.endswith(tuple(unlogged)):
        return None
    instead = [f"eval_{name}" for name in HELD_OUT if name not in unlogged]
    return f"is not logged by {method}: set {either(instead[:2])}"


def language_of(metric: str) -> str | None:
    """The one language whose held-out rows a figure such as `eval_zh_loss` is of; None: all."""
    words = metric.split("/")[0].split("_")
    return words[1] if len(words) == 3 else None


class _TrainBase(Section):
    """What all `train` sections have beside TRL's arguments, which `train_model` adds below."""

    model_config = ConfigDict(protected_namespaces=())

    @property
    def losses(self) -> list[str]:
        """`loss_type` as a list, whatever the method; ORPO has one loss and no name for it."""
        given = getattr(self, "loss_type", [])
        return [given] if isinstance(given, str) else given

    @property
    def reward_scale(self) -> float:
        """`beta`, by which log-ratios become rewards; 1, so that rewards are nats, where the method has none."""
        return float(getattr(self, "beta", 1.0))

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_methods_own_loss(cls, train: Any) -> Any:
        """So that `--set train.loss_type=null` takes back what the recipe says for another method."""
        if isinstance(train, dict) and train.get("loss_type", "") is None:
            return {name: value for name, value in train.items() if name != "loss_type"}
        return train


@cache
def train_model(method: str) -> type[_TrainBase]:
    """The `train` section of one method: TRL's arguments with their types, our defaults, ranges and choices."""
    described = trl_arguments()[method]
    defaults = OUR_TRAIN_DEFAULTS | described["defaults"]

    fields: dict[str, Any] = {"method": (Literal[method], method)}
    for name, argument in described["arguments"].items():
        if name in OWNED_TRAIN_ARGUMENTS:
            continue
        kind: Any = argument["type"]
        if argument.get("choices"):
            none = [None] if "None" in kind.split(" | ") else []
            kind = Literal[tuple(argument["choices"] + none)]
        if name == "loss_type":
            losses: Any = Literal[tuple(described["losses"])]
            several = kind.startswith("list")  # DPO's, which mixes losses
            word_or_list = BeforeValidator(one_as_list, json_schema_input_type=losses | list[losses])
            kind = Annotated[list[losses], word_or_list, Field(min_length=1)] if several else losses
        if name == "loss_weights":
            number_or_list = BeforeValidator(one_as_list, json_schema_input_type=float | list[float] | None)
            kind = Annotated[list[float] | None, number_or_list]
        default = defaults.get(name, argument["default"])
        if default is None and name in defaults:
            kind = f"{kind} | None"
        fields[name] = (kind, Field(default, **TRAIN_RANGES.get(name, {})))
    return create_model(
        "Train",
        __base__=_TrainBase,
        __module__=__name__,
        __doc__=f"Arguments of TRL's {described['config']}.",
        **fields,
    )


def train_schema() -> dict[str, Any]:
    """JSON Schema of the `train` section, with the arguments of every method: which are whose, `check` says."""
    entries: dict[str, list[Any]] = {}
    for method in trl_arguments():
        for name, entry in train_model(method).model_json_schema()["properties"].items():
            entry.pop("title", None)  # which pydantic makes of the name: there are hundreds
            several = entries.setdefault(name, [])
            several += [entry] if entry not in several else []
    entries["method"] = [{"enum": list(trl_arguments()), "default": DEFAULT_METHOD, "type": "string"}]
    entries["loss_type"].append({"type": "null"})  # see `_null_is_the_methods_own_loss`
    return {
        "type": "object",
        "description": "Arguments of the method's config in TRL, by TRL's names.",
        "properties": {name: one[0] if len(one) == 1 else {"anyOf": one} for name, one in entries.items()},
        "additionalProperties": False,
    }
