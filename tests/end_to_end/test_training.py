"""What only shows in a real training run: a kill and a resume, TRL's own figures, 4-bit weights."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests import program

REPOSITORY = Path(__file__).parents[2]
SMOKE = REPOSITORY / "recipes" / "smoke.yaml"


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "train" / "log.jsonl").read_text().splitlines()]


FEW_ANSWERS = ("eval.prompts=2", "eval.max_new_tokens=8")


def test_4_bit_weights_train_and_learn_on_a_cpu(smoke: Any, tmp_path: Path, command: Any) -> None:
    settings = ("model.load_in_4bit=true", "train.max_steps=16", *FEW_ANSWERS)
    smoke.copy(tmp_path, "prepare")
    arguments = [str(SMOKE), "--runs-dir", str(tmp_path), *(part for one in settings for part in ("--set", one))]
    for stage in ("train", "eval", "export"):
        command(stage, *arguments)
    metrics = json.loads((tmp_path / "smoke" / "eval" / "metrics.json").read_text())
    assert metrics["pairs"]["reward_accuracy"]["value"] >= 0.85
    checks = json.loads((tmp_path / "smoke" / "export" / "verify.json").read_text())
    gap = {check["name"]: check for check in checks if check["name"].startswith("gap_to_4bit")}
    assert gap.keys() == {"gap_to_4bit.base_differs", "gap_to_4bit.mean_kl", "gap_to_4bit.top1_agreement"}
    assert gap["gap_to_4bit.mean_kl"]["value"] > 1e-6 and gap["gap_to_4bit.mean_kl"]["limit"] is None, (
        "but fails nothing"
    )


def test_unsloth_is_imported_before_transformers(tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported after, it leaves classes unpatched; and `prepare`, which may run first, needs transformers."""
    stand_in = 'import sys\nraise RuntimeError("too late" if "transformers" in sys.modules else "in time")\n'
    (tmp_path / "unsloth.py").write_text(stand_in)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("UNSLOTH_ALLOW_CPU", "1")
    done = command("train", SMOKE, "--runs-dir", tmp_path / "runs", "--set", "engine.backend=unsloth", ok=False)
    assert "in time" in done.stderr


