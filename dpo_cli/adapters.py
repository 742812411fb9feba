"""LoRA adapters: found, described, and loaded into a model, all of their weights and no others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

from dpo_cli.disk import read_json
from dpo_cli.errors import DpoError
from dpo_cli.model_files import cannot_load
from dpo_cli.recipe import Lora, Recipe

# What of an adapter_config.json a plain LoRA, (alpha / r) B A on linear layers, or with sqrt(r), may set.
PLAIN = frozenset({
    "r", "lora_alpha", "lora_dropout", "bias", "target_modules", "task_type", "peft_type", "auto_mapping",
    "use_rslora", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "init_lora_weights",
})  # fmt: skip
# Initialisations that leave the base as it is. (So does EVA, with numbers of its own; PiSSA, OLoRA, CorDA and LoftQ
# change it, so that an adapter put on the plain base says something else.)
KEEP_THE_BASE = (None, True, False, "gaussian")


def adapter_folder(recipe: Recipe) -> Path | None:
    """Find the folder of `model.adapter`, fetched from the hub where it is a hub id; None where the recipe names none.

    Raises:
        DpoError: it can't be had, or is no LoRA adapter.
    """
    if recipe.model.adapter is None:
        return None
    folder = Path(recipe.model.adapter)
    if not folder.is_dir():
        revision = recipe.model.adapter_revision
        try:
            folder = Path(snapshot_download(recipe.model.adapter, revision=revision, allow_patterns=["adapter_*"]))
        except (OSError, ValueError) as error:
            raise cannot_load(recipe, "adapter", "the LoRA", error) from error
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise DpoError(
                f"{recipe.model.adapter} is no LoRA adapter: it has no {name}",
                where=recipe.where("model", "adapter"),
                hint="name the folder that save_pretrained wrote; a merged model goes into model.id",
            )
    return folder


def adapter_commit(recipe: Recipe) -> str | None:
    """Return the commit of a `model.adapter` from the hub, which its cache keeps in a folder of that name."""
    folder = adapter_folder(recipe)
    return folder.name if folder and folder.parent.name == "snapshots" else None


def not_plain(config: Mapping[str, Any]) -> list[str]:
    """List what makes an adapter another thing than a plain LoRA on the plain base, by its `adapter_config.json`."""
    if config.get("peft_type") != "LORA":
        return [f"peft_type: {config.get('peft_type')}"]
    usual = LoraConfig().to_dict()
    special = [name for name, value in config.items() if name not in PLAIN and value and value != usual.get(name)]
    if config.get("init_lora_weights") not in KEEP_THE_BASE:
        special.append(f"init_lora_weights: {config['init_lora_weights']}")
    if isinstance(config.get("target_modules"), str):
        special.append("a pattern as target_modules")
    return special


def lora_of(recipe: Recipe, folder: Path) -> Lora:
    """Read the LoRA settings of an adapter to go on with; its own, whatever the recipe's `lora` says.

    Raises:
        DpoError: it is no plain LoRA.
    """
    config = read_json(folder / "adapter_config.json")
    special = not_plain(config)
    if special:
        raise DpoError(
            f"{recipe.model.adapter} is no plain LoRA on its base ({', '.join(special)})",
            where=recipe.where("model", "adapter"),
            hint="merge it into its base by peft's merge_and_unload, and name the merged folder as model.id",
        )
    return Lora(
        r=config["r"],
        alpha=config["lora_alpha"],
        rslora=bool(config.get("use_rslora")),
        dropout=config["lora_dropout"],
        bias=config["bias"],
        target_modules=sorted(config["target_modules"]),
    )


def load_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Load the weights in `folder` into the policy adapter, all of them and no others.

    Raises:
        ValueError: the names or shapes are not those of the adapter.
    """
    weights, own = load_peft_weights(str(folder)), get_peft_model_state_dict(model, adapter_name="default")
    strange = sorted(weights.keys() ^ own.keys())
    strange += [name for name in weights.keys() & own.keys() if weights[name].shape != own[name].shape]
    if strange:
        raise ValueError(f"{len(strange)} tensors don't match, such as {strange[0]}")
    set_peft_model_state_dict(model, weights, adapter_name="default")
