"""The notebook for Colab: its cells run in order, on the smoke recipe in place of the real one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests import program

REPOSITORY = Path(__file__).parents[2]
CELLS = [
    "".join(cell["source"])
    for cell in json.loads((REPOSITORY / "recipes" / "colab.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]


@pytest.mark.slow
def test_the_cells_run_from_top_to_bottom(smoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(smoke.folder, tmp_path / "runs" / "smoke")
    monkeypatch.chdir(tmp_path)
    shown: list[str] = []
    display = ModuleType("IPython.display")
    display.__dict__.update(HTML=str, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    ran = []

    def shell(line: str, recipe: str) -> None:
        if line.startswith("git clone"):  # the packages are here
            return
        words = shlex.split(line.replace("{RECIPE}", recipe))
        assert words[0] == "dpo-cli"
        done = program.run(*words[1:], timeout=None, env={**os.environ, "COLUMNS": "80"})
        assert done.returncode == 0, done.stdout + done.stderr
        ran.append(words[1])

    names: dict[str, Any] = {"shell": shell}
    for cell in CELLS:
        lines = [f"shell({line[1:]!r}, RECIPE)" if line.startswith("!") else line for line in cell.splitlines()]
        exec("\n".join(lines), names)
        names["RECIPE"] = str(REPOSITORY / "recipes" / "smoke.yaml")
    assert ran == ["doctor", "check", "prepare", "train", "eval", "export", "eval"]
    assert len(CELLS) == 6
    assert shown[0].lower().startswith("<!doctype html>")


def test_it_names_a_recipe_and_extras_that_are_there() -> None:
    recipe = next(line for line in CELLS[0].splitlines() if line.startswith("RECIPE")).split('"')[1]
    assert (REPOSITORY / recipe).is_file()
    assert "[unsloth,gguf]" in CELLS[0]