def stopped(arguments: list[str], step: str, number: signal.Signals) -> subprocess.Popen[str]:
    """A training that was sent a signal as it printed a step."""
    process = program.start("train", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if f"step {step}" in line:
            process.send_signal(number)
            break
    process.stdout.read()
    process.wait()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_and_a_killed_run_go_on_to_the_losses_and_the_adapter_of_a_whole_one(
    smoke: Any, tmp_path: Path, command: Any, number: signal.Signals
) -> None:
    """Stopped, it saves its step; killed, it has its last checkpoint. Only its own recipe goes on with either."""
    settings = ("train.logging_steps=1", "train.save_steps=5", "train.max_steps=8")
    options = [str(SMOKE), *(part for one in settings for part in ("--set", one))]
    arguments, run = [*options, "--runs-dir", str(tmp_path)], smoke.copy(tmp_path, "prepare")
    process = stopped(arguments, "2/8", number)
    assert process.returncode == 130 and process.stderr is not None
    errors = process.stderr.read()
    assert "which is saved" in errors and "Traceback" not in errors
    [saved] = [int(path.name.split("-")[1]) for path in (run / "train" / "checkpoints").glob("checkpoint-*")]
    assert saved < 5 and not (run / "train" / "adapter").exists()

    refused = command("train", *arguments, "--set", "train.beta=0.3", ok=False)
    assert refused.returncode == 1
    assert "train.beta is 0.3, was 0.1" in refused.stderr and "--fresh" in refused.stderr
    assert command("eval", *arguments, ok=False).returncode == 1

    assert stopped(arguments, "7/8", signal.SIGKILL).returncode == -signal.SIGKILL
    # What a kill in the middle of writing a checkpoint leaves: newer, and without its last file.
    (run / "train" / "checkpoints" / "checkpoint-7").mkdir()
    resumed = command("train", *arguments).stdout
    assert "resumed from step 5" in resumed and "reference of" not in resumed, "it was begun without that cache"

    whole = smoke.copy(tmp_path / "whole", "prepare")
    command("train", *options, "--runs-dir", whole.parent)
    keep = ("step", "loss", "rewards/margins", "logps/chosen", "learning_rate")
    assert [[row[key] for key in keep] for row in rows(run)] == [[row[key] for key in keep] for row in rows(whole)]
    adapters = [one / "train" / "adapter" / "adapter_model.safetensors" for one in (run, whole)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_loss_that_is_no_number_stops_and_names_the_pairs(tmp_path: Path, command: Any) -> None:
    """The model's own weights are at fault here: one NaN in the final norm."""
    import shutil

    from dpo_cli import smoke as builtin
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(builtin.resolve("builtin:tiny-qwen3"), broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    settings = ["--set", f"model.id={broken}", "--set", "engine.reference_cache=off"]  # which would see it before
    done = command("train", SMOKE, "--runs-dir", tmp_path / "runs", *settings, ok=False)
    assert done.returncode == 1
    assert "the loss is nan" in done.stderr
    ids = done.stderr.split("train.jsonl, rows ")[1].splitlines()[0].split(", ")
    known = {json.loads(line)["id"] for line in (tmp_path / "runs/smoke/data/train.jsonl").read_text().splitlines()}
    assert 0 < len(ids) <= 8 and set(ids) <= known, "those of one pass"


@pytest.mark.slow  # test_sft_then_dpo.py trains on from an adapter, too
def test_after_a_kill_the_adapter_it_began_with_is_still_the_reference(
    smoke: Any, tmp_path: Path, command: Any
) -> None:
    adapter = smoke.folder / "train" / "adapter"
    settings = [f"model.adapter={adapter}", "train.logging_steps=1", "train.max_steps=8", "train.save_steps=3"]
    options = [str(SMOKE), *(part for one in settings for part in ("--set", one))]
    for runs in (tmp_path, tmp_path / "whole"):
        smoke.copy(runs, "prepare")
    command("train", *options, "--runs-dir", tmp_path / "whole")
    arguments = [*options, "--runs-dir", str(tmp_path)]
    stopped(arguments, "5/8", signal.SIGKILL)
    assert "resumed from step 3" in command("train", *arguments).stdout
    assert [row["loss"] for row in rows(tmp_path / "smoke")] == [
        row["loss"] for row in rows(tmp_path / "whole" / "smoke")
    ]


def test_an_adapter_of_another_model_is_refused(smoke: Any, tmp_path: Path, command: Any) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(smoke.folder / "train" / "adapter", other)
    weights = load_file(other / "adapter_model.safetensors")
    save_file({name.replace("layers.1.", "layers.7."): value for name, value in weights.items()},
              other / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip
    smoke.copy(tmp_path, "prepare")
    done = command("train", SMOKE, "--runs-dir", tmp_path, "--set", f"model.adapter={other}", ok=False)
    assert done.returncode == 1
    assert "an adapter of another model" in done.stderr and "model.adapter" in done.stderr


def test_the_plan_says_what_a_run_takes_and_stops(smoke: Any, command: Any) -> None:
    """Exit code 3 where the longest pairs don't fit; nothing is trained either way."""
    before = (smoke.folder / "manifest.json").read_bytes()
    fits = command("train", SMOKE, "--runs-dir", smoke.runs, "--plan")
    assert "It fits." in fits.stdout and "1024 tokens" in fits.stdout
    assert re.search(r"Time: about [\d.]+ seconds for 48 steps of", fits.stdout), fits.stdout
    table = fits.stdout[fits.stdout.index("plan: ") :]  # above it stands the long path of this test's folder
    assert all(len(line) <= 80 for line in table.splitlines())
    narrow = ("--set", "engine.memory_limit=0.5")
    tight = command("train", SMOKE, "--runs-dir", smoke.runs, "--plan", *narrow, ok=False)
    assert tight.returncode == 3
    assert "does not fit" in tight.stdout and "Time: not measured" in tight.stdout
    assert (smoke.folder / "manifest.json").read_bytes() == before
