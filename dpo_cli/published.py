"""What leaves this machine in cards, reports and pushed files: no local path, no server's address, no key's name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.recipe import Recipe
from dpo_cli.recipe.yaml import dump_yaml

SERVER = "http://localhost:8000/v1"  # stands for whatever server was asked, for a recipe needs one
_ROOT = r"(?:file://+|~[\w.-]*[/\\]|/|[A-Za-z]:[/\\]|\\\\)"  # of Linux, macOS and Windows, and a share \\server\…
_WHOLE = re.compile(rf"{_ROOT}[^\n]*")
# Within a text a path ends at a space and has two parts at least: "/think" is none, nor is what follows https:.
_WITHIN = re.compile(rf"""(?<![\w:/\\.~-]){_ROOT}(?:[^\s"'`<>|,;:/\\]+[/\\]+)+[^\s"'`<>|,;:/\\]*""")


def without_paths(text: str) -> str:
    """Name local paths, which hold a user's name or a company's, by their last part; anything else stays."""
    if _WHOLE.fullmatch(text) and not re.fullmatch(r"/[^/\\]*", text):
        return _last(text)
    return _WITHIN.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]


def clean(value: Any) -> Any:
    """The same for every text in lists and dicts."""
    if isinstance(value, dict):
        return {key: clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [clean(inner) for inner in value]
    return without_paths(value) if isinstance(value, str) else value


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, without what is nobody else's business."""
    values = clean(recipe.model_dump(mode="json"))
    sampled = [source["sample"]["server"] for source in values["data"]["sources"] if source["sample"]]
    for server in (values["eval"]["judge"], values["data"]["rater"], *sampled):
        if server and "base_url" in server:
            server |= {"base_url": SERVER, "api_key_env": None}
    return dump_yaml(values)


def report_sections(report: Path, wanted: Sequence[str]) -> str:
    """Parts of a Markdown report by their headings, one level lower; "" is what stands below its title."""
    if not report.is_file():
        return ""
    text = report.read_text(encoding="utf-8")
    opening, *parts = re.split(r"^##? (.*)\n", f"\n{text}", flags=re.MULTILINE)[2:]
    found = {"": opening.strip()}
    for heading, part in zip(parts[::2], parts[1::2], strict=True):
        found.setdefault(heading, f"### {heading}\n\n{part.strip()}")  # the first: later ones may be in an answer
    return without_paths("\n\n".join(found[one] for one in wanted if found.get(one)))
