"""Which keys of the recipe each stage reads: what else changes leaves its results fresh."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dpo_cli.recipe import Recipe
from dpo_cli.recipe.raters import PACE
from dpo_cli.recipe.yaml import Key, names_a_path, show_key

# The sections of the recipe that each stage reads. What a stage before it reads is not repeated.
READS: dict[str, tuple[str, ...]] = {
    "prepare": ("seed", "model", "data"),
    "train": ("seed", "model", "lora", "train", "engine"),
    "sets": ("eval.sets",),
    "eval": ("seed", "eval"),
    "export": ("model.merge_base", "export", "eval.temperature", "eval.top_p", "eval.top_k"),  # Ollama's parameters
}
# Keys of these sections that don't change a stage's results.
UNREAD: dict[str, tuple[str, ...]] = {
    "prepare": ("model.adapter", "model.adapter_revision", "model.load_in_4bit", "model.dtype", "model.merge_base"),
    "train": ("model.merge_base",),
    "export": ("export.llama_cpp",),
}
UNREAD_WHERE_SAMPLED = ("model.merge_base",)  # by prepare, where the model answers the prompts
PACE_KEYS = re.compile(rf"data\.(rater|sources\[\d+\]\.sample\.server)\.({'|'.join(PACE)})")


def recipe_keys(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The recipe keys that a stage reads, flat and without absolute paths: {"train.beta": 0.1, …}.

    A local path counts by its last part; what the files hold counts through their sha256.
    """
    flat: dict[str, Any] = {}

    def flatten(value: Any, key: Key) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                flatten(inner, (*key, name))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, inner in enumerate(value):
                flatten(inner, (*key, index))
        else:
            if isinstance(value, list):
                value = [_movable(inner, (*key, index)) for index, inner in enumerate(value)]
            flat[show_key(key)] = _movable(value, key)

    values = recipe.model_dump(mode="json")
    for read in READS[stage]:
        section, _, name = read.partition(".")
        flatten(values[section][name] if name else values[section], tuple(read.split(".")))
    samples = stage == "prepare" and recipe.data.samples_here
    unread = UNREAD_WHERE_SAMPLED if samples else UNREAD.get(stage, ())
    return {key: value for key, value in flat.items() if key not in unread and not PACE_KEYS.fullmatch(key)}


def _movable(value: Any, key: Key) -> Any:
    """A local path by its last part, anything else as it is."""
    local = isinstance(value, str) and names_a_path(key) and Path(value).is_absolute()
    return Path(value).name if local else value
