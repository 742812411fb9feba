"""The README says what is so: its commands exist, every key's page is the schema's, the tree is the tree."""

from __future__ import annotations

import re
from pathlib import Path

from tests.tools import recipe_reference

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
HOUSE = (REPOSITORY / "dpo_cli" / "README.md").read_text(encoding="utf-8")


def test_the_page_of_every_key_is_made_from_the_schema() -> None:
    assert recipe_reference.PAGE.read_text(encoding="utf-8") == recipe_reference.page()


def test_the_tree_names_every_module_and_only_those() -> None:
    tree = HOUSE.split("```\ndpo_cli/")[1].split("```")[0]
    named = set(re.findall(r"\b(\w+\.(?:py|json|jinja))\b", tree.replace(".html.jinja", "_html.jinja")))
    paths = [path for path in (REPOSITORY / "dpo_cli").rglob("*") if path.parent.parent.name != "smoke"]  # no models'
    there = {path.name.replace(".html.", "_html.") for path in paths}
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
