"""The two backends are one experiment: the Unsloth path, on a stand-in for the package, against the plain one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests import program

HERE = Path(__file__).parent
SMOKE = HERE.parents[1] / "recipes" / "smoke.yaml"


def train(runs: Path, *settings: str, unsloth: bool, dead: bool = False) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if unsloth:
        environment |= {"PYTHONPATH": str(HERE / "unsloth_double"), "UNSLOTH_ALLOW_CPU": "1"}
    if dead:
        environment["DOUBLE_DEAD_BITSANDBYTES"] = "1"
    settings = (
        f"engine.backend={'unsloth' if unsloth else 'hf'}",
        "train.max_steps=6",
        "train.logging_steps=1",
        *settings,
    )
    options = [part for setting in settings for part in ("--set", setting)]
    return program.run("train", SMOKE, "--runs-dir", runs, *options, timeout=None, env=environment)


def losses(runs: Path) -> list[float]:
    lines = (runs / "smoke" / "train" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("plain")
    done = train(runs, unsloth=False)
    assert done.returncode == 0, done.stderr
    return runs


def test_the_same_recipe_gives_the_same_losses_on_both_backends(plain: Path, tmp_path: Path) -> None:
    """Order, LoRA's init and every argument: Unsloth's other defaults (seed, batch, optimizer …) must not get in."""
    done = train(tmp_path, unsloth=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "nothing warns, in particular not that Unsloth came too late"
    assert "backend unsloth" in done.stdout and "dropping unknown" not in done.stdout
    assert losses(tmp_path) == pytest.approx(losses(plain), abs=1e-6)
    record = json.loads((tmp_path / "smoke" / "manifest.json").read_text())["stages"]["train"]
    assert record["backend"] == "unsloth"


def test_a_resume_on_unsloth_restores_the_policy(plain: Path, tmp_path: Path) -> None:
    """TRL adds a copy of a PeftModel's adapter; saved with a checkpoint, it would be restored and not the policy."""
    assert train(tmp_path, "train.save_steps=3", unsloth=True).returncode == 0
    run = tmp_path / "smoke"
    assert not list((run / "train").rglob("ref"))
    whole = losses(tmp_path)
    # As a kill after step 3 leaves it: a checkpoint, the log, and a manifest that says `running`.
    import shutil

    shutil.rmtree(run / "train" / "checkpoints" / "checkpoint-6")
    manifest: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["train"]["status"] = "running"
    (run / "manifest.json").write_text(json.dumps(manifest))
    done = train(tmp_path, "train.save_steps=3", unsloth=True)
    assert "resumed from step 3" in done.stdout, done.stderr
    assert losses(tmp_path) == whole


def test_4_bit_that_came_out_16_bit_is_an_error(tmp_path: Path) -> None:
    done = train(tmp_path, "model.load_in_4bit=true", unsloth=True, dead=True)
    assert done.returncode == 1
    assert "4-bit" in done.stderr and "model.load_in_4bit" in done.stderr and "bitsandbytes" in done.stderr


def test_unsloth_trains_4_bit_weights(tmp_path: Path) -> None:
    done = train(tmp_path, "model.load_in_4bit=true", unsloth=True)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_unsloth_without_a_gpu_is_refused_with_a_mend(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dpo_cli", "train", str(SMOKE), "--runs-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--set", "engine.backend=unsloth"], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 1
    assert "Unsloth is not installed" in done.stderr and "engine.backend: auto" in done.stderr
