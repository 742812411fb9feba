"""What a recipe names outside of itself: local files and folders, and Hub ids. Looked at before any work; no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from dpo_cli.errors import FAILED, DpoError, nearest
from dpo_cli.recipe.yaml import Key, short

Recipe = Any  # dpo_cli.recipe's, which imports this module
Part = Literal["model", "adapter", "merge_base", "judge", "rater", "data", "sets"]
PARTS: tuple[Part, ...] = ("model", "adapter", "merge_base", "judge", "rater", "data", "sets")
DATA = ("data", "sets")  # parts that are files of rows, and no models
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def hub_id_problem(name: str) -> str | None:
    """Why a name can't be one on the Hub, by the Hub's own rule; None where it can."""
    if name.count("/") > 1 or not re.fullmatch(r"(\b[\w\-.]{1,96}\b/)?\b[\w\-.]{1,96}\b", name, re.ASCII):
        return "is no name of a Hub repository (letters, digits, - _ . and one /)"
    if "--" in name or ".." in name or name.endswith(".git"):
        return "is no name of a Hub repository, which has no -- or .. and no .git at its end"
    return None


def missing(recipe: Recipe, parts: Iterable[Part] = PARTS) -> list[tuple[Key, str]]:
    """What a recipe names and is not there, or is something else than it should be; each with what to write instead.

    Args:
        recipe: as loaded, its local paths absolute.
        parts: what to look at.
    """
    wanted, found = set(parts), list[tuple[Key, str]]()
    for part, key, name in named(recipe):
        if part not in wanted or name.startswith("builtin:"):
            continue
        path = Path(name)
        if path.exists():
            problem = _not_of_its_kind(recipe, part, path)
        elif path.is_absolute():  # the loader makes all that is written as a path absolute
            kind = f"file or folder {path}" if part in DATA else f"folder {_as_typed(path)}"
            problem = f"no {kind}{_near(path)}"
        else:
            problem = hub_id_problem(name)
            problem = problem and f"there is no {name}{_near(path)}, and it {problem}"
        if problem:
            found.append((key, problem))
    return found


def named(recipe: Recipe) -> Iterator[tuple[Part, Key, str]]:
    """Everything that a recipe names outside of itself, and where."""
    model, judge, rater = recipe.model, recipe.eval.judge, recipe.data.rater
    yield "model", ("model", "id"), model.id
    if model.adapter:
        yield "adapter", ("model", "adapter"), model.adapter
    if model.merge_base:
        yield "merge_base", ("model", "merge_base"), model.merge_base
    if judge is not None and judge.kind == "reward_model":
        yield "judge", ("eval", "judge", "id"), judge.id
    if rater is not None and rater.kind == "reward_model":
        yield "rater", ("data", "rater", "id"), rater.id
    for index, source in enumerate(recipe.data.sources):
        yield "data", ("data", "sources", index, "id"), source.id
    for index, one in enumerate(recipe.eval.sets):
        yield "sets", ("eval", "sets", index, "id"), one.id
    for index, name in enumerate(recipe.data.contamination):
        if Path(name).is_absolute():
            yield "data", ("data", "contamination", index), name


def revision_of(recipe: Recipe, part: Part) -> str | None:
    """The branch, tag or commit that the recipe names of a part; of `merge_base` where it is the model itself."""
    model = recipe.model
    revisions = {
        "model": model.revision,
        "adapter": model.adapter_revision,
        "merge_base": model.revision if model.merge_base in (None, model.id) else None,
        "judge": getattr(recipe.eval.judge, "revision", None),
        "rater": getattr(recipe.data.rater, "revision", None),
    }
    return revisions.get(part)


def _not_of_its_kind(recipe: Recipe, part: Part, path: Path) -> str | None:
    """What is wrong with a file or folder that is there."""
    if part in DATA:
        return None if os.access(path, os.R_OK) else f"{_as_typed(path)} may not be read"
    if not path.is_dir():
        return f"{_as_typed(path)} is a file; name the folder that holds it"
    has = {one.name for one in path.iterdir()}
    if part == "adapter":
        lacks = [name for name in ("adapter_config.json", "adapter_model.safetensors") if name not in has]
        hint = "a merged model goes into model.id" if "config.json" in has else "name the folder of save_pretrained"
        return f"is no LoRA adapter: {_as_typed(path)} has no {lacks[0]}; {hint}" if lacks else None
    if "config.json" not in has and "adapter_config.json" in has:
        base = json_in(path, "adapter_config.json").get("base_model_name_or_path")
        other = "model.id" if part == "model" else f"model.{part}"
        instead = f" and {other}: {base}" if base else f", and {other} to its base"
        return f"{_as_typed(path)} is a LoRA adapter, not a model: set model.adapter to it{instead}"
    if "config.json" not in has:
        return f"{_as_typed(path)} is no model: it has no config.json"
    if part == "model" and not has & set(TOKENIZER_FILES):
        return f"{_as_typed(path)} has no tokenizer.json: save the tokenizer into it"
    if part == "model" and "tokenizer.json" not in has and {"gguf", "ollama"} & set(recipe.export.formats):
        return f"{_as_typed(path)} has no tokenizer.json, which GGUF needs: AutoTokenizer's save_pretrained writes it"
    return None


def json_in(folder: Path | str, name: str) -> dict[str, Any]:
    """A JSON file of a local folder; {} where there is none that can be read."""
    try:
        found = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def config_of(name: str, revision: str | None) -> dict[str, Any]:
    """A model's `config.json`, of a local folder or of the Hub's cache; {} where neither has it."""
    if name.startswith("builtin:"):
        return {"model_type": "qwen3"}
    if Path(name).is_absolute():
        return json_in(name, "config.json")
    cached = cached_config(name, revision)
    return json_in(cached.parent, cached.name) if cached else {}


def cached_config(name: str, revision: str | None) -> Path | None:
    """Find a hub id's `config.json` in huggingface_hub's cache, whose own code takes longer to import than to run."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    folder, branch = cache / f"models--{name.replace('/', '--')}", revision or "main"
    try:
        commit = (folder / "refs" / branch).read_text(encoding="utf-8").strip()
    except OSError:  # no such branch: a commit, or nothing
        commit = branch
    path = folder / "snapshots" / commit / "config.json"
    return path if path.is_file() else None


def _as_typed(path: Path) -> str:
    """The path from here, `./…`; absolute where it is elsewhere."""
    typed = short(path)
    return typed if Path(typed).is_absolute() else f"./{typed}"


def _near(path: Path) -> str:
    """`; did you mean …?`, of what lies where the path leads."""
    there = path
    while not there.parent.is_dir():
        there = there.parent
    try:
        names = sorted(one.name for one in there.parent.iterdir())[:1000]
    except OSError:
        return ""
    near = nearest(there.name, names, 1) or nearest(there.name, [Path(one).stem for one in names], 1)
    match = next((one for one in names if near and near[0] in (one, Path(one).stem)), None)
    return f"; did you mean {_as_typed(there.parent / match)}?" if match else ""


def require(recipe: Recipe, parts: Iterable[Part]) -> None:
    """Raise what is `missing`, all of it at once, each with its line.

    Raises:
        DpoError: something that the recipe names is not there.
    """
    found = missing(recipe, parts)
    if found:
        lines = [line for key, problem in found for line in (recipe.where(*key), f"  {problem}")]
        hint = "check the path; it is relative to the recipe that names it"
        raise DpoError("the recipe names what is not there", details=lines, hint=hint, exit_code=FAILED)
