"""The recipe: read by `load`, checked whole, and frozen; stages get the result. Nothing here imports torch or TRL."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PrivateAttr, ValidationError, create_model, field_validator

from dpo_cli.errors import SECRET
from dpo_cli.families import with_targets
from dpo_cli.recipe.conflicts import conflicts
from dpo_cli.recipe.errors import problems_of, recipe_error
from dpo_cli.recipe.model_rules import against_model, quantised_base
from dpo_cli.recipe.paths import PARTS, config_of, missing
from dpo_cli.recipe.raters import OpenAIJudge, OpenAIRater, RewardModelJudge, RewardModelRater, Sample, Server
from dpo_cli.recipe.rules import problems, remarks
from dpo_cli.recipe.sections import (
    MEMORY_SIZE,
    METRICS,
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
    train_model,
    train_schema,
    trl_arguments,
)
from dpo_cli.recipe.yaml import Key, dump_yaml, read_recipe, show_key

__all__ = [
    "HELD_OUT", "MEMORY_SIZE", "METRICS", "Contaminated", "Eval", "GgufType",
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
    _written_as: Key | None = PrivateAttr(None)  # where data.sources[0] stands in the recipe, if elsewhere

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        odd = sorted(set(name) & set('/\\:*?"<>|,=')) or [repr(one)[1:-1] for one in name if not one.isprintable()]
        if not name.strip() or name.startswith(".") or odd or len(name.encode("utf-8", "replace")) > 200:
            why = f"without {' '.join(odd)}" if odd else "not empty, not too long, and without a dot in front"
            raise ValueError(f"must be usable as the name of a folder and in commands: {why}; name: sets it")
        return name

    @property
    def keeps_best(self) -> bool:
        """Whether figures on held-out rows choose which checkpoint becomes the adapter."""
        return bool(self.engine.early_stopping or self.train.load_best_model_at_end)

    def of_test_set(self, index: int, filters: Any) -> Recipe:
        """The recipe as if one of `eval.sets` were its only source of data, and what errors say of it still true."""
        source = Source(**self.eval.sets[index].model_dump())
        data = Data(sources=[source], filters=filters, score_weights=self.data.score_weights)
        found = self.model_copy(update={"data": data})
        found._written_as = ("eval", "sets", index)
        return found

    def where(self, *key: str | int) -> str:
        """`recipes/x.yaml:12  data.sources[0].id`, or the key alone where nobody set it."""
        if self._written_as and key[:2] == ("data", "sources"):
            key = (*self._written_as, *key[3:])
        written = key
        while written and written not in self._places and (isinstance(written[-1], int) or written[-1] == "id"):
            written = written[:-1]  # of a list of one that stands there as a word
        place = self._places.get(written)
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
    if isinstance(data, dict):
        data.setdefault("format", trl_arguments()[method]["data"][0])
    model = _recipe_model(method)
    try:
        recipe = model.model_validate(document.values)
    except ValidationError as error:
        problem = problems_of(error, document.values, model, document.places)
        raise recipe_error(path, document.places, problem) from None
    recipe._places.update(document.places)
    found = [*conflicts(recipe), *problems(recipe)]
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


def dump(recipe: Recipe, allow_unicode: bool = True) -> str:
    """The recipe as YAML, every default explicit; loads again to an equal recipe, without Unicode by its escapes."""
    return dump_yaml(recipe.model_dump(mode="json"), allow_unicode)


@cache
def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for an editor's completion and checks."""
    schema = Recipe.model_json_schema()
    schema["$defs"]["Train"] = train_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "dpo-cli recipe"}
