"""What the Hub and its cache hold, asked before anything is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import httpx
from huggingface_hub import constants, get_token, try_to_load_from_cache

from dpo_cli.disk import read_json
from dpo_cli.errors import DpoError
from dpo_cli.model_files import location
from dpo_cli.progress import Step
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.paths import DATA, Part, named, revision_of

SECONDS = 5  # to wait for the Hub's first answer


def require(recipe: Recipe, parts: Iterable[Part]) -> None:
    """Ask the Hub for what is neither local nor in its cache, within seconds, where a download would try for a minute.

    Raises:
        DpoError: the Hub can't be reached, or does not have it.
    """
    for part, key, name in named(recipe):
        if part not in parts or part in DATA or name.startswith("builtin:") or Path(name).is_absolute():
            continue
        if Path(name).exists():
            continue
        revision = revision_of(recipe, part)
        file = "adapter_config.json" if part == "adapter" else "config.json"
        cached = (try_to_load_from_cache(name, one, revision=revision) for one in (file, "tokenizer_config.json"))
        if not any(isinstance(one, str) for one in cached):
            _ask_hub(name, file, revision, recipe.where(*key))


def _ask_hub(name: str, file: str, revision: str | None, where: str) -> None:
    """One request for one small file of a repository."""
    hub = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        hint = "unset HF_HUB_OFFLINE, or download it where there is a network"
        raise DpoError(f"{name} is not in the cache, and HF_HUB_OFFLINE is set", where=where, hint=hint)
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    address = f"{hub}/{name}/resolve/{revision or 'main'}/{file}"
    try:
        status = httpx.head(address, headers=headers, timeout=SECONDS).status_code
    except httpx.HTTPError as error:
        why = "no answer" if isinstance(error, httpx.TimeoutException) else str(error) or type(error).__name__
        hint = "check the network; where the Hub is out of reach set HF_ENDPOINT to a mirror"
        raise DpoError(f"can't get {name} from {hub}: {why}", where=where, hint=hint) from None
    if status in (401, 403):
        hint = f"check the name; where it is gated, ask for access at {hub}/{name}, and run `hf auth login`"
        raise DpoError(f"{hub} has no {name}, or does not show it to you", where=where, hint=hint)
    if status == 404:
        at = f" at revision {revision}" if revision else ""
        raise DpoError(f"{hub} has no {name} with a {file}{at}", where=where, hint="check the name")


def weights_are_here(model_id: str, revision: str | None) -> bool:
    """Whether the weights are in a folder, or whole in huggingface_hub's cache."""
    if Path(location(model_id)).is_dir():
        return True

    def cached(name: str) -> Path | None:
        found = try_to_load_from_cache(model_id, name, revision=revision)
        return Path(found) if isinstance(found, str) else None

    index = cached("model.safetensors.index.json")
    if index is None:
        return cached("model.safetensors") is not None
    return all(map(cached, set(read_json(index)["weight_map"].values())))


def loading(model_id: str, revision: str | None) -> Step:
    """The step of loading a model; where it has to be downloaded first the Hub's own bars show how far that is."""
    if weights_are_here(model_id, revision):
        return Step(f"loading {model_id}")
    return Step(f"downloading and loading {model_id}", live=False)
