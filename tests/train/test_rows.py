"""The rows that train are those that stand in data/*.jsonl, whatever their text looks like and wherever it stands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from dpo_cli.errors import DpoError
from dpo_cli.recipe import Recipe, load
from dpo_cli.records import write_jsonl
from dpo_cli.train.rows import check_answers, held_out_rows, train_rows

DATES = ("2031-01-20 19:00:00", "2031-01-20", "19:00", "2031-01-20T19:00:00Z", "2031-01-20T19:00:00.123456789+08:00")
DATA = {"dpo": "pairs", "kto": "unpaired", "lipo": "ranked"}
KWARGS = {"enable_thinking": False}


def says(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def row(method: str, index: int, good: str, bad: str, **more: Any) -> dict[str, Any]:
    """A row as `prepare` writes it in the data format of the method."""
    common = {"id": f"{index:016x}", "prompt": says("user", f"When, {index}?"), "chat_template_kwargs": KWARGS}
    common |= {"language": "en", "source": "own"}
    if method == "kto":
        return {**common, "completion": says("assistant", good), "label": True, **more}
    if method == "lipo":
        candidates = [{"text": text, "score": None, "model": None} | more for text in (good, bad)]
        return {**common, "candidates": candidates}
    sides = {"chosen": says("assistant", good), "rejected": says("assistant", bad)}
    return {**common, **sides, "margin": None, "score_chosen": None, "score_rejected": None, **more}


def answers(dataset: Any) -> list[str]:
    names = [name for name in ("chosen", "rejected", "completion", "answers") if name in dataset.column_names]
    found = [answer for one in dataset for name in names for answer in one[name]]
    return [message["content"] for answer in found for message in (answer if isinstance(answer, list) else [answer])]


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def of(method: str) -> Recipe:
        path = tmp_path / "r.yaml"
        path.write_text("model: {id: nobody/none}\ndata: {sources: [{id: rows.jsonl}]}\n", encoding="utf-8")
        return load(path, [f"train.method={method}", f"data.format={DATA[method]}"])

    return of


def test_reading_the_rows_draws_no_bar_of_datasets(
    recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As outside of these tests, whose environment switches them off.
    monkeypatch.setattr(sys.modules["datasets.utils.tqdm"], "_hf_datasets_progress_bars_disabled", False)
    write_jsonl(tmp_path / "train.jsonl", [row("dpo", 1, f"not cached: {tmp_path}", "bad")])
    train_rows(recipe("dpo"), tmp_path / "train.jsonl")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("method", DATA)
def test_answers_that_look_like_dates_stay_text(recipe: Any, tmp_path: Path, method: str) -> None:
    for date in DATES:
        path = tmp_path / "train.jsonl"
        write_jsonl(path, (row(method, index, date, date[:-1] + "1") for index in range(4)))
        texts = {date} if method == "kto" else {date, date[:-1] + "1"}
        assert set(answers(train_rows(recipe(method), path))) == texts
        assert set(answers(held_out_rows(recipe(method), path)["en"])) == texts


def test_what_only_a_late_row_has_is_no_surprise(recipe: Any, tmp_path: Path) -> None:
    """Far behind the first ten megabytes, where Arrow's JSON reader has settled on its types."""
    path, long = tmp_path / "train.jsonl", "x" * 120_000
    late = row("dpo", 100, "last", "short", margin=0.5, score_chosen=1, extra="new")
    write_jsonl(path, [*(row("dpo", index, long, "short") for index in range(100)), late])
    assert path.stat().st_size > 11_000_000
    rows = train_rows(recipe("dpo"), path)
    assert len(rows) == 101
    assert "last" in {text for text in answers(rows) if len(text) < 10}


def test_rows_are_read_again_where_only_their_content_has_changed(recipe: Any, tmp_path: Path) -> None:
    """Same path, size and time: what trains is what stands there, and what the manifest hashes."""
    path = tmp_path / "train.jsonl"
    for word in ("first", "other"):
        write_jsonl(path, [row("dpo", 1, word, "bad")])
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert answers(train_rows(recipe("dpo"), path)) == [word, "bad"]


def test_equal_rows_elsewhere_have_the_same_cache(recipe: Any, tmp_path: Path) -> None:
    """A run that is copied or named anew tokenises nothing again."""
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [row("dpo", 1, "good", "bad")])
        found.append(train_rows(recipe("dpo"), tmp_path / name / "train.jsonl"))
    assert found[0]._fingerprint == found[1]._fingerprint
    assert found[0].cache_files == found[1].cache_files != []


def test_nothing_held_out_is_an_error_before_training(recipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    write_jsonl(path, [])
    with pytest.raises(DpoError, match="nothing was held out") as caught:
        held_out_rows(recipe("dpo"), path)
    assert "train.eval_strategy" in str(caught.value) and "data.eval_fraction" in str(caught.value)


def test_chinese_comes_through(recipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [row("dpo", 1, "你好，世界。\u2028下一行 🐉", "不知道")])
    assert answers(train_rows(recipe("dpo"), path)) == ["你好，世界。\u2028下一行 🐉", "不知道"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([([1, 2], [3]), ([4], [5])], None),
        ([([1, 2], [1, 2]), ([4], [5]), ([4], [6])], "in 1 of 3 pairs all answers have the same tokens"),
        ([([1, 2], [1, 2]), ([4], [4]), ([4], [6])], "2 of 3 pairs have answers that all come to the same tokens"),
        ([([1, 2], []), ([4], [5])], "1 of 2 pairs have an answer without tokens, so there is nothing to learn: a0"),
    ],
)
def test_answers_that_are_gone_once_they_are_tokens(recipe: Any, rows: list[Any], said: str | None) -> None:
    found = [{"id": f"a{index}", "chosen_ids": one, "rejected_ids": two} for index, (one, two) in enumerate(rows)]
    try:
        remarks = check_answers(recipe("dpo"), Dataset.from_list(found), "pairs")
    except DpoError as error:
        remarks = [error.message]
    assert remarks == [] if said is None else said in remarks[0]
