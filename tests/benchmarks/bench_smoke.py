"""Seconds of `make smoke` after the install: the four commands on recipes/smoke.yaml, built-ins made anew.

python tests/benchmarks/bench_smoke.py        goal: at most 90 s on two cores
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"


def main() -> None:
    total_wall = total_cpu = 0.0
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "DPO_CLI_CACHE": f"{folder}/cache"}
        for stage in ("prepare", "train", "eval", "export"):
            wall, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-m", "dpo_cli", stage, str(SMOKE), "--runs-dir", f"{folder}/runs", "--quiet"]
            subprocess.run(command, check=True, env=environment)
            wall, after = time.monotonic() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            total_wall, total_cpu = total_wall + wall, total_cpu + cpu
            print(f"{stage:<8} {wall:6.1f} s  {cpu:6.1f} CPU s")
    print(f"{'all':<8} {total_wall:6.1f} s  {total_cpu:6.1f} CPU s")


if __name__ == "__main__":
    main()
