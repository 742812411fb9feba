"""The 16-bit weights that an adapter is merged into: found, fetched, and refused where they are no such thing."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli import model_files, models
from dpo_cli.disk import read_json
from dpo_cli.errors import DpoError, first_line
from dpo_cli.hub import weights_are_here
from dpo_cli.progress import Step
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.model_rules import unquantised
from dpo_cli.recipe.paths import revision_of

INDEX = "model.safetensors.index.json"

# What goes into an export as it is: how text becomes tokens, and how generation ends.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "generation_config.json", "chat_template.jinja",
)  # fmt: skip

# Keys of config.json that an upload or a quantisation changes; no logits depend on them, and ends are checked apart.
UPLOADED = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "quantization_config",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


class Stored(NamedTuple):
    """A tensor as a safetensors file holds it; `dtype` in that format's words: BF16, F16, F32."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def name(recipe: Recipe) -> str:
    """Name the base as people will load it: by its hub id or absolute folder."""
    return model_files.location(models.merge_base(recipe))


def revision(recipe: Recipe) -> str | None:
    """Return `model.revision` where the base is the model that was trained: the key is about no other repository."""
    return revision_of(recipe, "merge_base")


def find(recipe: Recipe, *, weights: bool = True) -> Path:
    """Find the folder of the 16-bit base, fetched from the Hub where it is a hub id.

    Args:
        weights: without them only the small files are fetched, for a look ahead.

    Raises:
        DpoError: it can't be had, is quantised, or has no whole safetensors.
    """
    try:
        base = name(recipe)
        folder = Path(base) if Path(base).is_absolute() else _fetch(base, revision(recipe), weights)
        if "quantization_config" in read_json(folder / "config.json"):
            raise DpoError(
                f"{base} holds quantised weights; merging needs the 16-bit ones",
                where=recipe.where("model", "merge_base"),
                hint=f"set model.merge_base: {unquantised(base) or 'the 16-bit repository, such as Qwen/Qwen3-1.7B'}",
            )
        if weights:
            stored(folder)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DpoError(
            f"can't get the 16-bit base {models.merge_base(recipe)}: {first_line(error)}",
            where=recipe.where("model", "merge_base"),
            hint="check the id; where the Hub is out of reach set HF_ENDPOINT to a mirror, or name a local folder with "
            "safetensors, all of them whole",
        ) from error
    return folder


def compare(recipe: Recipe, base: Path) -> None:
    """Compare the 16-bit base's config with that of the model that was trained, where these are two.

    Whole, for most of it shows in no tensor's shape: rope, epsilon, context, heads. Keys that one of them lacks
    are left out: what matters to the architecture has a default, and re-uploads add keys of their own.

    Raises:
        DpoError: they are configs of two models.
    """
    trained = model_files.location(recipe.model.id)
    if trained == name(recipe):
        return
    try:
        own = AutoConfig.from_pretrained(trained, revision=recipe.model.revision, trust_remote_code=False).to_dict()
    except (OSError, ValueError):  # a machine that has not trained, without a network
        return
    there = AutoConfig.from_pretrained(base, trust_remote_code=False).to_dict()
    differ = sorted(key for key in own.keys() & there.keys() - UPLOADED if own[key] != there[key])
    if differ:
        shown = ", ".join(f"{key} {there[key]} where {own[key]} was trained" for key in differ[:3])
        raise DpoError(
            f"the 16-bit base is another model than the trained one: {shown}",
            where=recipe.where("model", "merge_base"),
            hint="set model.merge_base to the 16-bit weights of the model that was trained",
        )


def _fetch(base: str, commit: str | None, weights: bool) -> Path:
    wanted = [*TOKENIZER_FILES, "config.json", "README.md"]  # README.md: the model card repeats its licence
    wanted += ["*.safetensors", INDEX] if weights else []
    there = not weights or weights_are_here(base, commit)
    with Step(f"{'looking up' if there else 'downloading'} {base}", live=there, named=not there):
        return Path(snapshot_download(base, revision=commit, allow_patterns=wanted, ignore_patterns=["*/*"]))


def stored(folder: Path) -> dict[str, Stored]:
    """List the tensors in a folder's `model.safetensors`, or in the shards of its index, by the files' headers alone.

    Raises:
        ValueError: a file is missing, cut short or not safetensors, or the index does not list what is in them.
    """
    index = folder / INDEX
    listed: dict[str, str] = read_json(index)["weight_map"] if index.is_file() else {}
    found: dict[str, Stored] = {}
    for file in sorted(set(listed.values())) or ["model.safetensors"]:
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    part = opened.get_slice(key)
                    found[key] = Stored(folder / file, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: {first_line(error)}") from error
    strange = listed.items() ^ {(key, tensor.file.name) for key, tensor in found.items()} if listed else ()
    if strange:
        raise ValueError(f"{INDEX} and the shards differ in {len(strange)} tensors, such as {min(strange)[0]}")
    return found


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """List the tensors of a model by its `config.json` alone, for a base that is not fetched yet."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return {name: tuple(one.shape) for name, one in model.named_parameters()}


def dtype_16bit(tensors: dict[str, Stored]) -> str:
    """Choose what a merge is stored as: `float16` as the base, else `bfloat16`, which keeps float32's range."""
    return "float16" if any(tensor.dtype == "F16" for tensor in tensors.values()) else "bfloat16"
