"""Pydantic's errors in words: key, line, and what to write instead."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dpo_cli.errors import USAGE, DpoError, did_you_mean, either, with_nearest
from dpo_cli.recipe.foreign import OLD_TRAIN_ARGUMENTS, OWNED_TRAIN_ARGUMENTS, ours, program
from dpo_cli.recipe.slips import number_meant
from dpo_cli.recipe.train import methods_with, trl_arguments
from dpo_cli.recipe.yaml import SETTING, TELLING, Key, show_key

_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a map",
    "model_type": "a map",
    "model_attributes_type": "a map",  # of a union whose branches a key tells apart
    "none_required": "null",
}
ONLINE = ("ppo", "grpo", "rloo", "online_dpo", "xpo", "nash-md", "reward", "rm")  # methods of other programs
MOST_SHOWN = 20  # of a file that is something else, thousands of keys are unknown
NOTHING = "nothing here does that: remove it"  # of another program's key
Problem = tuple[Key, str | Callable[[], str]]  # a sentence, or what makes it where it is shown


def recipe_error(path: Path, places: dict[Key, str], problems: Sequence[Problem]) -> DpoError:
    """All problems of a recipe as one error, in the order of the file."""
    order = {key: index for index, key in enumerate(places)}
    whose = _program(places)
    blocks = [f"it looks like a recipe of {whose}; this is what its keys are called here"] if whose else []
    most, without = len(problems) if whose else MOST_SHOWN, list[str]()
    for key, problem in sorted(problems, key=lambda found: order.get(_written(found[0], places), -1))[:most]:
        place, shown = places.get(_written(key, places), str(path)), show_key(key)
        shown = shown if len(shown) <= 120 else f"{shown[:117]}..."
        sentence = problem if isinstance(problem, str) else problem()
        if sentence == NOTHING:
            without.append(shown)
        else:
            blocks += [f"{place}  {shown} -> {sentence}"] if whose else [f"{place}  {shown}", f"  {sentence}"]
    if without:
        blocks.append(f"nothing here does what these do, so remove them: {', '.join(without)}")
    if len(problems) > most:
        blocks.append(f"and {len(problems) - most:,} more")
    count = "an error" if len(problems) == 1 else f"{len(problems):,} errors"
    hint = "dpo-cli init writes a recipe to start from" if whose else None
    return DpoError(f"the recipe has {count}", details=blocks, hint=hint, exit_code=USAGE)


def _program(places: dict[Key, str]) -> str | None:
    return program([str(key[0]) for key in places if len(key) == 1])


def _written(key: Key, places: dict[Key, str]) -> Key:
    """The key, or where it is not set the nearest section above it that is."""
    return next((key[:end] for end in range(len(key), 0, -1) if key[:end] in places), key)


def problems_of(
    error: ValidationError, values: dict[str, Any], model: type[BaseModel], places: dict[Key, str]
) -> list[Problem]:
    """Pydantic's errors by key; the branches of one union become one sentence."""
    by_key: dict[Key, list[Any]] = {}
    for item in error.errors(include_url=False):
        key, context = _real_key(item["loc"], item["type"], values), item.get("ctx", {})
        if "discriminator" in context:
            key = (*key, context["discriminator"].strip("'"))
        by_key.setdefault(key, []).append(item)
    above = {key[:end] for key in by_key for end in range(len(key))}
    # What is there under another program's name is not missing.
    names = [(key, ours(key) or "") for key in by_key]
    named = [tuple(name.split(".")) if "." in name else (*key[:-1], name) for key, name in names if name]
    found: list[Problem] = []
    foreign = _program(places) is not None
    for key, items in by_key.items():
        elsewhere = items[0]["type"] == "missing" and any(one[: len(key)] == key for one in named)
        if key not in above and not elsewhere:
            # People write the key of a service there, asked to or not.
            set_there = places.get(_written(key, places)) == SETTING and TELLING.search(show_key(key))
            hidden = bool(set_there) or str(key[-1]).startswith("api_key")
            found.append((key, partial(_sentence, key, items, model, hidden, foreign)))
    return found


