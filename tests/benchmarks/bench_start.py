"""What it costs to start: CPU seconds of the light commands beside a Python that does nothing.

    .venv/bin/python tests/benchmarks/bench_start.py

The goal is 0.5 CPU-seconds at most, and no torch. A recipe full of typos is measured too: each has to be looked up.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS = 5
GOAL = 0.5

# The program as its console script runs it, and then whether torch was loaded.
PROGRAM = """
import sys
from dpo_cli.cli import main
try:
    main()
except SystemExit:
    pass
print("torch" in sys.modules, file=sys.stderr)
"""

TYPOS = """\
model: {idd: builtin:tiny-qwen3}
data: {source: [], fliters: {}}
train: {lr: 1, warmup_ratio: 0.1, betta: 0.1, loss_type: sigmod}
lora: {rank: 8}
max_len: 512
"""


def cpu_seconds(command: list[str]) -> tuple[float, str]:
    """User and system time of one child, and the last line of its stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return spent, (done.stderr.splitlines() or [""])[-1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        typos = Path(folder, "typos.yaml")
        typos.write_text(TYPOS, encoding="utf-8")
        cases = {
            "python -c pass": ["-c", "pass"],
            "dpo-cli --help": ["-c", PROGRAM, "--help"],
            "dpo-cli check recipes/smoke.yaml": ["-c", PROGRAM, "check", "recipes/smoke.yaml"],
            "dpo-cli schema": ["-c", PROGRAM, "schema"],
            "dpo-cli check (9 mistakes)": ["-c", PROGRAM, "check", str(typos)],
        }
        print(f"{'median of ' + str(RUNS):<36} CPU seconds   goal   torch")
        for name, arguments in cases.items():
            measured = [cpu_seconds([sys.executable, *arguments]) for _ in range(RUNS)]
            spent = statistics.median(seconds for seconds, _ in measured)
            torch = "-" if arguments[1] == "pass" else {"True": "loaded", "False": "no"}[measured[-1][1]]
            verdict = "" if torch == "-" else "met" if spent <= GOAL and torch == "no" else "MISSED"
            print(f"{name:<36} {spent:>11.2f}   {verdict:<6} {torch}")


if __name__ == "__main__":
    main()
