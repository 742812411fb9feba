"""Reading recipe files: strict YAML that knows its line numbers, `extends`, and `--set`.

PyYAML alone reads `5e-6` as a string, `off` as false, and lets a second `beta:` silently replace the first. Here
scalars follow YAML 1.2's core schema, a key written twice is an error, and every value remembers where it stands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dpo_cli.errors import USAGE, DpoError

Key = tuple[str | int, ...]  # ("data", "sources", 0, "id")

DATA_SUFFIXES = (".json", ".jsonl", ".gz", ".csv", ".parquet", ".txt")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars (true/false only, `5e-6` a number, no dates, no base 60)."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
    ("merge", r"^<<$", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(node.value).replace("_", ""))  # 010 is ten, as in YAML 1.2, not eight


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass
class Document:
    """A recipe as written: plain values, and for each key the place it was set (`file:line` or `--set …`)."""

    values: dict[str, Any]
    places: dict[Key, str] = field(default_factory=dict)


def show_key(key: Key) -> str:
    """("data", "sources", 0, "id") -> "data.sources[0].id"."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def read_recipe(path: Path, overrides: list[str]) -> Document:
    """The recipe at `path` with its `extends` chain merged in and `overrides` (`KEY=VALUE`) applied last."""
    document = _read_chain(path, [])
    for override in overrides:
        _apply_override(document, override)
    return document


def _read_chain(path: Path, children: list[Path]) -> Document:
    path = path.resolve()
    if path in children:
        chain = " -> ".join(p.name for p in [*children, path])
        raise DpoError(f"`extends` goes round in a circle: {chain}", where=str(children[-1]), exit_code=USAGE)
    document = _read_file(path)
    parent = document.values.get("extends")
    if parent is None:
        return document
    place = document.places[("extends",)]
    if not isinstance(parent, str):
        raise DpoError("`extends` takes the path of one recipe", where=place, exit_code=USAGE)
    parent_path = path.parent / Path(parent).expanduser()
    if not parent_path.is_file():
        raise DpoError(f"`extends` names a file that does not exist: {parent_path}", where=place, exit_code=USAGE)
    base = _read_chain(parent_path, [*children, path])
    base.values.pop("name", None)
    base.values.pop("extends", None)
    merged = Document(_merge(base.values, document.values), {**base.places, **document.places})
    merged.values["extends"] = None
    return merged


def _merge(base: Any, child: Any) -> Any:
    """Maps merge key by key; lists, scalars and null replace."""
    if not (isinstance(base, dict) and isinstance(child, dict)):
        return child
    return {**base, **{key: _merge(base.get(key), value) for key, value in child.items()}}


def _read_file(path: Path) -> Document:
    where = _short(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DpoError(f"no recipe at {where}", hint=_recipes_nearby(path), exit_code=USAGE) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DpoError(f"can't read the recipe: {error}", where=where, exit_code=USAGE) from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        places: dict[Key, str] = {}
        _walk(node, (), where, places, [])
        values = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise DpoError(
            f"not valid YAML: {error.problem or error.context}",
            where=where + line,
            hint="check the indentation, colons and quotes on that line and the one above it",
            exit_code=USAGE,
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise DpoError(f"not valid YAML: {error}", where=where, exit_code=USAGE) from None
    if not isinstance(values, dict):
        raise DpoError("a recipe is a map of keys", where=where, hint="start from recipes/smoke.yaml", exit_code=USAGE)
    return Document(_absolute_paths(values, (), path.parent), places)


def _walk(node: yaml.Node | None, key: Key, file: str, places: dict[Key, str], above: list[yaml.Node]) -> None:
    """Fill `places` for every key below `node`; refuse a key that stands twice, and a node that holds itself."""
    if node is None:
        return
    if node in above:
        raise yaml.MarkedYAMLError(problem="an alias that contains itself", problem_mark=node.start_mark)
    places[key] = f"{file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*key, index), file, places, [*above, node])
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            if name_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(name_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=name_node.start_mark)
            name = name_node.value
            if name in seen:
                raise DpoError(
                    f"{show_key((*key, name))} is set twice, on lines {seen[name]} and {line}",
                    where=f"{file}:{line}",
                    hint="keep one of them",
                    exit_code=USAGE,
                )
            seen[name] = line
            _walk(value_node, (*key, name), file, places, [*above, node])
            places[(*key, name)] = f"{file}:{line}"


def _apply_override(document: Document, override: str) -> None:
    """Apply one `--set data.sources.0.quota=100`; the value is YAML."""
    place = f"--set {override}"
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise DpoError(f"--set takes KEY=VALUE, not '{override}'", hint="--set train.beta=0.2", exit_code=USAGE)
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise DpoError(f"not a YAML value: {text}", where=place, hint=str(error), exit_code=USAGE) from None
    parts = dotted.strip().replace("[", ".").replace("]", "").split(".")
    target: Any = document.values
    key: list[str | int] = []
    for part in parts[:-1]:
        inner: Any = _step(target, part, place)
        key.append(inner)
        if isinstance(target, dict) and not isinstance(target.get(inner), dict | list):
            target[inner] = {}
        target = target[inner]
    last = _step(target, parts[-1], place)
    full = (*key, last)
    target[last] = _absolute_paths(value, full, Path.cwd())
    for old in [known for known in document.places if known[: len(full)] == full]:
        del document.places[old]  # what stood below is gone, and so are its lines
    document.places[full] = place


def _step(target: Any, part: str, place: str) -> str | int:
    if not isinstance(target, list):
        return part
    if not part.isdigit() or int(part) >= len(target):
        message = f"'{part}' is not one of the list's {len(target)} places (counted from 0)"
        raise DpoError(message, where=place, exit_code=USAGE)
    return int(part)


def _absolute_paths(value: Any, key: Key, folder: Path) -> Any:
    """`value` with every relative path in it made absolute against the folder of the file that wrote it.

    A hub id (`Qwen/Qwen3-1.7B`) and a relative folder look alike, so a plain name counts as a path only
    where it exists, starts with `.`, `~` or `/`, or ends like a data file.
    """
    if isinstance(value, dict):
        return {name: _absolute_paths(inner, (*key, name), folder) for name, inner in value.items()}
    if isinstance(value, list):
        return [_absolute_paths(inner, (*key, index), folder) for index, inner in enumerate(value)]
    if not (isinstance(value, str) and value and names_a_path(key)) or value.startswith("builtin:"):
        return value
    path = Path(value).expanduser()
    written_as_path = value.startswith((".", "~", "/")) or value.lower().endswith(DATA_SUFFIXES)
    return str((folder / path).resolve()) if written_as_path or (folder / path).exists() else value


def names_a_path(key: Key) -> bool:
    """Whether that recipe key may hold a local path."""
    match key:
        case ("model", "id" | "adapter" | "merge_base") | ("data", "sources", int(), "id"):
            return True
        case ("data", "contamination", int()):
            return True
    return False


def _short(path: Path) -> str:
    """The path as a person would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _recipes_nearby(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    found = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
    return f"recipes in {_short(folder)}: {', '.join(found)}" if found else "give the path of a recipe, a .yaml file"
