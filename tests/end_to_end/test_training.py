"""What only shows in a real training run: a kill and a resume, TRL's own figures, 4-bit weights, real text."""

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

REPOSITORY = Path(__file__).parents[2]
SMOKE = REPOSITORY / "recipes" / "smoke.yaml"


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "train" / "log.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_to_the_same_losses_and_the_same_adapter(smoke: Any, tmp_path: Path, command: Any) -> None:
    arguments = [str(SMOKE), "--runs-dir", str(tmp_path)]
    process = program.start("train", *arguments, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if "step 35/48" in line:  # checkpoint-25 is whole by then, and steps 26 to 35 are logged
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL
    # What a kill in the middle of writing a checkpoint leaves: newer, and without its last file.
    (tmp_path / "smoke" / "train" / "checkpoints" / "checkpoint-40").mkdir()

    assert "resumed from step 25" in command("train", *arguments).stdout
    keep = ("step", "loss", "rewards/margins", "logps/chosen", "learning_rate")
    resumed, whole = (
        [{key: row[key] for key in keep} for row in rows(run)] for run in (tmp_path / "smoke", smoke.folder)
    )
    assert resumed == whole
    adapters = [run / "train" / "adapter" / "adapter_model.safetensors" for run in (tmp_path / "smoke", smoke.folder)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


FEW_ANSWERS = ("eval.prompts=2", "eval.max_new_tokens=8")


@pytest.mark.slow  # tests/evaluate/test_agreement.py compares them pair by pair, without the command
def test_rewards_agree_with_what_trl_logs_on_the_same_pairs(tmp_path: Path, command: Any) -> None:
    settings = [
        "train.max_steps=6",
        "train.eval_strategy=steps",
        "train.eval_steps=6",
        "train.per_device_eval_batch_size=1",
        *FEW_ANSWERS,
    ]
    arguments = [str(SMOKE), "--runs-dir", str(tmp_path), *(part for one in settings for part in ("--set", one))]
    command("train", *arguments)
    command("eval", *arguments)
    metrics = json.loads((tmp_path / "smoke" / "eval" / "metrics.json").read_text())
    for language in ("en", "zh"):
        figures = metrics["languages"][language]["pairs"]
        logged = next(row for row in rows(tmp_path / "smoke") if f"eval_{language}_loss" in row)
        # TRL logs means over batches; of one pair each they are means over pairs. Rewards are beta x drift.
        assert figures["margin"]["value"] == pytest.approx(logged[f"eval_{language}_rewards/margins"], abs=1e-4)
        drift = logged[f"eval_{language}_rewards/chosen"] / 0.1
        assert figures["chosen_drift"]["value"] == pytest.approx(drift, abs=1e-3)
        assert figures["reward_accuracy"]["value"] == pytest.approx(logged[f"eval_{language}_rewards/accuracies"])


def test_4_bit_weights_train_and_learn_on_a_cpu(tmp_path: Path, command: Any) -> None:
    settings = ("model.load_in_4bit=true", "train.max_steps=24", "data.eval_size=60", *FEW_ANSWERS)
    arguments = [str(SMOKE), "--runs-dir", str(tmp_path), *(part for one in settings for part in ("--set", one))]
    for stage in ("train", "eval", "export"):
        command(stage, *arguments)
    metrics = json.loads((tmp_path / "smoke" / "eval" / "metrics.json").read_text())
    assert metrics["pairs"]["reward_accuracy"]["value"] >= 0.9


def test_real_text_goes_through_prepare_and_some_steps(tmp_path: Path, command: Any) -> None:
    data = Path(os.environ.get("DPO_CLI_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    files = {"en": data / "dpo_en_demo_a.json", "zh": data / "dpo_zh_demo_a.json"}
    if not all(file.is_file() for file in files.values()):
        pytest.skip(f"no real text in {data}; set DPO_CLI_REAL_DATA to a folder with {files['en'].name}")
    recipe = tmp_path / "real.yaml"
    recipe.write_text(
        "model: {id: 'builtin:tiny-qwen3', load_in_4bit: false, max_length: 2048}\n"
        "lora: {r: 8, alpha: 16}\n"
        "data:\n  languages: null\n  total: 160\n  sources:\n"
        + "".join(f"    - {{id: {file}, layout: sharegpt, language: {name}}}\n" for name, file in files.items())
        + "train: {per_device_train_batch_size: 2, gradient_accumulation_steps: 2, max_steps: 2, logging_steps: 1,"
        " gradient_checkpointing: false}\n",
        encoding="utf-8",
    )
    command("prepare", recipe, "--runs-dir", tmp_path / "runs")
    report = json.loads((tmp_path / "runs" / "real" / "data" / "report.json").read_text(encoding="utf-8"))
    assert report["pairs"]["train"] > 100
    command("train", recipe, "--runs-dir", tmp_path / "runs")
    losses = [row["loss"] for row in rows(tmp_path / "runs" / "real")]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), "policy and reference start equal: ln 2"
    source = files["zh"].read_text(encoding="utf-8")
    zh = [json.loads(line) for line in (tmp_path / "runs" / "real" / "data" / "train.jsonl").read_text().splitlines()]
    answers = [row["chosen"][0]["content"] for row in zh if row["language"] == "zh"]
    assert answers and sum(json.dumps(text, ensure_ascii=False)[1:41] in source for text in answers) >= 0.9 * len(
        answers
    )


@pytest.mark.parametrize("more", [(), ("--plan",)], ids=["training", "plan"])
def test_unsloth_is_imported_before_transformers(
    tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """Imported after, it leaves classes unpatched; and `prepare`, which may run first, needs transformers."""
    stand_in = 'import sys\nraise RuntimeError("too late" if "transformers" in sys.modules else "in time")\n'
    (tmp_path / "unsloth.py").write_text(stand_in)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("UNSLOTH_ALLOW_CPU", "1")
    done = command("train", SMOKE, "--runs-dir", tmp_path / "runs", "--set", "engine.backend=unsloth", *more, ok=False)
    assert "in time" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_run_saves_its_step_and_is_resumed_by_its_own_recipe_only(
    tmp_path: Path, command: Any, number: signal.Signals
) -> None:
    settings = ("train.logging_steps=1", "train.save_steps=30", "train.max_steps=12")
    arguments = [str(SMOKE), "--runs-dir", str(tmp_path), *(part for one in settings for part in ("--set", one))]
    process = program.start("train", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if "step  4/12" in line:
            process.send_signal(number)
            break
    process.stdout.read()
    errors = process.stderr.read()
    assert process.wait() == 130
    saved = [path.name for path in (tmp_path / "smoke" / "train" / "checkpoints").glob("checkpoint-*")]
    assert len(saved) == 1 and int(saved[0].split("-")[1]) < 12
    assert "which is saved" in errors and "Traceback" not in errors
    assert not (tmp_path / "smoke" / "train" / "adapter").exists()

    refused = command("train", *arguments, "--set", "train.beta=0.3", ok=False)
    assert refused.returncode == 1
    assert "train.beta is 0.3, was 0.1" in refused.stderr and "--fresh" in refused.stderr
    assert command("eval", *arguments, ok=False).returncode == 1
    assert f"resumed from step {saved[0].split('-')[1]}" in command("train", *arguments).stdout


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


@pytest.fixture(scope="module")
def from_adapter(smoke: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that went on from the smoke run's adapter, and the arguments of its commands."""
    sft, runs = smoke.folder / "train" / "adapter", tmp_path_factory.mktemp("whole")
    settings = [f"model.adapter={sft}", "train.logging_steps=1", "train.max_steps=8", "train.save_steps=3"]
    arguments = [str(SMOKE), *(part for one in (*settings, *FEW_ANSWERS) for part in ("--set", one))]
    done = program.run("train", *arguments, "--runs-dir", runs, timeout=None)
    assert done.returncode == 0, done.stderr
    return runs, arguments


@pytest.mark.slow  # test_sft_then_dpo.py trains on from an adapter, too
def test_training_goes_on_from_an_adapter_and_holds_it_as_the_reference(
    smoke: Any, from_adapter: tuple[Path, list[str]], command: Any
) -> None:
    """An SFT adapter is the start and the reference: ln 2 at first, and its log-probabilities in eval."""
    runs, arguments = from_adapter
    logged = rows(runs / "smoke")
    assert logged[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert logged[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-4)

    command("eval", *arguments, "--runs-dir", runs)
    reference, policy = (
        {row["id"]: row[key] for row in map(json.loads, (run / "eval" / "pairs.jsonl").read_text().splitlines())}
        for run, key in ((runs / "smoke", "reference_chosen"), (smoke.folder, "policy_chosen"))
    )
    assert reference == pytest.approx(policy, abs=1e-3)
    command("export", *arguments, "--runs-dir", runs)


@pytest.mark.slow
def test_after_a_kill_the_adapter_it_began_with_is_still_the_reference(
    from_adapter: tuple[Path, list[str]], tmp_path: Path, command: Any
) -> None:
    runs, arguments = from_adapter
    process = program.start("train", *arguments, "--runs-dir", tmp_path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if "step 5/8" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert "resumed from step 3" in command("train", *arguments, "--runs-dir", tmp_path).stdout
    assert [row["loss"] for row in rows(tmp_path / "smoke")] == [row["loss"] for row in rows(runs / "smoke")]


def test_an_adapter_of_another_model_is_refused(smoke: Any, tmp_path: Path, command: Any) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(smoke.folder / "train" / "adapter", other)
    weights = load_file(other / "adapter_model.safetensors")
    save_file({name.replace("layers.1.", "layers.7."): value for name, value in weights.items()},
              other / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip
    done = command("train", SMOKE, "--runs-dir", tmp_path / "runs", "--set", f"model.adapter={other}", ok=False)
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
