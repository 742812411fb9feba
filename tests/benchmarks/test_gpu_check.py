"""`make gpu-check` on a CPU and a tiny model: each question gets its answer, and the next call goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("gpu_check.py")
pytestmark = pytest.mark.slow


def gpu_check(folder: Path, only: str, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run it; what it printed, and all answers on plain transformers (or on none) by question."""
    place = ["--out", folder / "out", "--work", folder / "work"]
    command = [sys.executable, SCRIPT, "--device", "cpu", "--shapes", "tiny", *place, "--only", only, *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ, check=False)
    file = folder / "out" / "answers.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return done, {row["question"].replace(" tiny", "").replace(" hf", ""): row for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu-check")


def test_every_question_gets_an_answer_with_its_figures(folder: Path) -> None:
    done, answers = gpu_check(folder, "train,resume,evaluate,export,memory")
    assert done.returncode in (0, 1), done.stderr
    assert [*answers] == ["load", "train", "resume", "evaluate", "export", "memory at 128"]
    # Whether the prediction holds is not this test's to say: it is of the card.
    assert {row["state"] for name, row in answers.items() if name != "memory at 128"} == {"ok"}, done.stdout
    memory = answers["memory at 128"]
    assert memory["time"].startswith("Time: about ")
    assert memory["predicted_over_seen"] == pytest.approx(memory["predicted_gib"] / memory["seen_gib"], rel=0.02)
    assert answers["load"]["layers_in_4bit"] == 11, "two layers of seven linear modules, and one MLP left in 16 bits"

    train = answers["train"]
    assert train["steps"] == 6 and train["shared_prefix"] is True and train["token_budget"] > 0
    assert train["first_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert answers["resume"]["resumed_from"] == 2
    assert answers["resume"]["losses_apart"] == answers["resume"]["margins_apart_of_largest"] == 0.0
    assert answers["export"]["broken"] == [] and answers["export"]["merged.mean_kl"] < 5e-3
    assert answers["evaluate"]["answers"] > 0

    table = (folder / "out" / "table.md").read_text(encoding="utf-8")
    assert f"| resume tiny hf | ok | {answers['resume']['seconds']} | resumed from 2; " in table
    assert sorted(file.name for file in (folder / "out").iterdir()) == ["answers.jsonl", "log.txt", "table.md"]


def test_the_next_call_goes_on_after_what_is_answered_and_asks_again_what_failed(folder: Path, tmp_path: Path) -> None:
    """fp16 is refused on a CPU, so that nothing can be trained; the others say so, and the model is not made again."""
    shutil.copytree(folder / "work", tmp_path / "work", ignore=shutil.ignore_patterns("runs"))
    (tmp_path / "out").mkdir()
    loaded = (folder / "out" / "answers.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    (tmp_path / "out" / "answers.jsonl").write_text(loaded, encoding="utf-8")

    done, answers = gpu_check(tmp_path, "train,export", "--set", "train.fp16=true")
    assert done.returncode == 1
    assert answers["load"] == json.loads(loaded)
    assert answers["train"]["state"] == answers["export"]["state"] == "failed"
    assert answers["train"]["error"] == "error: float16 training needs a GPU (exit code 1)"

    done, answers = gpu_check(tmp_path, "train,resume", "--minutes", "0")
    assert done.returncode == 1, "what failed still has"
    first, *others = done.stdout.splitlines()
    assert first == "at most 14 minutes for 2 questions, in calls of 0"
    assert others[:2] == ["resume tiny hf not reached", "train tiny hf not reached"]
    assert "resume" not in answers
