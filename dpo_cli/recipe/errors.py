"""Mistakes in a recipe, in words: pydantic's errors as key, line, and what to write instead."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpo_cli.errors import USAGE, DpoError, did_you_mean, either
from dpo_cli.recipe.train import (
    OF_THE_REFERENCE,
    OLD_TRAIN_ARGUMENTS,
    OWNED_TRAIN_ARGUMENTS,
    method_of,
    methods_with,
    methods_with_loss,
    train_model,
    trl_arguments,
)
from dpo_cli.recipe.yaml import Key, show_key

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


MOST_SHOWN = 20  # of a file that is something else, thousands of keys are unknown
Problem = tuple[Key, str | Callable[[], str]]  # a sentence, or what makes it where it is shown


def recipe_error(path: Path, places: dict[Key, str], problems: Sequence[Problem], code: int = USAGE) -> DpoError:
    """All problems of a recipe as one error, in the order of the file."""
    order = {key: index for index, key in enumerate(places)}

    def position(key: Key) -> int:  # of what is missing, that of the section it is missing in
        return next((order[key[:end]] for end in range(len(key), -1, -1) if key[:end] in order), -1)

    blocks: list[str] = []
    for key, problem in sorted(problems, key=lambda found: position(found[0]))[:MOST_SHOWN]:
        known = next((places[key[:end]] for end in range(len(key), 0, -1) if key[:end] in places), str(path))
        shown = show_key(key)
        shown = shown if len(shown) <= 120 else f"{shown[:117]}..."
        blocks += [f"{known}  {shown}", f"  {problem if isinstance(problem, str) else problem()}"]
    if len(problems) > MOST_SHOWN:
        blocks.append(f"and {len(problems) - MOST_SHOWN:,} more")
    count = "a mistake" if len(problems) == 1 else f"{len(problems):,} mistakes"
    return DpoError(f"the recipe has {count}", details=blocks, exit_code=code)


def problems_of(
    error: ValidationError, values: dict[str, Any], schema: dict[str, Any], places: dict[Key, str]
) -> list[Problem]:
    """Pydantic's errors by key; the branches of one union become one sentence."""
    by_key: dict[Key, list[Any]] = {}
    for item in error.errors(include_url=False):
        key = _real_key(item["loc"], item["type"], values)
        if item["type"] == "key":
            key = (*key, item["ctx"]["key"])
        if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
            key = (*key, item["ctx"]["discriminator"].strip("'"))
        by_key.setdefault(key, []).append(item)
    above = {key[:end] for key in by_key for end in range(len(key))}
    method = method_of(values.get("train"))
    found: list[Problem] = []
    for key in by_key:
        if key not in above:
            place = next((places[key[:end]] for end in range(len(key), 0, -1) if key[:end] in places), "")
            hidden = _is_secret(key) or place.endswith("=…")  # as `--set` hides a value
            found.append((key, partial(_sentence, key, by_key[key], schema, method, hidden)))
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


