"""CPU seconds of the light commands, and of the four stages on the smoke recipe as `make smoke` runs them.

    .venv/bin/python tests/benchmarks/bench_commands.py

The goals are 0.5 CPU seconds for a light command, without torch, and 90 s on two cores for the smoke run. A recipe full
of typos is measured too: each has to be looked up.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS, GOAL = 5, 0.5
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


def run(*arguments: str, **environment: str) -> tuple[float, float, str]:
    """CPU seconds and seconds of one Python, and the last line of its stderr."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    every = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=every, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return spent, time.monotonic() - began, (done.stderr.splitlines() or [""])[-1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        typos = Path(folder, "typos.yaml")
        typos.write_text(TYPOS, encoding="utf-8")
        light = (["--help"], ["schema"], ["check", "recipes/smoke.yaml"], ["check", str(typos)])
        print(f"{'median of ' + str(RUNS):<36} CPU seconds   goal   torch")
        print(f"{'python -c pass':<36} {statistics.median(run('-c', 'pass')[0] for _ in range(RUNS)):>11.2f}")
        for arguments in light:
            measured = [run("-c", PROGRAM, *arguments) for _ in range(RUNS)]
            spent, torch = statistics.median(one[0] for one in measured), measured[-1][2]
            verdict = "met" if spent <= GOAL and torch == "False" else "MISSED"
            print(f"{'dpo-cli ' + ' '.join(arguments)[-27:]:<36} {spent:>11.2f}   {verdict:<6} {torch}")
        for stage in ("prepare", "train", "eval", "export"):
            options = ("recipes/smoke.yaml", "--runs-dir", f"{folder}/runs", "--quiet")
            cpu, wall, _ = run("-m", "dpo_cli", stage, *options, DPO_CLI_CACHE=f"{folder}/cache")
            print(f"{stage:<8} {wall:6.1f} s  {cpu:6.1f} CPU s")


if __name__ == "__main__":
    main()
