"""`python -m tests.tools.recipe_reference` writes recipes/README.md: every key of a recipe, from its schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_origin

from dpo_cli.recipe import Recipe, sections
from dpo_cli.recipe.train import OUR_TRAIN_DEFAULTS, Section, trl_arguments

PAGE = Path(__file__).parents[2] / "recipes" / "README.md"
HEAD = """# Every key of a recipe

Written from the schema by `python -m tests.tools.recipe_reference`. `dpo-cli schema` prints it for your editor: save it
as `schema.json` and put `# yaml-language-server: $schema=schema.json` on the first line of a recipe. A key that a
recipe does not set has the default below; `dpo-cli check RECIPE --all` prints a recipe with all of them.

`extends: other.yaml` starts from another recipe: maps merge key by key; lists, scalars and null replace. Relative paths
are relative to the file that holds them; those in `--set KEY=VALUE` are relative to the current folder.
"""
FILTERS = """
## Filters

`data.filters`, by the reason they drop for: `false` switches one off, a value or a map tunes it. They run in this
order.
"""
TRAIN = """
## train

`train` takes any argument of the method's TRL config, by TRL's own name; name, type, range and loss are checked before
anything is loaded. Seed, output folder, length and device belong to other parts of the recipe and are refused here,
with the key to use instead. TRL disables dropout in DPO unless `disable_dropout` is false. Our defaults, where they
differ from TRL's: {defaults}. `gradient_checkpointing: null` switches it on where the memory plan needs it.
"""
METHODS = """
## Methods
"""


def yaml_value(value: Any) -> str:
    """A default as one writes it in a recipe."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(yaml_value, value)) + "]"
    return str(value) if isinstance(value, str) else json.dumps(value)


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def key_rows(model: type[Section] = Recipe, prefix: str = "") -> list[list[str]]:
    """Key, default and description of every key, in the order of the schema."""
    rows = []
    for name, field in model.model_fields.items():
        key, kind = prefix + name, field.annotation
        if key == "data.filters":
            rows.append([f"`{key}`", "see below", str(field.description)])
        elif key == "train":
            rows.append(["`train`", "see below", "any argument of the method's TRL config, by TRL's name"])
        elif isinstance(kind, type) and issubclass(kind, Section):
            rows += key_rows(kind, f"{key}.")
        else:
            default = "required" if field.is_required() else f"`{yaml_value(field.default)}`"
            default = "the file's stem" if key == "name" else default
            rows.append([f"`{key}`", default, str(field.description)])
            rows += nested_rows(sections_in(kind), f"{key}[]." if get_origin(kind) is list else f"{key}.")
    return rows


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a value may be: none, one, or one of each kind."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def nested_rows(sections: list[type[Section]], prefix: str) -> list[list[str]]:
    """Rows of a section that a key may hold; where it may be of several kinds, what one kind alone has names it."""
    if len(sections) < 2:
        return [row for section in sections for row in key_rows(section, prefix)]
    kinds = {get_args(section.model_fields["kind"].annotation)[0]: section for section in sections}
    found = [[f"`{prefix}kind`", "required", " or ".join(kinds)]]
    for kind, section in kinds.items():
        own = {name for name in section.model_fields if any(name not in one.model_fields for one in sections)}
        for name, (key, default, what) in zip(section.model_fields, key_rows(section, prefix), strict=True):
            row = [key, default, f"{kind}: {what}" if name in own else what]
            if name != "kind" and row not in found:
                found.append(row)
    return found


def filter_rows() -> list[list[str]]:
    rows = []
    for reason, (options, drops) in sections.FILTERS.items():
        tuned = {name: field.default for name, field in options.model_fields.items()}
        default = "false" if reason in sections.OFF_BY_DEFAULT else yaml_value(tuned or True)
        rows.append([f"`{reason}`", f"`{default}`", drops])
    return rows


def method_rows() -> list[list[str]]:
    return [
        [
            f"`{method}`",
            f"`{one['config']}`",
            ", ".join(one["data"]),
            "yes" if one["reference"] else "none",
            " ".join(one["losses"]) or "its own",
            ", ".join(f"`{name}: {yaml_value(value)}`" for name, value in one["defaults"].items()) or "–",
        ]
        for method, one in trl_arguments().items()
    ]


def page() -> str:
    """The whole page, as it has to stand in recipes/README.md."""
    defaults = ", ".join(f"`{name}: {yaml_value(value)}`" for name, value in OUR_TRAIN_DEFAULTS.items())
    methods = ["method", "arguments of", "learns from", "reference", "`train.loss_type`", "own defaults"]
    return "".join(
        [
            HEAD,
            table(["key", "default", "what it is"], key_rows()),
            FILTERS,
            table(["filter", "default", "drops"], filter_rows()),
            TRAIN.format(defaults=defaults),
            METHODS,
            table(methods, method_rows()),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