def _sentence(key: Key, items: list[Any], schema: dict[str, Any], method: str, hidden: bool) -> str:
    first = items[0]
    shown = "…" if hidden else _shown(first["input"])
    if key[:1] == ("train",):
        sentence = _of_another_method(key, first, method)
        if sentence:
            return sentence
    kinds = list(dict.fromkeys(_KINDS[item["type"]] for item in items if item["type"] in _KINDS))
    values = [item["ctx"]["expected"] for item in items if item["type"] == "literal_error"]
    if key == ("train", "method"):
        values = [either(list(trl_arguments()))]
    if first["type"] == "extra_forbidden":
        return _unknown_key(key, first["loc"], schema, method)
    if first["type"] == "missing":
        return f"is missing: {_description(first['loc'], schema)}"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_branch(first, schema, hidden)
    if first["type"] == "string_pattern_mismatch":
        said = "" if hidden or set("@?") & set(first["input"]) else f", not {shown}"
        return f"must be {_description(first['loc'], schema)}{said}"
    others = [item for item in items if item["type"] not in _KINDS and item["type"] != "literal_error"]
    if (kinds or values) and not others:
        options = [*kinds, *(text.replace("'", "").replace("False", "false") for text in values)]
        sentence = f"must be {' or '.join(options)}, not {shown}"
        words = [word for text in values for word in text.replace("'", "").replace(" or ", ", ").split(", ")]
        near = did_you_mean(first["input"], words) if isinstance(first["input"], str) else None
        return f"{sentence}; did you mean {near}?" if near else sentence
    first = others[0] if others else first
    message = str(first["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    return message if first["type"] in ("value_error", "key") else f"{message}, not {shown}"


def _wrong_branch(item: Any, schema: dict[str, Any], hidden: bool) -> str:
    """Of a map that is one of several kinds: the key that says which is not there, or says none of them."""
    kinds = list(_branches(_node_at(schema, item["loc"])))
    if item["type"] == "union_tag_not_found":
        return f"is missing: {' or '.join(kinds)}"
    said = item["input"][item["ctx"]["discriminator"].strip("'")]
    near = did_you_mean(str(said), kinds)
    shown = "…" if hidden else _shown(said)
    return f"must be {' or '.join(kinds)}, not {shown}" + (f"; did you mean {near}?" if near else "")


def _is_secret(key: Key) -> bool:
    """Whether people write the key of a service there, asked to or not; what stands there is never shown."""
    return str(key[-1]).startswith("api_key")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _of_another_method(key: Key, first: Any, method: str) -> str | None:
    """What to say of an argument or a loss that TRL has, but for another method; None where it is none."""
    name, given = str(key[1]) if len(key) > 1 else "", first["input"]
    if first["type"] == "extra_forbidden" and name in OF_THE_REFERENCE and not trl_arguments()[method]["reference"]:
        return f"is not for {method}, which has no reference: remove it"
    if first["type"] == "extra_forbidden" and name not in OWNED_TRAIN_ARGUMENTS and methods_with(name):
        null = ", or set it to null" if name == "loss_type" else ""
        return f"belongs to train.method {either(methods_with(name))}, not to {method}: remove it{null}"
    if first["type"] == "literal_error" and name == "loss_type" and isinstance(given, str):
        others = methods_with_loss(given)
        own = trl_arguments()[method]["losses"]
        if others and given not in own:
            return (
                f"{given} is a loss of train.method {either(others)}, not of {method}: "
                f"set train.loss_type: null for {method}'s own, or train.method: {others[0]}"
            )
    return None


def _unknown_key(key: Key, loc: Key, schema: dict[str, Any], method: str) -> str:
    """Key as in the file, and as pydantic has it, with the branch of a union that was taken."""
    name = str(key[-1])
    if key[0] == "train" and name in OWNED_TRAIN_ARGUMENTS:
        return f"is not set here: {OWNED_TRAIN_ARGUMENTS[name]}"
    if key[0] == "train" and name in OLD_TRAIN_ARGUMENTS:
        return f"is not one of TRL's arguments: {OLD_TRAIN_ARGUMENTS[name]}"
    siblings = list(train_model(method).model_fields) if key[:-1] == ("train",) else fields_at(loc[:-1], schema)
    near = did_you_mean(name, siblings)
    if near:
        return f"unknown key; did you mean {near}?"
    elsewhere = [f"{part}.{name}" for part in schema["properties"] if name in fields_at((part,), schema)]
    if elsewhere:
        return f"unknown key here; did you mean {elsewhere[0]}?"
    if len(siblings) <= 20:
        return f"unknown key; known here: {', '.join(siblings)}"
    return "unknown key; `dpo-cli schema` lists them all"


def fields_at(key: Key, schema: dict[str, Any]) -> list[str]:
    """The names that may stand below `key`."""
    return list(_node_at(schema, key).get("properties", {}))


def _description(key: Key, schema: dict[str, Any]) -> str:
    return str(_node_at(schema, key).get("description", "a recipe needs it")).splitlines()[0]


def _node_at(schema: dict[str, Any], key: Key) -> dict[str, Any]:
    """The part of a JSON schema that describes `key`, its references followed.

    `key` may be pydantic's `loc`: a branch of a union in it is followed where a key tells the branches apart, and is
    passed over elsewhere.
    """

    def followed(node: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in node:
            return {**schema["$defs"][node["$ref"].rsplit("/", 1)[1]], **{k: v for k, v in node.items() if k != "$ref"}}
        maps = [followed(option) for option in node.get("anyOf", []) if "$ref" in option]
        return {**maps[0], **node} if maps else node

    node = followed(schema)
    for part in key:
        inner = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        inner = inner or _branches(node).get(str(part))
        if inner:
            node = followed(inner)
    return node


def _branches(node: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The branches of a union that a key tells apart, by what the key says; none of anything else."""
    unions = [option["discriminator"] for option in (node, *node.get("anyOf", [])) if "discriminator" in option]
    return {kind: {"$ref": ref} for union in unions for kind, ref in union["mapping"].items()}