def _real_key(loc: tuple[str | int, ...], kind: str, values: Any) -> Key:
    """`loc` without the parts that pydantic adds for the branches of a union and that stand in no file."""
    key: list[str | int] = []
    for index, part in enumerate(loc):
        inside = isinstance(values, dict) and part in values
        if inside or (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            key.append(part)
            values = values[part]
        elif index == len(loc) - 1 and kind in ("missing", "extra_forbidden"):
            key.append(part)
    return tuple(key)


def _sentence(key: Key, items: list[Any], model: type[BaseModel], hidden: bool, foreign: bool) -> str:
    first = items[0]
    loc, kind, shown = first["loc"], first["type"], _shown(first["input"], hidden)
    other = _of_another_method(key, first, model) if key[:1] == ("train",) else None
    if other:
        return other
    if kind == "extra_forbidden":
        return _unknown_key(key, loc, model, foreign)
    if kind == "missing":
        return f"is missing: {_description(model, loc)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_branch(first, model, hidden)
    if kind == "string_pattern_mismatch":  # without what was written, which may be the key of a service
        return f"must be {_description(model, loc)}"
    if first["input"] is None and kind.startswith("model_") and len(key) == 1:
        return "must be a map, not null: indent the lines that belong to it, or remove the key"
    others = [item for item in items if item["type"] not in _KINDS and item["type"] != "literal_error"]
    if not others:
        wants_map = not hidden and any(_KINDS.get(item["type"]) == "a map" for item in items)
        instead = _instead(str(key[-1]), first["input"], shown, *_at(model, loc)) if wants_map else ""
        number = None if hidden or wants_map else number_meant(first["input"])
        return _wrong_kind(key, items, shown) + instead + (f": write {number}" if number else "")
    message = str(others[0]["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    return message if others[0]["type"] in ("value_error",) else f"{message}, not {shown}"


def _instead(name: str, given: Any, shown: str, sections: list[type[BaseModel]], field: FieldInfo | None) -> str:
    """`: write …`, or what belongs there, for a value in the place of a map."""
    glued = re.match(r"([A-Za-z_]\w*)\s*[:=：]\s*(.*)", given) if isinstance(given, str) else None
    if glued and any(glued[1] in section.model_fields for section in sections):
        return f": write {glued[1]}: {glued[2][:60]}, with a space behind the colon"
    if field and field.description:
        return f": {field.description}"
    if not sections:
        return ""
    fields = sections[0].model_fields
    first = next((key for key in fields if fields[key].is_required()), next(iter(fields)))
    return f": write {name}: {{{first}: {shown}}}"


def _wrong_kind(key: Key, items: list[Any], shown: str) -> str:
    """Of a value that is none of the kinds and words that a key takes."""
    kinds = list(dict.fromkeys(_KINDS[item["type"]] for item in items if item["type"] in _KINDS))
    words = [item["ctx"]["expected"] for item in items if item["type"] == "literal_error"]
    if key == ("train", "method"):
        words = [either(list(trl_arguments()))]
        if losses := methods_with("losses", items[0]["input"]):
            return f"{items[0]['input']} is a loss: write method: {losses[0]} and loss_type: {items[0]['input']}"
        if items[0]["input"] in ONLINE:
            return f"must be {words[0]}: {shown} learns from a reward while it samples, which dpo-cli does not do"
    words = [text.replace("'", "").replace("False", "false") for text in words]
    known = [word for text in words for word in text.replace(" or ", ", ").split(", ")]
    return _must_be(" or ".join([*kinds, *words]), items[0]["input"], shown, known)


def _must_be(wanted: str, given: Any, shown: str, known: list[str]) -> str:
    return with_nearest(f"must be {wanted}, not {shown}", given if isinstance(given, str) else "", known)


def _wrong_branch(item: Any, model: type[BaseModel], hidden: bool) -> str:
    """Of a map that is one of several kinds: the key that says which is not there, or says none of them."""
    kinds = [get_args(one.model_fields["kind"].annotation)[0] for one in _at(model, item["loc"])[0]]
    if item["type"] == "union_tag_not_found":
        return f"is missing: {either(kinds)}"
    given = item["input"][item["ctx"]["discriminator"].strip("'")]
    return _must_be(either(kinds), str(given), _shown(given, hidden), kinds)


def _shown(value: Any, hidden: bool) -> str:
    text = "…" if hidden else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _of_another_method(key: Key, first: Any, model: type[BaseModel]) -> str | None:
    """What to say of an argument or a loss that TRL has, but for another method; None where it is none."""
    method = str(_at(model, ("train",))[0][0].model_fields["method"].default)
    name, given = str(key[1]) if len(key) > 1 else "", first["input"]
    if first["type"] == "extra_forbidden":
        if name not in OWNED_TRAIN_ARGUMENTS and (others := methods_with("arguments", name)):
            null = ", or set it to null" if name == "loss_type" else ""
            return f"belongs to train.method {either(others)}, not to {method}: remove it{null}"
    elif first["type"] == "literal_error" and name == "loss_type":
        others = methods_with("losses", given)
        if others and method not in others:
            fix = f"set train.loss_type: null for {method}'s own, or train.method: {others[0]}"
            return f"{given} is a loss of train.method {either(others)}, not of {method}: {fix}"
    return None


def _unknown_key(key: Key, loc: Key, model: type[BaseModel], foreign: bool) -> str:
    """Key as in the file, and as pydantic has it, with the branch of a union that was taken."""
    name = str(key[-1])
    if key[0] == "train" and name in OWNED_TRAIN_ARGUMENTS:
        return f"is not set here: {OWNED_TRAIN_ARGUMENTS[name]}"
    if key[0] == "train" and name in OLD_TRAIN_ARGUMENTS:
        return f"is not one of TRL's arguments: {OLD_TRAIN_ARGUMENTS[name]}"
    known = ours(key)
    if not known and len(key) == 1:
        known = OWNED_TRAIN_ARGUMENTS.get(name) or OLD_TRAIN_ARGUMENTS.get(name)
    elsewhere = [f"{part}.{name}" for part in model.model_fields if name in fields_at(model, (part,))]
    elsewhere += [f"train.{name}"] if methods_with("arguments", name) else []
    if foreign and len(key) == 1:
        return known or next(iter(elsewhere), NOTHING)
    if known:
        return f"unknown key; {known}" if " " in known else f"unknown key; it is called {known} here"
    if elsewhere:
        return f"unknown key here; did you mean {elsewhere[0]}?"
    siblings = fields_at(model, loc[:-1])
    near = did_you_mean(name, siblings)
    if near:
        return f"unknown key; did you mean {near}?"
    if len(siblings) <= 20:
        return f"unknown key; known here: {', '.join(siblings)}"
    return "unknown key; `dpo-cli schema` lists them all"


def fields_at(model: type[BaseModel], key: Key) -> list[str]:
    """The names that may stand below `key`."""
    return [name for one in _at(model, key)[0] for name in one.model_fields]


def _description(model: type[BaseModel], key: Key) -> str:
    field = _at(model, key)[1]
    return (field and field.description) or "a recipe needs it"


def _at(model: type[BaseModel], loc: Key) -> tuple[list[type[BaseModel]], FieldInfo | None]:
    """The sections that may stand at pydantic's `loc`, and the field there; a branch of a union in it is followed."""
    models, field = [model], None
    for part in loc:
        named = [one for one in models if part in one.model_fields]
        if named:
            field = named[0].model_fields[str(part)]
            models = _sections(field.annotation)
        else:
            kinds = [(one, one.model_fields.get("kind")) for one in models]
            models = [one for one, kind in kinds if kind and part in get_args(kind.annotation)] or models
    return models, field


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The models in a type such as `list[Source]` or `Judge | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for inner in get_args(annotation) for one in _sections(inner)]
