"""What a recipe asks of its model that the model can't do, as names and its `config.json` show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_cli.recipe.train import trl_arguments
from dpo_cli.recipe.yaml import Key

Recipe = Any  # dpo_cli.recipe's, which imports this module


def on_hub(name: str) -> bool:
    return not (name.startswith("builtin:") or Path(name).is_absolute())


def quantised_base(recipe: Recipe, config: Mapping[str, Any]) -> list[tuple[Key, str]]:
    """What export would refuse after training: quantised weights to merge into. Told by config.json, or by the id."""
    name = recipe.model.id
    if recipe.model.merge_base or not (config.get("quantization_config") or name.endswith("-bnb-4bit")):
        return []
    fix = f"set model.merge_base: {unquantised(name) or 'the 16-bit repository, such as Qwen/Qwen3-1.7B'}"
    return [
        (("model", "merge_base"), f"is missing, and model.id holds quantised weights, which nothing merges into: {fix}")
    ]


def unquantised(name: str) -> str | None:
    """The repository that Unsloth's 4-bit ones are made of: unsloth/X-unsloth-bnb-4bit -> unsloth/X; None of others."""
    base = re.sub(r"(-unsloth)?-bnb-4bit$", "", name)
    return base if on_hub(name) and base != name else None


def _in_4bit(quantised: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of bitsandbytes' 4-bit weights."""
    return bool(quantised.get("load_in_4bit")) and quantised.get("quant_method", "bitsandbytes") == "bitsandbytes"


def against_model(recipe: Recipe, config: Mapping[str, Any]) -> list[tuple[Key, str]]:
    """What the recipe asks of a model that it can't do, each as `problem: fix`.

    Args:
        config: the model's `config.json`, or a transformers config's `to_dict()`.
    """
    found: list[tuple[Key, str]] = []
    targets = recipe.lora.target_modules if recipe.model.adapter is None else "auto"
    heads = [one for one in targets if one.endswith("lm_head")] if targets != "auto" else []
    if config.get("tie_word_embeddings") is True and heads:
        sentence = "names lm_head, but this model's head is its embedding (tie_word_embeddings)"
        found.append((("lora", "target_modules"), f"{sentence}, so it could not be merged: remove it"))
    longest = (config.get("text_config") or config).get("max_position_embeddings")
    if isinstance(longest, int) and recipe.model.max_length > longest:
        found.append(
            (("model", "max_length"), f"is more than the model's {longest}: set model.max_length: {longest} or less")
        )
    quantised = config.get("quantization_config") or {}
    if quantised and not _in_4bit(quantised):
        method = "8-bit" if quantised.get("load_in_8bit") else str(quantised.get("quant_method", "other")).upper()
        sentence = f"names {method} weights, and only bitsandbytes' 4-bit ones are trained: name the 16-bit repository"
        found.append((("model", "id"), sentence))
    elif quantised and not recipe.model.load_in_4bit:
        sentence = "is false, but the weights are quantised: set model.load_in_4bit: true, or name 16-bit ones"
        found.append((("model", "load_in_4bit"), sentence))
    experts = any(str(name).startswith("num_") and "expert" in str(name) for name in config)
    if getattr(recipe.train, "router_aux_loss_coef", None) and not experts:
        found.append((("train", "router_aux_loss_coef"), "is of models with experts, which this is not: remove it"))
    return found


def lora_targets(recipe: Recipe) -> str | None:
    """Layers that a LoRA can't have here, as far as their names say it."""
    value = recipe.lora.target_modules
    for name in value if value != "auto" else ():
        if name == "all" or not re.fullmatch(r"\w+(\.\w+)*", name) or re.search(r"emb|wte|wpe|norm", name):
            wanted = "must be names of linear layers, such as q_proj, and no patterns"
            return f"{wanted}, not {name}: leave the key out for all of them"
        if name.endswith("lm_head") and not trl_arguments()[recipe.train.method]["whole_logits"]:
            return f"{name} would not train: TRL's trainer of {recipe.train.method} reads the head's weights: remove it"
    return None
