"""The README says what is so: its recipe reference is the schema's, its commands exist, its tree is the tree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dpo_cli.recipe import FILTER_OPTIONS, OFF_BY_DEFAULT, Recipe, Source
from dpo_cli.recipe.train import OUR_TRAIN_DEFAULTS, Section, trl_arguments

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def yaml_value(value: Any) -> str:
    """A default as one writes it in a recipe."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(yaml_value, value)) + "]"
    return str(value) if isinstance(value, str) else json.dumps(value)


def reference(model: type[Section] = Recipe, prefix: str = "") -> list[str]:
    """The rows that the README's table has to have, in the order of the schema."""
    rows = []
    for name, field in model.model_fields.items():
        key, kind = prefix + name, field.annotation
        if key == "data.filters":
            continue  # a table of its own
        if key == "train":
            rows.append("| `train` | TRL's | any argument of the method's TRL config, by TRL's name |")
        elif isinstance(kind, type) and issubclass(kind, Section):
            rows += reference(kind, f"{key}.")
        else:
            default = "required" if field.is_required() else f"`{yaml_value(field.default)}`"
            default = "the file's stem" if key == "name" else default
            rows.append(f"| `{key}` | {default} | {field.description} |")
        if key == "data.sources":
            rows += reference(Source, "data.sources[].")
    return rows


def filter_defaults() -> dict[str, str]:
    defaults = {}
    for reason, options in FILTER_OPTIONS.items():
        tuned = {name: field.default for name, field in options.model_fields.items()}
        defaults[reason] = "`false`" if reason in OFF_BY_DEFAULT else f"`{yaml_value(tuned or True)}`"
    return defaults


def test_the_recipe_reference_is_the_schema() -> None:
    rows = [line for line in README.splitlines() if re.match(r"\| `(name|extends|seed|model|lora|data\.(?!filters\.)|"
                                                             r"train`|engine|eval|export)", line)]  # fmt: skip
    assert rows == reference()


def test_the_filters_are_those_of_the_schema_with_their_defaults() -> None:
    rows = dict(re.findall(r"^\| `data\.filters\.(\w+)` \| (`[^|]*`) \|", README, re.MULTILINE))
    assert rows == filter_defaults()


def test_our_train_defaults_are_named() -> None:
    for name, value in OUR_TRAIN_DEFAULTS.items():
        assert f"`{name}: {yaml_value(value)}`" in README, name


def test_the_methods_are_those_that_check_knows() -> None:
    """Each with TRL's config, the data it learns from, whether it has a reference, its losses and its own defaults."""
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| ([\w, ]+) \| (yes|none) \| ([^|]*) \| ([^|]*) \|$", README, re.MULTILINE
    )
    expected = [
        (
            method,
            one["config"],
            ", ".join(one["data"]),
            "yes" if one["reference"] else "none",
            " ".join(one["losses"]) or "its own",
            ", ".join(f"`{name}: {yaml_value(value)}`" for name, value in one["defaults"].items()) or "–",
        )
        for method, one in trl_arguments().items()
    ]
    assert rows == expected


def test_the_tree_names_every_module_and_only_those() -> None:
    tree = README.split("```\ndpo_cli/")[1].split("```")[0]
    named = set(re.findall(r"\b(\w+\.(?:py|json|jinja))\b", tree.replace(".html.jinja", "_html.jinja")))
    there = {path.name.replace(".html.", "_html.") for path in (REPOSITORY / "dpo_cli").rglob("*")}
    there = {name for name in there if name.endswith((".py", ".json", ".jinja")) and not name.startswith("__")}
    assert named == there


def test_every_command_and_recipe_that_is_mentioned_exists() -> None:
    from dpo_cli.cli import app
    from typer.main import get_command

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"dpo-cli ([a-z]+)\b", README)) <= known
    for path in re.findall(r"recipes/[\w/]+\.yaml", README):
        assert (REPOSITORY / path).is_file() or path == "recipes/mine.yaml", path
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
