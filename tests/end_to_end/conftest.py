"""One smoke run, made by the four real commands, that the tests of this folder read and none may change."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SMOKE = REPOSITORY / "recipes" / "smoke.yaml"

Command = Callable[..., subprocess.CompletedProcess[str]]


def dpo_cli(*arguments: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python -m dpo_cli` as a user would; with `ok`, failing fails the test with what it printed."""
    command = [sys.executable, "-m", "dpo_cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}, check=False)
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@dataclass(frozen=True)
class SmokeRun:
    """The finished run: where it is, the folder to give to --runs-dir, and what each command printed."""

    folder: Path
    runs: Path
    printed: dict[str, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    runs = tmp_path_factory.mktemp("smoke-runs")
    printed = {stage: dpo_cli(stage, SMOKE, "--runs-dir", runs) for stage in ("prepare", "train", "eval", "export")}
    return SmokeRun(runs / "smoke", runs, printed)


@pytest.fixture
def command() -> Command:
    return dpo_cli
