"""`dpo-cli init`: the recipe that it writes loads, names the data's layout and method, and replaces nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.cli import app
from dpo_cli.driver import Card, Driver
from dpo_cli.prepare import starter
from dpo_cli.recipe import check, load
from typer.testing import CliRunner

PAIRS = [
    {"prompt": f"问题{n}：为什么？", "chosen": f"因为{n}，所以如此。" * 9, "rejected": f"不知道{n}。" * 9}
    for n in range(60)
]
LABELLED = [{"prompt": f"Question {n}?", "completion": f"Answer {n}. " * 9, "label": n % 2 == 0} for n in range(60)]
ENGLISH = [{"prompt": f"Question {n}?", "chosen": f"Answer {n}. " * 9, "rejected": f"No {n}. " * 9} for n in range(60)]
LISTS = [
    {"instruction": f"Say {n}", "chosen": f"Here is {n}. " * 9, "rejected": f"No {n}. " * 9, "input": ""}
    for n in range(60)
]
NAMED = [{"question": one["prompt"], "good": one["chosen"], "bad": one["rejected"]} for one in PAIRS]
NEARLY = [{"Q": one["prompt"], "win": one["chosen"], "lose": one["rejected"]} for one in PAIRS]
LONE = [{"prompt": one["prompt"], "response": one["chosen"]} for one in PAIRS]


def init(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["init", *arguments])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starter, "find_driver", lambda: None)
    return tmp_path


@pytest.mark.parametrize(
    ("rows", "layout", "method", "language"),
    [
        (PAIRS, "pairs", "dpo", "zh"),
        (LABELLED, "kto", "kto", "en"),
        (LISTS, "alpaca", "dpo", "en"),
        (NAMED, "pairs", "dpo", "zh"),
        (NEARLY, "pairs", "dpo", "zh"),
        (LONE, "chat", "sft", "zh"),
        ([*PAIRS, *ENGLISH], "pairs", "dpo", None),  # each row decides
    ],
    ids=["pairs", "kto", "alpaca", "other names", "one unknown name", "one answer", "two languages"],
)
def test_a_recipe_for_a_file(folder: Path, rows: list[Any], layout: str, method: str, language: str | None) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "我的 data.jsonl").write_text(text, encoding="utf-8")
    done = init("我的 data.jsonl")
    assert done.exit_code == 0, done.output
    written = folder / "我的_data.yaml"
    assert f"next: dpo-cli check '{written.name}'" in done.stdout
    recipe = load(written)
    check(recipe, written)  # raises where a path or a setting would not work
    source = recipe.data.sources[0]
    assert (source.layout, recipe.train.method, source.language) == (layout, method, language)
    assert Path(source.id) == folder / "我的 data.jsonl"
    assert recipe.model.id == "builtin:tiny-qwen3"
    step = recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps
    assert step == 8 and "# 8 rows a step" in written.read_text(encoding="utf-8")
    assert len(written.read_text(encoding="utf-8").splitlines()) <= 12


def test_without_a_file_it_takes_the_built_in_data(folder: Path) -> None:
    assert init("-o", "first.yaml").exit_code == 0
    assert load(folder / "first.yaml").data.sources[0].id.startswith("builtin:")


def test_what_is_there_stays(folder: Path) -> None:
    (folder / "mine.yaml").write_text("mine", encoding="utf-8")
    done = init("-o", "mine.yaml")
    assert done.exit_code == 2 and "mine.yaml is there already" in done.stderr
    assert (folder / "mine.yaml").read_text(encoding="utf-8") == "mine"


def test_data_that_can_not_be_read_leave_no_recipe(folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"a": 1}\n' * 9, encoding="utf-8")
    done = init("bad.jsonl")
    assert done.exit_code == 2 and done.stderr.startswith("error: ")
    assert not (folder / "bad.yaml").exists()


@pytest.mark.parametrize(
    ("gigabytes", "model"), [(6, "0.6B"), (8, "1.7B"), (12, "1.7B"), (16, "4B"), (24, "8B"), (80, "8B")]
)
def test_the_card_decides_the_model(monkeypatch: pytest.MonkeyPatch, gigabytes: int, model: str) -> None:
    card = Card("some card", int(gigabytes * 1e9), 0)
    monkeypatch.setattr(starter, "find_driver", lambda: Driver("580.1", (card,)))
    assert f"Qwen3-{model}" in starter.starter().splitlines()[2]
