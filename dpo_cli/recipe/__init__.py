"""The recipe: read by `load`, checked whole, and frozen; stages get the result. Nothing here imports torch or TRL."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PrivateAttr, ValidationError, create_model, field_validator

from dpo_cli.errors import SECRET, either
from dpo_cli.families import with_targets
from dpo_cli.recipe.errors import problems_of, recipe_error
from dpo_cli.recipe.model_rules import against_model, quantised_base
from dpo_cli.recipe.paths import PARTS, config_of, missing
from dpo_cli.recipe.raters import OpenAIJudge, OpenAIRater, RewardModelJudge, RewardModelRater, Sample, Server
from dpo_cli.recipe.rules import problems, remarks
from dpo_cli.recipe.sections import (
    FILTER_OPTIONS,
    MEMORY_SIZE,
    METRICS,
    OFF_BY_DEFAULT,
    Contaminated,
    Data,
    Engine,
    Eval,
    Export,
    GgufType,
    Lora,
    Model,
    NearDuplicate,
    PairPolicy,
    ScoreWeights,
    Source,
)
from dpo_cli.recipe.train import (
    DEFAULT_METHOD,
    HELD_OUT,
    Section,
    method_of,
    methods_with_data,
    not_logged,
    train_model,
    train_schema,
    trl_arguments,
)
from dpo_cli.recipe.yaml import Key, dump_yaml, read_recipe, show_key

__all__ = [
    "FILTER_OPTIONS", "HELD_OUT", "MEMORY_SIZE", "METRICS", "OFF_BY_DEFAULT", "Contaminated", "Eval", "GgufType",
    "Lora", "NearDuplicate", "OpenAIJudge", "OpenAIRater", "PairPolicy", "Recipe", "RewardModelJudge",
    "RewardModelRater", "Sample", "ScoreWeights", "Server", "Source", "check", "dump", "json_schema", "load",
]  # fmt: skip


if TYPE_CHECKING:
    Train = Any
else:
    Train = train_model(DEFAULT_METHOD)  # of other methods: `_recipe_model`


class Recipe(Section):
    """A whole recipe, checked; see `recipes/` for written ones."""

    name: str = Field("", description="the run lives in runs/<name>/; default: the file's stem")
    extends: str | None = Field(None, description="path of a recipe to start from")
    seed: int = Field(42, ge=0, lt=2**32, description="of sampling, LoRA's init, data order and generation")
    model: Model
    lora: Lora = Lora()
    data: Data
    train: Train = Field(default_factory=lambda: train_model(DEFAULT_METHOD)())
    engine: Engine = Engine()
    eval: Eval = Eval()
    export: Export = Export()
    _places: dict[Key, str] = PrivateAttr(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        odd = sorted(set(name) & set('/\\:*?"<>|,=')) or [repr(one)[1:-1] for one in name if not one.isprintable()]
        if not name.strip() or name.startswith(".") or odd or len(name.encode("utf-8", "replace")) > 200:
            why = f"without {' '.join(odd)}" if odd else "not empty, not too long, and without a dot in front"
            raise ValueError(f"must be usable as the name of a folder and in commands: {why}; name: sets it")
        return name

    def where(self, *key: str | int) -> str:
        """`recipes/x.yaml:12  data.sources[0].id`, or the key alone where nobody set it."""
        place = self._places.get(key)
        return f"{place}  {show_key(key)}" if place else show_key(key)


@cache
def _recipe_model(method: str) -> type[Recipe]:
    """The recipe with the `train` section of one method."""
    if method == DEFAULT_METHOD:
        return Recipe
    train = train_model(method)
    fields: dict[str, Any] = {"train": (train, Field(default_factory=train))}
    return create_model("Recipe", __base__=Recipe, __module__=__name__, **fields)


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        path: the recipe file.
        overrides: `KEY=VALUE` settings that win over the file (`--set`).

    Raises:
        DpoError: (exit code 2) with every error found, each with its line and what to write instead.
    """
    document = read_recipe(path, overrides or [])
    if document.values.get("name") is None:
        document.values["name"] = path.stem
    secrets = _secrets(document.values)
    if secrets:
        raise recipe_error(path, document.places, secrets)
    method, data = method_of(document.values.get("train")), document.values.get("data")
    learns = trl_arguments()[method]["data"]
    if isinstance(data, dict) and "format" not in data and "pairs" not in learns:
        data["format"] = learns[0]
    model = _recipe_model(method)
    try:
        recipe = model.model_validate(document.values)
    except ValidationError as error:
        problem = problems_of(error, document.values, model, document.places)
        raise recipe_error(path, document.places, problem) from None
    recipe._places.update(document.places)
    found = [*_conflicts_in_training(recipe), *_conflicts_in_export(recipe), *problems(recipe)]
    if found:
        raise recipe_error(path, document.places, found)
    return with_targets(recipe, config_of(recipe.model.id, recipe.model.revision))


