"""What `make smoke` ends with: a held-out prompt in each language, answered by base and tuned model, and the verdict.

python -m tests.tools.show_answers runs/smoke
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from types import SimpleNamespace
from typing import Any

from dpo_cli.records import read_jsonl
from dpo_cli.show import say
from dpo_cli.terminal import print_answers


def changed(run: Path) -> list[dict[str, Any]]:
    """Of each language the first row of `eval/samples.jsonl` whose two answers differ."""
    shown: dict[str, Any] = {}
    for row in read_jsonl(run / "eval" / "samples.jsonl"):
        if row["base"]["text"] != row["tuned"]["text"]:
            shown.setdefault(row["language"], row)
    return [row for _, row in sorted(shown.items())]


def show(run: Path) -> None:
    """Print these, and the verdict."""
    for row in changed(run):
        answers = [[_answer(row[side])] for side in ("base", "tuned")]
        print_answers(row["prompt"][-1]["content"], *answers)
        print()
    metrics = json.loads((run / "eval" / "metrics.json").read_text(encoding="utf-8"))
    say(fill(metrics["verdict"]["sentence"], get_terminal_size().columns))
    say(f"report: {run / 'eval' / 'report.html'}")


def _answer(row: dict[str, Any]) -> Any:
    return SimpleNamespace(text=row["text"], answer_ids=row["ids"][row["thought"] :], finished=row["finished"])


if __name__ == "__main__":
    show(Path(sys.argv[1]))
