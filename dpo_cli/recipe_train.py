"""The recipe's `train` section: TRL's own argument names, our defaults and ranges, and names of other days.

Nothing here imports TRL: what its arguments are called stands in the generated `trl_arguments.json`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator
from pydantic_core import PydanticCustomError


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

# Arguments that belong to another part of the recipe or to dpo-cli itself, and where to say it instead.
OWNED_TRAIN_ARGUMENTS: dict[str, str] = {
    "seed": "set the recipe's own seed:",
    "data_seed": "set the recipe's own seed:",
    "output_dir": "choose the folder with --runs-dir",
    "max_length": "set model.max_length",
    "model_init_kwargs": "use model.id, model.revision, model.dtype and model.load_in_4bit",
    "resume_from_checkpoint": "train resumes by itself; start over with --fresh",
    "push_to_hub": "use export.formats: [hub]",
    "hub_model_id": "use export.hub",
    "hub_token": "run `hf auth login`, and use export.hub",
    "hub_private_repo": "use export.hub",
    "hub_strategy": "use export.hub",
    "hub_always_push": "use export.hub",
    "hub_revision": "use export.hub",
    "remove_unused_columns": "dpo-cli writes the columns itself",
    "do_train": "each command says what it does",
    "do_eval": "each command says what it does",
    "do_predict": "each command says what it does",
    "use_cpu": "the device is found by itself",
    "local_rank": "start several processes with accelerate launch",
    "precompute_ref_log_probs": "use engine.reference_cache",
    "precompute_ref_batch_size": "use engine.reference_cache",
}

# Names that older TRL or transformers had, and what to write today.
OLD_TRAIN_ARGUMENTS: dict[str, str] = {
    "warmup_ratio": "warmup_steps below 1 is a ratio: warmup_steps: 0.1",
    "max_prompt_length": "TRL dropped it; prepare drops long pairs by model.max_length and data.filters.too_long",
    "max_completion_length": "TRL dropped it; prepare drops long pairs by model.max_length",
    "max_target_length": "TRL dropped it; prepare drops long pairs by model.max_length",
    "evaluation_strategy": "it is called eval_strategy now",
    "no_cuda": "the device is found by itself",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "rpo_alpha": "loss_type: [sigmoid, sft] with loss_weights: [1.0, alpha]",
    "reference_free": "train.method: simpo, cpo or orpo need no reference",
    "generate_during_eval": "eval samples from both models",
    "label_pad_token_id": "TRL masks with completion_mask now",
    "is_encoder_decoder": "only causal language models are supported",
    "force_use_ref_model": "the reference is found by itself: base, or base + model.adapter",
    "ref_adapter_name": "the reference is found by itself: base, or base + model.adapter",
    "model_adapter_name": "use model.adapter",
    "overwrite_output_dir": "start over with --fresh",
    "save_safetensors": "safetensors is the only format now",
    "logging_dir": "logs live in the run's train folder",
    "torch_dtype": "set model.dtype",
    "batch_size": "it is called per_device_train_batch_size",
    "epochs": "it is called num_train_epochs",
    "lr": "it is called learning_rate",
}

_POSITIVE: dict[str, Any] = {"gt": 0}
_NOT_NEGATIVE: dict[str, Any] = {"ge": 0}
_AT_LEAST_ONE: dict[str, Any] = {"ge": 1}
TRAIN_RANGES: dict[str, dict[str, Any]] = {
    "learning_rate": _POSITIVE,
    "beta": _POSITIVE,
    "num_train_epochs": _POSITIVE,
    "per_device_train_batch_size": _AT_LEAST_ONE,
    "per_device_eval_batch_size": _AT_LEAST_ONE,
    "gradient_accumulation_steps": _AT_LEAST_ONE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "adam_beta1": {"ge": 0, "lt": 1},
    "adam_beta2": {"ge": 0, "lt": 1},
    "adam_epsilon": _POSITIVE,
    "label_smoothing": {"ge": 0, "lt": 0.5},
    "ld_alpha": {"ge": 0, "le": 1},
    "logging_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_total_limit": _AT_LEAST_ONE,
    "dataset_num_proc": _AT_LEAST_ONE,
    "dataloader_num_workers": _NOT_NEGATIVE,
}


@cache
def trl_arguments() -> dict[str, Any]:
    """What `train/methods.py` read off TRL's config classes: {method: {config, losses, arguments}}."""
    text = (Path(__file__).parent / "trl_arguments.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


class _TrainBase(Section):
    """Checks between TRL's arguments, which `train_model` adds below."""

    model_config = ConfigDict(protected_namespaces=())

    @model_validator(mode="after")
    def _settings_that_exclude_each_other(self) -> _TrainBase:
        train: Any = self
        losses = train.loss_type
        if train.loss_weights is not None and len(train.loss_weights) != len(losses):
            problem = f"has {len(train.loss_weights)} weights for {len(losses)} losses"
            raise PydanticCustomError("key", "{problem}", {"key": "loss_weights", "problem": problem})
        if {"exo_pair", "robust"} & set(losses) and not train.label_smoothing:
            problem = f"must be above 0 for {' + '.join(losses)}, for instance 0.1"
            raise PydanticCustomError("key", "{problem}", {"key": "label_smoothing", "problem": problem})
        if train.bf16 and train.fp16:
            raise PydanticCustomError("key", "{problem}", {"key": "fp16", "problem": "and bf16 can't both be true"})
        return self


@cache
def train_model(method: str) -> type[_TrainBase]:
    """The `train` section of one method: TRL's arguments with their types, our defaults, ranges and choices."""
    described = trl_arguments()[method]

    def as_list(value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    fields: dict[str, Any] = {"method": (Literal[method], method)}
    for name, argument in described["arguments"].items():
        if name in OWNED_TRAIN_ARGUMENTS:
            continue
        kind: Any = argument["type"]
        if argument["choices"]:
            none = [None] if "None" in kind.split(" | ") else []
            kind = Literal[tuple(argument["choices"] + none)]
        if name == "loss_type":
            losses: Any = Literal[tuple(described["losses"])]
            word_or_list = BeforeValidator(as_list, json_schema_input_type=losses | list[losses])
            kind = Annotated[list[losses], word_or_list, Field(min_length=1)]
        default = OUR_TRAIN_DEFAULTS.get(name, argument["default"])
        if default is None and name in OUR_TRAIN_DEFAULTS:
            kind = f"{kind} | None"
        fields[name] = (kind, Field(default, **TRAIN_RANGES.get(name, {})))
    return create_model(
        "Train",
        __base__=_TrainBase,
        __module__=__name__,
        __doc__=f"Arguments of TRL's {described['config']}.",
        **fields,
    )