def _secrets(values: Any, key: Key = ()) -> list[tuple[Key, str]]:
    """Texts in a recipe, as written, that look like the key of a service."""
    if isinstance(values, dict):
        return [found for name, value in values.items() for found in _secrets(value, (*key, name))]
    if isinstance(values, list):
        return [found for index, value in enumerate(values) for found in _secrets(value, (*key, index))]
    if not (isinstance(values, str) and any(re.search("[A-Z0-9]", one) for one in SECRET.findall(values))):
        return []
    return [(key, "holds what looks like the key of a service: keep keys in environment variables, out of recipes")]


def check(recipe: Recipe, path: Path) -> list[str]:
    """Look at what a recipe names outside of itself, without a network.

    Returns:
        Remarks on settings that have no effect, each with its line.

    Raises:
        DpoError: (exit code 2) a file or folder is not there, or is something else than it should be, or a local
            model can't do what the recipe asks of it.
    """
    local = config_of(recipe.model.id, recipe.model.revision)
    found = missing(recipe, PARTS) + against_model(recipe, local) + quantised_base(recipe, local)
    if found:
        raise recipe_error(path, recipe._places, found)
    return [f"{recipe.where(*key)} {sentence}" for key, sentence in remarks(recipe)]


def _conflicts_in_training(recipe: Recipe) -> list[tuple[Key, str]]:
    """Settings of `engine` and `train` that can't both be meant."""
    train = recipe.train
    found = _against_the_method(recipe)
    if recipe.engine.early_stopping is None:
        return found
    if train.eval_strategy == "no":
        found.append((("engine", "early_stopping"), "needs evaluations: set train.eval_strategy: steps, or epoch"))

    def differs(name: str) -> bool:  # not `model_fields_set`: a resolved recipe sets every key
        return bool(getattr(train, name) != type(train).model_fields[name].default)

    for name in ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"):
        if differs(name):
            found.append((("train", name), "is set by engine.early_stopping; remove it"))
    for name in ("save_strategy", "save_steps"):
        if differs(name) and getattr(train, name) != getattr(train, name.replace("save", "eval")):
            found.append((("train", name), "with engine.early_stopping each evaluation is saved; remove it"))
    return found


def _against_the_method(recipe: Recipe) -> list[tuple[Key, str]]:
    """Settings of other sections that `train.method` can't do with."""
    method, engine = recipe.train.method, recipe.engine
    described = trl_arguments()[method]
    found: list[tuple[Key, str]] = []
    given, wanted = recipe.data.format, described["data"]
    if given not in wanted:
        others = methods_with_data(given)
        instead = f", or train.method: {either(others)}" if others else ""
        sentence = f"{method} learns from {either(wanted)}, not from {given}: set data.format: {wanted[0]}{instead}"
        found.append((("data", "format") if ("data", "format") in recipe._places else ("train", "method"), sentence))
    if recipe.lora.bias != "none" and described["reference"]:
        sentence = "can't be trained: TRL keeps a second adapter for the reference, and PEFT lets one alone have biases"
        found.append((("lora", "bias"), f"{sentence}; set lora.bias: none"))
    insisted = {
        "shared_prefix": engine.shared_prefix == "on",
        "token_budget": isinstance(engine.token_budget, int),
        "reference_cache": engine.reference_cache == "on",
    }
    for part, asked in insisted.items():
        if asked and part not in described["engine"]:
            why = f"it is made for train.method dpo, not for {method}"
            if part == "reference_cache" and not described["reference"]:
                why = f"{method} has no reference"
            found.append((("engine", part), f"{why}: set engine.{part}: auto"))
    stopping = engine.early_stopping
    unlogged = not_logged(method, stopping.metric) if stopping else None
    if unlogged:
        found.append((("engine", "early_stopping", "metric"), unlogged))
    return found


def _conflicts_in_export(recipe: Recipe) -> list[tuple[Key, str]]:
    """A push without a repository, a repository without a push, a push of nothing."""
    wanted, found = recipe.export, list[tuple[Key, str]]()
    if "hub" in wanted.formats and not wanted.hub:
        found.append((("export", "formats"), "names hub: set export.hub: user/name to say where to"))
    if wanted.hub and "hub" not in wanted.formats:
        found.append((("export", "hub"), "does nothing unless export.formats names hub too"))
    if wanted.formats == ["hub"]:
        found.append((("export", "formats"), "has nothing to push; add adapter, merged, gguf or ollama"))
    return found


def dump(recipe: Recipe, allow_unicode: bool = True) -> str:
    """The recipe as YAML, every default explicit; loads again to an equal recipe, without Unicode by its escapes."""
    return dump_yaml(recipe.model_dump(mode="json"), allow_unicode)


@cache
def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for an editor's completion and checks."""
    schema = Recipe.model_json_schema()
    schema["$defs"]["Train"] = train_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "dpo-cli recipe"}
