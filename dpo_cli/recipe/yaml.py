"""Reading recipe files: strict YAML that knows its line numbers, `extends`, and `--set`.

PyYAML alone reads `5e-6` as a string, `off` as false, and lets a second `beta:` silently replace the first. Here
scalars follow YAML 1.2's core schema, a key written twice is an error, and every value remembers where it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dpo_cli.errors import USAGE, DpoError, nearest
from dpo_cli.recipe.slips import yaml_slip

Key = tuple[str | int, ...]  # ("data", "sources", 0, "id")

# More than any recipe has; what goes beyond is an error or an attack, and must not take minutes or gigabytes.
MOST_BYTES, MOST_VALUES, DEEPEST = 100_000, 20_000, 50

SETTING = "--set"  # the place of a key that was set there
TELLING = re.compile("key|token(?!_budget|s|izer)|secret|passw|credential|judg", re.IGNORECASE)
DATA_SUFFIXES = (".json", ".jsonl", ".gz", ".csv", ".parquet", ".txt")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: true/false only, `5e-6` a number, no dates, no base 60."""

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


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what either YAML 1.1 or our reader would take for something else than text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        first: [*resolvers, *_Loader.yaml_implicit_resolvers.get(first, [])]
        for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


def _represent_str(dumper: Dumper, text: str) -> yaml.ScalarNode:
    """A line break that is not \\n is only safe as an escape."""
    style = '"' if set(text) & set("\r\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _represent_str)


def dump_yaml(values: Any, allow_unicode: bool = True) -> str:
    """Plain values as YAML that loads again to equal ones, in YAML 1.1 too; without Unicode by its escapes."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=allow_unicode, width=100)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(node.value).replace("_", ""))  # 010 is ten, as in YAML 1.2, not eight


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass
class Document:
    """A recipe as written: plain values, and for each key the place it was set (`file:line` or `--set`)."""

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
    try:
        parent_path = path.parent / Path(parent).expanduser()
        found = parent_path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, the home of nobody
        raise DpoError(f"`extends` takes the path of one recipe: {error}", where=place, exit_code=USAGE) from None
    if not found:
        raise DpoError(f"`extends` names a file that does not exist: {parent_path}", where=place, exit_code=USAGE)
    base = _read_chain(parent_path, [*children, path])
    base.values.pop("name", None)
    base.values.pop("extends", None)
    replaced: set[Key] = set()  # what stood there in the parent is gone, with its lines
    values = _merge(base.values, document.values, (), replaced)
    kept = {
        key: place
        for key, place in base.places.items()
        if not any(key[:end] in replaced for end in range(1, len(key) + 1))
    }
    return Document(values | {"extends": None}, kept | document.places)


def _merge(base: Any, child: Any, key: Key, replaced: set[Key]) -> Any:
    """Maps merge key by key; lists, scalars and null replace, at the keys that `replaced` gathers."""
    if isinstance(base, dict) and isinstance(child, dict):
        return base | {name: _merge(base.get(name), value, (*key, name), replaced) for name, value in child.items()}
    replaced.add(key)
    return child


def _read_file(path: Path) -> Document:
    where = short(path)
    text = _text_of(path, where)
    places: dict[Key, str] = {}
    values = _parse(text, "not valid YAML", lambda line: f"{where}:{line}" if line else where, places)
    if values is None and () not in places:
        values = {}  # empty, or comments only
    if not isinstance(values, dict):
        raise DpoError("a recipe is a map of keys", where=where, hint="start from recipes/smoke.yaml", exit_code=USAGE)
    return Document(_absolute_paths(values, (), path.parent, lambda key: places.get(key, where)), places)


def _text_of(path: Path, where: str) -> str:
    """The text of a recipe file.

    Raises:
        DpoError: (exit code 2) it is not there, no file, too large, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except IsADirectoryError:
        raise DpoError(f"{where} is a folder, not a recipe", hint=_recipes_nearby(path), exit_code=USAGE) from None
    except (FileNotFoundError, NotADirectoryError):
        raise DpoError(f"no recipe at {where}", hint=_recipes_nearby(path), exit_code=USAGE) from None
    except (OSError, ValueError) as error:  # may not be read; a null byte in its name
        what = error.strerror if isinstance(error, OSError) else error
        raise DpoError(f"can't read the recipe: {what}", where=where, exit_code=USAGE) from None
    if path.name.lower().endswith(DATA_SUFFIXES) and (path.suffix != ".json" or raw.lstrip()[:1] == b"["):
        starts = f"dpo-cli init {where} writes a recipe for it"
        raise DpoError(f"{where} is a data file, not a recipe", hint=starts, exit_code=USAGE)
    if len(raw) > MOST_BYTES:
        hint = "give the path of a recipe, a .yaml file"
        raise DpoError(f"too large for a recipe: over {MOST_BYTES:,} bytes", where=where, hint=hint, exit_code=USAGE)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{where}:{len(raw[: error.start].splitlines() or [b''])}"
        raise DpoError("the recipe is not UTF-8 text", where=where, hint="save it as UTF-8", exit_code=USAGE) from None


def _parse(text: str, problem: str, place: Callable[[int], str], places: dict[Key, str]) -> Any:
    """One YAML value, None where there is none; fills `places`, which `place` makes of line numbers (0: unknown)."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _walk(node, (), place, places)
        return loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(text, error, problem, place) from None
    except RecursionError:
        raise DpoError(f"{problem}: more than {DEEPEST} levels deep", where=place(0), exit_code=USAGE) from None
    except (yaml.YAMLError, ValueError, KeyError, AttributeError) as error:  # the last two: a value that belies its tag
        raise DpoError(f"{problem}: {error}", where=place(0), exit_code=USAGE) from None


def _not_yaml(text: str, error: yaml.MarkedYAMLError, problem: str, place: Callable[[int], str]) -> DpoError:
    """What the YAML reader stumbled over, with the line and what is usually wrong there."""
    lines = re.split(r"\r\n|\r|\n", text)
    mark = error.problem_mark or error.context_mark
    hint = "check the indentation, colons and quotes there and one line above"
    usual = error.problem or error.context or "", hint, mark.line if mark else -1
    what, hint, number = yaml_slip(lines, error) or usual
    line = lines[number] if 0 <= number < len(lines) else ""
    shown = [line.replace("\t", "→   ")[:100]] if line.strip() and len(lines) > 1 and not TELLING.search(line) else []
    return DpoError(f"{problem}: {what}", where=place(number + 1), hint=hint, details=shown, exit_code=USAGE)


def _walk(node: yaml.Node | None, key: Key, place: Callable[[int], str], places: dict[Key, str]) -> None:
    """Fill `places` for every key below `node`; refuse a key that stands twice.

    Aliases let a few lines stand for billions of values: they are counted as if written out.
    """
    if node is None:
        return
    if len(places) > MOST_VALUES or len(key) > DEEPEST:
        what = f"more than {MOST_VALUES:,} values or {DEEPEST} levels, aliases written out"
        raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)
    places[key] = place(node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*key, index), place, places)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            if name_node.tag == "tag:yaml.org,2002:merge":
                _walk(value_node, (*key, "<<"), place, places)
                continue
            if name_node.tag != "tag:yaml.org,2002:str":
                what = "a key must be a word; put quotes around it if it is meant"
                raise yaml.MarkedYAMLError(problem=what, problem_mark=name_node.start_mark)
            name = name_node.value
            odd = next((one for one in name if one.isspace() and one != " "), None)
            if odd:
                what = f"the key has {odd!a} in it, which is no plain space"
                raise yaml.MarkedYAMLError(problem=what, problem_mark=name_node.start_mark)
            if name in seen:
                raise DpoError(
                    f"{show_key((*key, name))} is set twice, on lines {seen[name]} and {line}",
                    where=place(line),
                    hint="keep one of them",
                    exit_code=USAGE,
                )
            seen[name] = line
            _walk(value_node, (*key, name), place, places)
            places[(*key, name)] = place(line)


def _apply_override(document: Document, override: str) -> None:
    """Apply one `--set data.sources.0.quota=100`; the value is YAML."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip() or re.search(": |{", dotted):
        shown = re.split("[:{ ]", dotted)[0]  # what follows may be the key of a service
        raise DpoError(f"--set takes KEY=VALUE, not '{shown}'", hint="--set train.beta=0.2", exit_code=USAGE)
    where = f"--set {dotted}"  # without the value, which people take for the place of a key
    value = _parse(text, "not a YAML value", lambda line: where, {})
    parts = dotted.strip().replace("[", ".").replace("]", "").split(".")
    target: Any = document.values
    key: list[str | int] = []
    for part in parts[:-1]:
        inner: Any = _step(target, part, where)
        key.append(inner)
        there = target.get(inner) if isinstance(target, dict) else target[inner]
        if not isinstance(there, dict | list):
            target[inner] = {}
            document.places[tuple(key)] = SETTING
        target = target[inner]
    last = _step(target, parts[-1], where)
    full = (*key, last)
    target[last] = _absolute_paths(value, full, Path.cwd(), lambda key: SETTING)
    for old in [known for known in document.places if known[: len(full)] == full]:
        del document.places[old]  # what stood below is gone, and so are its lines
    document.places[full] = SETTING


def _step(target: Any, part: str, place: str) -> str | int:
    if not isinstance(target, list):
        return part
    if not part.isdigit() or int(part) >= len(target):
        message = f"'{part}' is not one of the list's {len(target)} places (counted from 0)"
        raise DpoError(message, where=place, exit_code=USAGE)
    return int(part)


def _absolute_paths(value: Any, key: Key, folder: Path, place: Callable[[Key], str]) -> Any:
    """`value` with every relative path in it made absolute against the folder of the file that wrote it.

    A hub id (`Qwen/Qwen3-1.7B`) and a relative folder look alike, so a plain name counts as a path only
    where it exists, starts with `.`, `~` or `/`, or ends like a data file.
    """
    if isinstance(value, dict):
        return {name: _absolute_paths(inner, (*key, name), folder, place) for name, inner in value.items()}
    if isinstance(value, list):
        return [_absolute_paths(inner, (*key, index), folder, place) for index, inner in enumerate(value)]
    if not (isinstance(value, str) and value and names_a_path(key)) or value.startswith("builtin:"):
        return value
    written_as_path = value.startswith((".", "~", "/")) or value.lower().endswith(DATA_SUFFIXES)
    try:
        path = folder / Path(value).expanduser()
        return str(path.resolve()) if written_as_path or path.exists() else value
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, the home of nobody
        raise DpoError(f"not a path: {error}", where=f"{place(key)}  {show_key(key)}", exit_code=USAGE) from None


# A source may be written as its id alone.
_PATHS = re.compile(
    r"model\.(id|adapter|merge_base)|(data\.sources|eval\.sets)(\[\d+\])?(\.id)?|data\.contamination(\[\d+\])?"
    r"|(eval\.judge|data\.rater)\.id|export\.llama_cpp|train\.(deepspeed|fsdp_config|accelerator_config)"
)


def names_a_path(key: Key) -> bool:
    """Whether that recipe key may hold a local path."""
    return _PATHS.fullmatch(show_key(key)) is not None


def short(path: Path) -> str:
    """The path as a person would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _recipes_nearby(path: Path) -> str:
    """The three recipes whose names are nearest to a path that is none; no further down, where other files lie."""
    folders = [one for one in ([path] if path.is_dir() else [path.parent, Path("recipes")]) if one.is_dir()]
    there = [one for folder in folders for depth in ("", "[!.]*/") for one in sorted(folder.glob(f"{depth}*.y*ml"))]
    found = {short(one): one for one in there}
    near = nearest(path.name, [one.name for one in found.values()], 3) or [one.name for one in found.values()][:3]
    shown = sorted((one for one in found if found[one].name in near), key=lambda one: near.index(found[one].name))
    return f"did you mean {', '.join(shown[:3])}?" if shown else "give the path of a recipe, a .yaml file"
