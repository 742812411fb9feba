"""One smoke run, made by the four real commands, that the tests of this folder read and none may change."""

from __future__ import annotations

import os
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
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


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    runs = tmp_path_factory.mktemp("smoke-runs")
    printed = {stage: dpo_cli(stage, SMOKE, "--runs-dir", runs) for stage in ("prepare", "train", "eval", "export")}
    return SmokeRun(runs / "smoke", runs, printed)


@pytest.fixture
def command() -> Command:
    return dpo_cli


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """`serve(folder, *options)`: `transformers serve` on it, from the moment it answers; its address."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    running: list[subprocess.Popen[str]] = []

    def start(folder: Path, *options: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("serve") / "log"
        command = ["-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
        with log.open("w") as file:
            place = ["--host", "127.0.0.1", "--port", str(port)]
            running.append(program.python(*command, *options, *place, stdout=file, stderr=file))
        address = f"http://127.0.0.1:{port}"
        while not _answers(f"{address}/health"):  # pytest's own limit on a test's time ends it otherwise
            try:
                running[-1].wait(0.2)
            except subprocess.TimeoutExpired:
                continue
            pytest.fail(log.read_text())
        return address

    yield start
    for server in running:
        server.kill()
        server.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
