"""One smoke run, made by the four real commands, that the tests of this folder read and none may change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from dpo_cli.disk import sha256
from tests import program

REPOSITORY = Path(__file__).parents[2]
SMOKE = REPOSITORY / "recipes" / "smoke.yaml"

Command = Callable[..., subprocess.CompletedProcess[str]]


def dpo_cli(*arguments: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `dpo-cli` as a user would; with `ok`, failing fails the test with what it printed."""
    done = program.run(*arguments, timeout=None, env={**os.environ, "COLUMNS": "80"})
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@dataclass(frozen=True)
class SmokeRun:
    """The finished run: where it is, the folder to give to --runs-dir, and what each command printed."""

    folder: Path
    runs: Path
    printed: dict[str, subprocess.CompletedProcess[str]]

    def copy(self, runs: Path, *stages: str) -> Path:
        """Copy some stages of it, with a fifth of the held-out pairs, into another folder of runs; the copy's own."""
        copied = shutil.copytree(self.folder, runs / "smoke", ignore=shutil.ignore_patterns("train", "eval", "export"))
        if "train" in stages:
            shutil.copytree(self.folder / "train", copied / "train")
        held_out = copied / "data" / "eval.jsonl"
        before = sha256(held_out)
        held_out.write_text("".join(held_out.read_text("utf-8").splitlines(keepends=True)[::5]), encoding="utf-8")
        manifest = json.loads((copied / "manifest.json").read_text().replace(before, sha256(held_out)))
        manifest["stages"] = {name: record for name, record in manifest["stages"].items() if name in stages}
        (copied / "manifest.json").write_text(json.dumps(manifest))
        return copied


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    runs = tmp_path_factory.mktemp("smoke-runs")
    printed = {stage: dpo_cli(stage, SMOKE, "--runs-dir", runs) for stage in ("prepare", "train", "eval", "export")}
    return SmokeRun(runs / "smoke", runs, printed)


@pytest.fixture
def command() -> Command:
    return dpo_cli
