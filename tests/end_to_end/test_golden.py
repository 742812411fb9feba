"""What the smoke run shows people, as it is: a change of layout or of words is seen in golden/, and meant.

`make golden` writes the files anew. Numbers, dates, hashes, paths and what the models answered are masked: they belong
to the day, the machine and the recipe.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from html import escape
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = Path(__file__).parents[2]
RENEW = "DPO_CLI_RENEW_GOLDEN"
NUMBER = re.compile(r"(?<![\w.])(?<!\w-)([+−-]?)\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


def terminal(smoke: Any) -> str:
    """What the four commands print on 80 columns."""
    return "\n".join(f"$ dpo-cli {stage} recipes/smoke.yaml\n{done.stdout}" for stage, done in smoke.printed.items())


def outputs(smoke: Any) -> dict[str, str]:
    files = {
        "data_report.md": "data/report.md",
        "report.md": "eval/report.md",
        "report.html": "eval/report.html",
        "model_card.md": "export/merged/README.md",
    }
    found = {name: (smoke.folder / path).read_text(encoding="utf-8") for name, path in files.items()}
    return {"terminal": terminal(smoke), **found}


def masked(text: str, smoke: Any) -> str:
    rows = (smoke.folder / "eval" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    answers = {json.loads(row)[model]["text"][:600] for row in rows for model in ("base", "tuned")}
    for answer in sorted(answers, key=len, reverse=True):
        if len(answer) > 8:
            text = text.replace(answer, "<answer>").replace(escape(answer), "<answer>")
    recipe = json.loads((smoke.folder / "eval" / "metrics.json").read_text(encoding="utf-8"))["recipe"]
    text = text.replace(recipe, "<recipe>\n").replace(escape(recipe), "<recipe>\n")
    text = text.replace(f"{REPOSITORY}/", "").replace(str(smoke.runs), "runs").replace(", cut off", "")
    text = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12,}\b", "<hash>", text)
    text = re.sub(r"^  step .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r'<svg [^>]*(aria-label="[^"]*")[^>]*>.*?</svg>', r"<svg \1>", text)
    text = re.sub(r"\b\d{4}-\d\d-\d\d\b", "<date>", text)
    text = NUMBER.sub(lambda found: "±0" if found[1] else "0", text)
    text = re.sub(r"([─━█])\1+", r"\1", text)
    return "\n".join(re.sub(r"(?<=\S) {2,}", "  ", line).rstrip() for line in text.splitlines()) + "\n"


@pytest.mark.parametrize("name", ["terminal", "data_report.md", "report.md", "report.html", "model_card.md"])
def test_what_people_see_is_what_was_meant(smoke: Any, name: str) -> None:
    found, path = masked(outputs(smoke)[name], smoke), GOLDEN / f"{name}.txt"
    if os.environ.get(RENEW):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
    expected = path.read_text(encoding="utf-8")
    lines = difflib.unified_diff(expected.splitlines(), found.splitlines(), "golden", "now", lineterm="", n=1)
    assert found == expected, "\n".join(lines) + "\nif this is meant: make golden"
