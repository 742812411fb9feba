"""Where a model's files are, and what to say where they can't be had."""

from __future__ import annotations

from pathlib import Path

from dpo_cli import smoke
from dpo_cli.errors import DpoError, first_line
from dpo_cli.machine import ran_out_of_memory
from dpo_cli.recipe import Recipe, RewardModelRater


def location(model_id: str) -> str:
    """What transformers should load: the folder of a `builtin:` id, else the id itself."""
    return str(smoke.resolve(model_id)) if model_id.startswith("builtin:") else model_id


def local_files(recipe: Recipe) -> dict[str, Path]:
    """The files of a local model and adapter, by a name without their folder; hub ids have none."""
    return _files_of("model", recipe.model.id) | _files_of("adapter", recipe.model.adapter)


def merge_files(recipe: Recipe) -> dict[str, Path]:
    """The files of a local `model.merge_base`, where that is another model than the trained one."""
    return {} if recipe.model.merge_base == recipe.model.id else _files_of("merge_base", recipe.model.merge_base)


def _files_of(kind: str, model_id: str | None) -> dict[str, Path]:
    folder = Path(location(model_id)) if model_id else None
    if folder is None or not folder.is_dir():
        return {}
    return {f"{kind}/{path.name}": path for path in sorted(folder.iterdir()) if path.is_file()}


def tokenizer_files(recipe: Recipe) -> dict[str, Path]:
    """Those of `local_files` that decide how text becomes tokens."""
    return {
        name: path
        for name, path in local_files(recipe).items()
        if name.startswith(("model/tokenizer", "model/chat_template"))
    }


def files_for_prepare(recipe: Recipe) -> dict[str, Path]:
    """Those that decide the pairs: of the tokenizer, of the whole model where it answers prompts, and of the rater."""
    rater = recipe.data.rater
    rated_by = rater.id if isinstance(rater, RewardModelRater) else None
    return (local_files if recipe.data.samples_here else tokenizer_files)(recipe) | _files_of("rater", rated_by)


def cannot_load(recipe: Recipe, key: str, what: str, error: Exception) -> DpoError:
    """Make an error of what a library raised, for a person: `what` of the model that is named at `model.<key>`."""
    name = f"{what} of {getattr(recipe.model, key)}"
    message = f"can't load {name}: {first_line(error)}"
    hint = "check the id or folder; where the Hub is out of reach set HF_ENDPOINT to a mirror"
    if ran_out_of_memory(error):
        message = f"{name} does not fit the memory that is free"
        hint = "end what else uses the card (nvidia-smi names it), or take a smaller model"
    return DpoError(message, where=recipe.where("model", key), hint=hint)
