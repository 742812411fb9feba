"""Writing the adapter and the merged model: tokenizer files as the base has them, template as training had it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_cli import models
from dpo_cli.errors import DpoError
from dpo_cli.recipe import Recipe
from dpo_cli.run import write_json

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
TEMPLATE = "chat_template.jinja"


def write_adapter(recipe: Recipe, adapter: Path, base: Path, folder: Path) -> None:
    """The policy adapter alone, naming the 16-bit base that people will load it on.

    Args:
        adapter: `train/adapter`.
        base: the base's folder, for its tokenizer files.
        folder: to write into; made.
    """
    folder.mkdir(parents=True)
    shutil.copyfile(adapter / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    # A built-in's cache folder or a relative path would mean nothing elsewhere; ids and absolute folders do.
    config["base_model_name_or_path"] = models.location(models.merge_base(recipe))
    config["revision"] = None
    write_json(folder / "adapter_config.json", config)
    copy_tokenizer(base, adapter, folder)


def write_merged(model: PeftModel, dtype: torch.dtype, base: Path, adapter: Path, folder: Path) -> None:
    """Merge W + (alpha / r) B A in the precision the model is in, then store as `dtype` in shards of at most 5 GB.

    Uses the model up: afterwards it is merged and has no adapter.
    """
    merged = model.merge_and_unload(safe_merge=True).to(dtype)
    merged.save_pretrained(str(folder), max_shard_size="5GB")
    copy_tokenizer(base, adapter, folder)


def copy_tokenizer(base: Path, adapter: Path, folder: Path) -> None:
    """The base's tokenizer files byte for byte, and the chat template that training used.

    Saved anew by transformers 5 they name a tokenizer class that transformers 4, and with it many a server, can't read.
    """
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    shutil.copyfile(adapter / TEMPLATE, folder / TEMPLATE)


def base_folder(recipe: Recipe) -> Path:
    """The folder of the 16-bit base's small files, fetched from the hub where it is a hub id.

    Raises:
        DpoError: it can't be had.
    """
    base = models.location(models.merge_base(recipe))
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, allow_patterns=[*TOKENIZER_FILES, "config.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise DpoError(
            f"can't fetch the 16-bit base {base}: {str(error).strip().splitlines()[0]}",
            where=recipe.where("model", "merge_base"),
            hint="check the id; where the Hub is out of reach set HF_ENDPOINT to a mirror, or name a local folder",
        ) from error
