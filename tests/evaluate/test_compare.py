"""Runs side by side: what may be compared, and what is said where it may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import recipe
from dpo_cli.errors import DpoError
from dpo_cli.evaluate.compare import Compared, compare
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
SAMPLING = {"prompts": 8, "max_new_tokens": 8, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 42}


def evaluated(
    folder: Path,
    scores: list[float | None] | None,
    *settings: str,
    held_out: str = "a",
    judge: str = "m",
    sampling: dict[str, Any] | None = None,
) -> tuple[Recipe, Run]:
    """A run as `eval` leaves it, as far as a comparison reads it."""
    (folder / "eval").mkdir(parents=True)
    (folder / "data").mkdir()
    answers = {side: [{"role": "assistant", "content": f"{side} {held_out}"}] for side in ("chosen", "rejected")}
    pair = {"id": "p0", "prompt": [{"role": "user", "content": "?"}], "language": "en", "source": "s"}
    ranked = {"candidates": [{"text": answers[side][0]["content"], "score": None} for side in answers]}
    row = {**pair, **(ranked if "train.method=lipo" in settings else answers)}
    (folder / "data" / "eval.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "train").mkdir()
    (folder / "train" / "metrics.json").write_text(json.dumps({"seconds": 1.0, "peak_memory_bytes": 1}))
    judged = None if scores is None else {"kind": "openai", "model": judge, "template_sha256": "t"}
    metrics = {"judge": judged, "sampling": None if sampling == {} else {**SAMPLING, **(sampling or {})}}
    (folder / "eval" / "metrics.json").write_text(json.dumps(metrics))
    rows = [{"id": f"p{number}", "score": score} for number, score in enumerate(scores or [])]
    rows.append({"id": "calibration/p0", "score": 0.0})
    for name in ("judgments", "samples"):
        (folder / "eval" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with open(folder / "eval" / "judgments.jsonl", "a") as file:
        file.write(json.dumps(rows[-1]) + "\n")
    return recipe.load(SMOKE, list(settings)), Run(folder)


def strengths(compared: list[Compared]) -> list[Any]:
    return [one.strength and one.strength["value"] for one in compared]


def test_who_wins_more_is_stronger_and_failures_and_calibration_count_nowhere(tmp_path: Path) -> None:
    strong = evaluated(tmp_path / "strong", [1, 1, 1, 0.5, 1, 0.75, 1, 0])
    even = evaluated(tmp_path / "even", [1, 0, 1, 0, 0.5, None, 1, 0])
    weak = evaluated(tmp_path / "weak", [0, 0, 0.25, 0, 1, 0, 0, 0])
    compared, remarks = compare([strong, even, weak])
    assert remarks == []
    assert [one.name for one in compared] == ["strong", "even", "weak"]
    first, second, third = strengths(compared)
    assert first > 0 and second == pytest.approx(0, abs=1e-6) and third < 0
    figure = compared[1].strength
    assert figure and figure["n"] == 7 and figure["low"] is not None and figure["high"] is not None
    assert figure["low"] < 0 < figure["high"]


def test_strengths_are_over_one_base(tmp_path: Path) -> None:
    small = evaluated(tmp_path / "small", [1, 1, 0, 1])
    large = evaluated(tmp_path / "large", [1, 0, 0, 1], "model.id=Qwen/Qwen3-1.7B")
    compared, remarks = compare([small, large])
    assert strengths(compared) == [None, None]
    assert "different base models" in remarks[0]


def test_a_judge_without_samples_has_no_strengths(tmp_path: Path) -> None:
    """`eval.prompts: 0` leaves a judge only its calibration."""
    compared, remarks = compare([evaluated(tmp_path / name, [], sampling={}) for name in ("one", "two")])
    assert strengths(compared) == [None, None] and remarks == []


def test_a_run_beside_itself_is_a_mistake(tmp_path: Path) -> None:
    loaded, run = evaluated(tmp_path / "one", [1, 1, 0, 1])
    with pytest.raises(DpoError, match="stands twice"):
        compare([(loaded, run), (loaded, Run(tmp_path / "elsewhere" / ".." / "one"))])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"held_out": "b"}, "different held-out pairs"),
        ({"judge": "another"}, "different judges"),
        ({"sampling": {"temperature": 0.0}}, "sampled differently"),
        ({"sampling": {"prompts": 4}}, None),
    ],
)
def test_strengths_need_the_same_pairs_judge_and_sampling(
    tmp_path: Path, other: dict[str, Any], says: str | None
) -> None:
    runs = [evaluated(tmp_path / "one", [1, 1, 0, 1]), evaluated(tmp_path / "two", [1, 0, 0, 1], **other)]
    compared, remarks = compare(runs)
    if says:
        assert says in remarks[0]
    assert (None in strengths(compared)) == (says is not None)


def test_a_run_that_no_judge_saw(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / "one", [1, 1, 0, 1]), evaluated(tmp_path / "two", None)]
    compared, remarks = compare(runs)
    assert strengths(compared) == [None, None]
    assert "no judge has seen two" in remarks[0]
    _, remarks = compare([runs[1], evaluated(tmp_path / "three", None)])
    assert remarks == [], "without any judge there is nothing to say"


def test_what_sets_a_recipe_apart_is_named_wherever_it_stands(tmp_path: Path) -> None:
    settings = ("train.beta=0.3", "data.total=100", "eval.prompts=5")
    runs = [evaluated(tmp_path / "one", None), evaluated(tmp_path / "two", None, *settings)]
    compared, _ = compare(runs)
    assert compared[0].differs == {}
    assert compared[1].differs == {"data.total": 100, "train.beta": 0.3, "eval.prompts": 5}


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / where / "smoke", None) for where in ("a", "b")]
    compared, _ = compare(runs)
    assert [one.name for one in compared] == [str(tmp_path / "a" / "smoke"), str(tmp_path / "b" / "smoke")]


def test_of_another_method_only_what_both_have_is_named(tmp_path: Path) -> None:
    """The best and the worst of a ranked list are the pairs of the other run."""
    settings = ("train.method=lipo", "train.learning_rate=0.1")
    runs = [evaluated(tmp_path / "one", None), evaluated(tmp_path / "two", None, *settings)]
    compared, remarks = compare(runs)
    assert remarks == []
    differs = compared[1].differs
    assert differs["train.method"] == "lipo" and differs["train.learning_rate"] == 0.1
    assert "train.label_smoothing" not in differs
