"""The README says what is so: its commands exist, every key's page is the schema's, the tree is the tree."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from tests.tools import recipe_reference

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
GUIDE = (REPOSITORY / "recipes" / "guide.md").read_text(encoding="utf-8")
CHINESE = (REPOSITORY / "recipes" / "README.zh.md").read_text(encoding="utf-8")
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
    paths_and_names = {*there, *(path.relative_to(REPOSITORY / "dpo_cli").as_posix() for path in paths), "__init__.py"}
    assert {one for one in re.findall(r"`([\w/]+\.(?:py|json))`", HOUSE) if one not in paths_and_names} == set()


@pytest.mark.parametrize("page", [README, GUIDE, CHINESE], ids=["README", "guide", "Chinese"])
def test_every_command_and_recipe_that_is_mentioned_exists(page: str) -> None:
    from dpo_cli.cli import app
    from typer.main import get_command

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"dpo-cli ([a-z]+)\b", page)) <= known
    for path in re.findall(r"recipes/[\w/]+\.yaml", page):
        assert (REPOSITORY / path).is_file() or path == "recipes/mine.yaml", path
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)", page):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def facts(page: str) -> dict[str, object]:
    """What a translation must not change: command lines, code, and figures."""
    fences = re.findall(r"```[a-z]*\n(.*?)```", page, re.DOTALL)
    lines = [re.sub(r"\s+#.*", "", line).strip() for fence in fences for line in fence.splitlines()]
    prose = re.sub(r"\]\([^)]*\)", "]", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    return {
        "commands": [line for line in lines if line.isascii()],
        "code": set(re.findall(r"`([^`\n]+)`", prose)),
        "figures": Counter(re.findall(r"\d[\d,.]*\d|\d", prose)),
    }


def test_the_chinese_readme_says_the_same() -> None:
    assert facts(CHINESE) == facts(README)
    heads = [re.findall(r"^#+ ", page, re.MULTILINE) for page in (CHINESE, README)]
    assert heads[0] == heads[1]


def test_a_newcomer_can_read_the_readme_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 220


@pytest.mark.parametrize("path", ["README.md", "recipes/guide.md", "recipes/README.zh.md", "dpo_cli/README.md"])
def test_links_lead_somewhere(path: str) -> None:
    page = REPOSITORY / path
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert link.startswith("http") or (page.parent / link).exists(), link
