"""The real Unsloth in this process, on a machine without a GPU, and plain TRL in another; run by `make test-unsloth`.

Kernels are interpreted, token by token, so models and texts are tiny and every training is done once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.unsloth_real import on_cpu
from typer.testing import CliRunner, Result

HERE = Path(__file__).parent
METHODS = ("dpo", "simpo", "orpo", "kto")
os.environ.update(on_cpu.ENVIRONMENT)  # Triton reads it at import, and bitsandbytes imports Triton


@pytest.fixture(scope="session")
def unsloth(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package, with what `on_cpu.py` replaces."""
    on_cpu.start(tmp_path_factory.mktemp("unsloth_compiled"))
    import unsloth

    return unsloth


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder that `plain.py` writes: models, data, recipe, and the runs of plain TRL that tests ask for."""
    folder = tmp_path_factory.mktemp("plain")
    asked = {item.callspec.params.get("method") for item in request.session.items if hasattr(item, "callspec")}
    methods = [name for name in METHODS if name == "dpo" or name in asked]
    command = [sys.executable, str(HERE / "plain.py"), str(folder), *methods]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@dataclass(frozen=True)
class Run:
    """A finished `dpo-cli train`: its output and its files."""

    result: Result
    folder: Path

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.log]

    @property
    def log(self) -> list[dict[str, Any]]:
        return list(map(json.loads, (self.folder / "train" / "log.jsonl").read_text(encoding="utf-8").splitlines()))

    @property
    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))["stages"]["train"])


@pytest.fixture(scope="session")
def train(unsloth: Any, plain: Path) -> Callable[..., Run]:
    """`train(runs, "train.max_steps=1", …)`: the command line in this process, on Unsloth."""
    from dpo_cli.cli import app
    from dpo_cli.environment import prepare_environment

    def go(runs: Path, *settings: str) -> Run:
        prepare_environment("train")
        options = [part for setting in ("engine.backend=unsloth", *settings) for part in ("--set", setting)]
        result = CliRunner().invoke(app, ["train", str(plain / "demo.yaml"), "--runs-dir", str(runs), *options])
        return Run(result, runs / "demo")

    return go
