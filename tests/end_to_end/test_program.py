"""The tests' forked `dpo-cli` does what a fresh process does: the same files, output, exit codes and signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests import program

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
SETTINGS = (
    "data.total=40",
    "data.eval_size=10",
    "train.max_steps=2",
    "train.logging_steps=1",
    "train.save_strategy=no",
)

MEASURED = r"in \d+ s, [\d.]+ pairs/s|[\d.]+ GB +\d+:\d+ left"  # memory and time, in what is printed


def results(folder: Path) -> dict[str, Any]:
    """What a run holds, but for when it was made and how long it took."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found: dict[str, Any] = {name: path.read_bytes() for name, path in files.items()}
    timed = r'"(?:\w+_per_second|\w+_runtime|seconds|started|peak_memory_bytes|train/metrics.json)": [^\n]+'
    for name in ("manifest.json", "train/metrics.json"):
        found[name] = re.sub(timed, "", found[name].decode())
    return found


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="nothing is forked here")
def test_a_forked_command_is_the_cold_one(tmp_path: Path) -> None:
    options = [part for one in SETTINGS for part in ("--set", one)]
    printed = {}
    for name in ("cold", "forked"):
        (tmp_path / name).mkdir()
        done = program.run("train", SMOKE, *options, cold=name == "cold", cwd=tmp_path / name, timeout=None)
        assert done.returncode == 0, done.stderr
        printed[name] = re.sub(MEASURED, "", done.stdout), done.stderr
    assert printed["forked"][0].splitlines() == printed["cold"][0].splitlines()
    assert printed["forked"][1] == printed["cold"][1]
    assert "train: 2 steps" in printed["cold"][0]
    assert results(tmp_path / "forked" / "runs" / "smoke") == results(tmp_path / "cold" / "runs" / "smoke")


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "forked"])
def test_errors_streams_and_signals_are_those_of_a_process(cold: bool, tmp_path: Path) -> None:
    done = program.run("prepare", "no.yaml", cold=cold, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and "no.yaml" in done.stderr
    done = program.run("train", cold=cold)
    assert done.returncode == 2 and "Missing argument" in done.stderr
    named = tmp_path / "名.yaml"
    named.write_text("a: [", encoding="utf-8")
    done = program.run("prepare", named.name, cold=cold, cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 2 and "\\u540d.yaml" in done.stderr

    (tmp_path / "demo.yaml").write_text(
        json.dumps({"model": {"id": "nobody/none"}, "data": {"sources": [{"id": "p"}]}})
    )
    os.mkfifo(tmp_path / "p")  # a source that never ends: it is being read when the signal comes
    process = program.start("prepare", "demo.yaml", cold=cold, cwd=tmp_path, stdout=subprocess.PIPE)
    assert os.getsid(process.pid) != os.getsid(0) or cold
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and process.poll() == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="nothing is forked here")
def test_what_tests_run_is_forked_and_what_libraries_read_at_import_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports set variables of their own in a test's process: they must not make every command a cold one."""
    import torch._inductor  # noqa: F401
    from accelerate import Accelerator
    from dpo_cli.train.methods import METHODS

    Accelerator(cpu=True)
    for method in METHODS.values():
        method.classes()
    assert program.forks({}) and program.forks({"env": {**os.environ, "COLUMNS": "80", "PYTHONUNBUFFERED": "1"}})
    for name in ("PYTHONPATH", "UNSLOTH_ALLOW_CPU", "HF_ENDPOINT"):
        assert not program.forks({"env": {**os.environ, name: "other"}})
