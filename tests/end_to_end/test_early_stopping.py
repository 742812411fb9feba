"""`engine.early_stopping`: the run ends where a held-out figure gets no better, and the best adapter is the result."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.records import chooses
from tests import program

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
# Accuracy comes to 1.0 within a few steps on the smoke data; from there on nothing is better.
SETTINGS = (
    "engine.early_stopping={metric: eval_rewards/accuracies, patience: 2}",
    "train.eval_strategy=steps",
    "train.eval_steps=3",
    "train.logging_steps=1",
    "data.eval_size=32",
)


def arguments(runs: Path, *settings: str) -> list[str]:
    options = (part for one in (*SETTINGS, *settings) for part in ("--set", one))
    return [str(SMOKE), "--runs-dir", str(runs), *options]


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The `train` folder of a run that was stopped early, and what was printed."""
    runs = tmp_path_factory.mktemp("whole")
    done = program.run("train", *arguments(runs), timeout=None)
    assert done.returncode == 0, done.stderr
    return runs / "smoke" / "train", " ".join(done.stdout.split())


def test_stops_and_keeps_the_best_adapter(whole: tuple[Path, str], command: Any) -> None:
    folder, said = whole
    metrics = json.loads((folder / "metrics.json").read_text())
    held_out = [
        row
        for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        if "eval_rewards/accuracies" in row
    ]
    accuracies = {row["step"]: row["eval_rewards/accuracies"] for row in held_out}
    best = metrics["best"]["step"]
    assert metrics["steps"] == best + 2 * 3 < 48
    why = "eval_rewards/accuracies has not improved for 2 evaluations"
    assert f"! stopped at step {best + 6} of 48: {why}; the adapter of step {best} is kept" in said
    assert accuracies[best] == max(accuracies.values())
    assert all(value < accuracies[best] for step, value in accuracies.items() if step < best)
    assert weights(folder / "adapter") == weights(folder / "checkpoints" / f"checkpoint-{best}")
    assert weights(folder / "adapter") != weights(folder / "checkpoints" / f"checkpoint-{metrics['steps']}")

    # What chose the adapter is not what it is measured on.
    command("eval", *arguments(folder.parents[1], "eval.prompts=0"))
    held_out = [json.loads(line) for line in (folder.parent / "data" / "eval.jsonl").read_text().splitlines()]
    measured = {json.loads(line)["id"] for line in (folder.parent / "eval" / "pairs.jsonl").read_text().splitlines()}
    assert measured == {row["id"] for row in held_out if not chooses(row)}
    assert 0.3 * len(held_out) < len(measured) < 0.7 * len(held_out)


@pytest.mark.slow
def test_killed_one_evaluation_before_its_end_the_run_remembers_how_long_it_has_waited(
    whole: tuple[Path, str], tmp_path: Path, command: Any
) -> None:
    folder, _ = whole
    metrics = json.loads((folder / "metrics.json").read_text())
    best, killed = metrics["best"]["step"], tmp_path / "smoke" / "train"
    process = program.start("train", *arguments(tmp_path), stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if f"step {best + 5:>2}/48" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert f"resumed from step {best + 3}" in command("train", *arguments(tmp_path)).stdout
    again = json.loads((killed / "metrics.json").read_text())
    assert (again["steps"], again["best"]) == (metrics["steps"], metrics["best"])
    assert weights(killed / "adapter") == weights(folder / "adapter")


def test_figures_over_all_languages_are_those_of_the_languages_weighted(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows = {name: next(row for row in log if f"eval_{name}loss" in row) for name in ("", "en_", "zh_")}
    pairs = [json.loads(line) for line in (folder.parent / "data" / "eval.jsonl").read_text().splitlines()]
    pairs = [pair for pair in pairs if chooses(pair)]
    share = sum(pair["language"] == "en" for pair in pairs) / len(pairs)
    for figure in ("loss", "rewards/accuracies", "rewards/margins"):
        en, zh = rows["en_"][f"eval_en_{figure}"], rows["zh_"][f"eval_zh_{figure}"]
        assert abs(rows[""][f"eval_{figure}"] - (share * en + (1 - share) * zh)) < 1e-9


def test_a_language_that_is_not_held_out_is_said_before_training(tmp_path: Path, command: Any) -> None:
    few = ("data.total=24", "data.eval_size=20")
    refused = command("train", *arguments(tmp_path, *few, "engine.early_stopping.metric=eval_fr_loss"), ok=False)
    assert refused.returncode == 1
    assert "eval_fr_loss is never measured: the held-out pairs are in en, zh" in refused.stderr
