"""dpo-cli train on the real Unsloth's trainer, TRL 1.15 under it, for some steps on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMOKE = HERE.parents[1] / "recipes" / "smoke.yaml"
SETTINGS = (
    "train.max_steps=2",
    "train.logging_steps=1",
    "train.save_steps=1",
    "train.per_device_train_batch_size=1",
    "train.gradient_accumulation_steps=1",
)


def dpo_cli(
    *program: str, runs: Path, backend: str, allow_cpu: bool = True, more: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "UNSLOTH_ALLOW_CPU": "1" if allow_cpu else "0",
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",  # compiling what runs twice takes half a minute
    }
    command = [sys.executable, *program, "train", str(SMOKE), "--runs-dir", str(runs)]
    command += [part for setting in (*SETTINGS, *more, f"engine.backend={backend}") for part in ("--set", setting)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def on_unsloth(runs: Path, *more: str) -> subprocess.CompletedProcess[str]:
    done = dpo_cli(str(HERE / "on_cpu.py"), runs=runs, backend="unsloth", more=more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def losses(runs: Path) -> list[float]:
    lines = (runs / "smoke" / "train" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_unsloths_trainer_gives_trls_losses_and_resumes_to_them(tmp_path: Path) -> None:
    plain, runs = tmp_path / "plain", tmp_path / "unsloth"
    done = dpo_cli("-m", "dpo_cli", runs=plain, backend="hf")
    assert done.returncode == 0, done.stdout + done.stderr

    done = on_unsloth(runs)
    assert "backend unsloth" in done.stdout
    assert "IGNORED" not in done.stdout, "Unsloth names the arguments that it drops"
    # transformers' weights know nothing of Unsloth's hook for shared prompts; the check before step 1 has to see that.
    assert "the shared prefix is off" in done.stderr
    whole = losses(runs)
    assert whole == pytest.approx(losses(plain), abs=1e-6)
    assert not list((runs / "smoke" / "train").rglob("ref")), "no copy of the adapter is saved"

    # As a kill after step 1 leaves it.
    shutil.rmtree(runs / "smoke" / "train" / "checkpoints" / "checkpoint-2")
    manifest = json.loads((runs / "smoke" / "manifest.json").read_text(encoding="utf-8"))
    manifest["stages"]["train"]["status"] = "running"
    (runs / "smoke" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "resumed from step 1" in on_unsloth(runs).stdout
    assert losses(runs) == whole


@pytest.mark.parametrize("method", ["simpo", "orpo", "kto"])
def test_other_methods_go_through_unsloths_trainers_to_the_same_losses(method: str, tmp_path: Path) -> None:
    plain, runs = tmp_path / "plain", tmp_path / "unsloth"
    more = (f"train.method={method}", "train.per_device_train_batch_size=2", "data.total=40")
    done = dpo_cli("-m", "dpo_cli", runs=plain, backend="hf", more=more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "backend unsloth" in on_unsloth(runs, *more).stdout
    assert losses(runs) == pytest.approx(losses(plain), abs=1e-6)


def test_unsloth_without_a_gpu_is_refused_with_a_mend(tmp_path: Path) -> None:
    done = dpo_cli("-m", "dpo_cli", runs=tmp_path, backend="unsloth", allow_cpu=False)
    assert done.returncode == 1
    assert "needs an NVIDIA GPU" in done.stderr and "engine.backend: auto" in done.stderr
    assert "Traceback" not in done.stderr
