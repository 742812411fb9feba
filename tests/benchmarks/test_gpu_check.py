"""`make gpu-check` on a CPU and a tiny model: each question gets its answer, and one that fails loses no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("gpu_check.py")
pytestmark = pytest.mark.slow


def gpu_check(
    out: Path, only: str, *options: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, Any]]]:
    """Run it; what it printed, and this call's answers on plain transformers (or on none) by question."""
    command = [sys.executable, SCRIPT, "--device", "cpu", "--shapes", "tiny", "--out", out, "--only", only]
    file = out / "answers.jsonl"
    before = len(file.read_text().splitlines()) if file.is_file() else 0
    done = subprocess.run([*map(str, command), *options], capture_output=True, text=True, env=os.environ, check=False)
    rows = [json.loads(line) for line in file.read_text().splitlines()[before:]]
    return done, {row["question"]: row for row in rows if row["backend"] in ("", "hf")}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu-check")


def test_every_question_gets_an_answer_with_its_figures(out: Path) -> None:
    done, answers = gpu_check(out, "train,agree,memory,resume,evaluate,export")
    assert done.returncode in (0, 1), done.stderr
    assert list(answers) == ["load", "train", "memory at 128", "resume", "evaluate", "export"]
    assert {name: row["state"] for name, row in answers.items() if name != "memory at 128"} == dict.fromkeys(
        ("load", "train", "resume", "evaluate", "export"), "ok"
    ), done.stdout
    assert answers["load"]["layers_in_4bit"] == 14, "two layers of seven linear modules"

    train = answers["train"]
    assert train["steps"] == 6 and train["shared_prefix"] is True and train["token_budget"] > 0
    assert train["first_loss"] == pytest.approx(0.6931, abs=1e-4)
    # 7,500 pairs in steps of 4.
    assert train["minutes_of_7500_pairs"] == pytest.approx(train["seconds_per_step"] * 7500 / 4 / 60, abs=0.1)

    assert answers["resume"]["resumed_from"] == 2
    assert answers["resume"]["losses_apart"] == answers["resume"]["margins_apart_of_largest"] == 0.0
    assert answers["export"]["broken"] == [] and answers["export"]["merged.mean_kl"] < 5e-3
    assert answers["evaluate"]["answers"] > 0 and answers["evaluate"]["tokens"] > answers["evaluate"]["answers"]

    # Whether the prediction holds is not this test's to say: it is of the card.
    memory = answers["memory at 128"]
    assert memory["predicted_over_seen"] == pytest.approx(memory["predicted_gib"] / memory["seen_gib"], rel=0.02)

    table = (out / "table.md").read_text(encoding="utf-8")
    assert f"| resume | tiny | hf | ok | {answers['resume']['seconds']} | resumed from 2; " in table
    assert "torch " in table and "--device cpu" in table and table in done.stdout


def test_a_question_that_fails_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    """fp16 is refused on a CPU, so that nothing can be trained; and the backend that is not there is said not to be."""
    done, answers = gpu_check(tmp_path, "train,export", "--set", "train.fp16=true")
    assert done.returncode == 1
    assert answers["load"]["state"] == "ok"
    assert answers["train"]["state"] == answers["export"]["state"] == "failed"
    assert answers["train"]["error"] == "error: float16 training needs a GPU (exit code 1)"
    assert "train" in answers["export"]["error"]
    assert "| train | tiny | unsloth | not installed |" in done.stdout


def test_what_the_time_did_not_reach_is_said_not_to_be_reached(tmp_path: Path) -> None:
    done, answers = gpu_check(tmp_path, "train,speed", "--minutes", "0.01")
    assert done.returncode == 0
    assert {row["state"] for row in answers.values()} == {"not reached"}
    assert list(answers) == ["load", "train", "speed"]
