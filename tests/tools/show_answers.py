"""What `make smoke` ends with: a held-out prompt in each language, answered by base and tuned model, and the verdict.

python -m tests.tools.show_answers runs/smoke
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dpo_cli.records import read_jsonl
from dpo_cli.show import say
from dpo_cli.terminal import print_answers


def show(run: Path) -> None:
    """Print them from what `eval` wrote; of each language the first prompt whose two answers differ."""
    shown: dict[str, Any] = {}
    for row in read_jsonl(run / "eval" / "samples.jsonl"):
        if row["base"]["text"] != row["tuned"]["text"]:
            shown.setdefault(row["language"], row)
    for _, row in sorted(shown.items()):
        answers = [[_answer(row[side])] for side in ("base", "tuned")]
        print_answers(row["prompt"][-1]["content"], *answers)
        print()
    metrics = json.loads((run / "eval" / "metrics.json").read_text(encoding="utf-8"))
    say(f"{metrics['verdict']['sentence']}\nreport: {run / 'eval' / 'report.html'}")


def _answer(row: dict[str, Any]) -> Any:
    return SimpleNamespace(text=row["text"], said=row["ids"][row["thought"] :], finished=row["finished"])


if __name__ == "__main__":
    show(Path(sys.argv[1]))
