"""Runs side by side: what may be compared, and what is said where it may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import recipe
from dpo_cli.errors import DpoError
from dpo_cli.evaluate.compare import Compared, compare
from dpo_cli.evaluate.comparison_page import Comparison
from dpo_cli.evaluate.differences import HELD_OUT, JUDGE, Measured, best, differences, examples, measured
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


# -------------------------------------------------------------------------------------------------------- differences


def shares(won: int) -> Measured:
    """A run that won so many of 100 held-out prompts, the first ones."""
    values = {HELD_OUT: {f"p{number}": float(number < won) for number in range(100)}}
    return Measured(values, {HELD_OUT: "held out"})


def test_the_best_run_has_to_lead_every_other_one() -> None:
    found = best({"one": shares(80), "two": shares(60), "three": shares(50)}, False, [])
    assert found and (found.run, found.measure, found.told) == ("one", HELD_OUT, True)
    assert found.nearest.against == "two"
    assert found.nearest.change["value"] == pytest.approx(0.2) and found.nearest.change["n"] == 100
    near = best({"one": shares(80), "two": shares(50), "three": shares(79)}, False, [])
    assert near and not near.told and near.nearest.against == "three"


def test_a_run_that_got_worse_is_not_called_the_best() -> None:
    found = best({"broken": shares(99), "one": shares(80), "two": shares(60)}, False, ["broken"])
    assert found and found.run == "one"
    assert best({"broken": shares(99), "one": shares(80)}, False, ["broken"]) is None


def test_a_judge_that_saw_all_goes_first_and_shared_test_sets_where_held_out_pairs_differ() -> None:
    runs = {"one": shares(80), "two": shares(80)}
    for one, score in zip(runs.values(), (0.25, 0.75), strict=True):
        one.values[JUDGE] = dict.fromkeys(map(str, range(40)), score)
    by_judge, by_pairs = best(runs, True, []), best(runs, False, [])
    assert by_judge and (by_judge.measure, by_judge.run, by_judge.told) == (JUDGE, "two", True)
    assert by_pairs and by_pairs.measure == HELD_OUT and not by_pairs.told
    assert {one.measure for one in differences(runs, False)} == {HELD_OUT}
    for one, digest in zip(runs.values(), "ab", strict=True):  # trained on different data
        one.content = {HELD_OUT: digest, "bench": "same"}
        one.values["bench"] = dict(one.values[HELD_OUT])
    runs["two"].values["bench"] = shares(20).values[HELD_OUT]
    by_set = best(runs, False, [])
    assert by_set and (by_set.measure, by_set.run, by_set.told) == ("bench", "one", True)
    assert [(one.measure, one.run, one.against) for one in differences(runs, False)] == [("bench", "two", "one")]
    runs["two"].content["bench"] = "another edition"
    assert best(runs, False, []) is None


def test_a_difference_is_taken_prompt_by_prompt() -> None:
    """Both won 60 of 100, on other prompts: no difference, and a wider interval than for the same ones."""
    other = shares(60)
    other.values[HELD_OUT] = {f"p{number}": float(number >= 40) for number in range(100)}
    apart, alike = ({"one": shares(60), "two": one} for one in (other, shares(60)))
    wide, narrow = (differences(runs, False)[0].change for runs in (apart, alike))
    assert wide["value"] == narrow["value"] == 0
    assert (wide["high"] or 0) > 3 * (narrow["high"] or 1)


def test_what_eval_left_is_read_by_prompt(tmp_path: Path) -> None:
    _, run = evaluated(tmp_path / "one", [1, 0.25])
    logps = {"policy_chosen": -2.0, "policy_rejected": -3.0, "reference_chosen": -3.0, "reference_rejected": -3.0}
    lost = {**logps, "policy_rejected": -1.0}
    rows = [{"id": "a", "prompt": "x", **logps}, {"id": "b", "prompt": "x", **lost}, {"id": "c", "prompt": "", **logps}]
    (run["eval"] / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = {"text": "好的。", "ids": [1, 2, 3], "finished": True, "thought": 0}
    cut = {**answer, "finished": False}
    asked = [[{"role": "user", "content": f"为什么 {number}？"}] for number in range(2)]
    samples = [
        {"id": f"p{number}", "language": "zh", "prompt": asked[number], "base": answer, "tuned": tuned}
        for number, tuned in enumerate((answer, cut))
    ]
    (run["eval"] / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    found = measured(run)
    assert found.values[HELD_OUT] == {"x": 0.5, "c": 1.0}
    assert list(found.values["valid_rate"].values()) == [1.0, 0.0]
    assert found.scores == {json.dumps(asked[0]): 1, json.dumps(asked[1]): 0.25}
    shown = examples({"one": found, "two": found}, seed=0)
    assert [one["prompt"] for one in sorted(shown, key=str)] == asked, "no scores are apart: both at random"
    assert all(one["base"] == answer and set(one["answers"]) == {"one", "two"} for one in shown)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_names_the_best_or_that_none_can_be_told(language: str) -> None:
    runs = {"<one>": shares(80), "two": shares(60)}
    metrics: dict[str, Any] = {"languages": {}, "pairs": None, "samples": None, "judge": None}
    names = [Compared(name, metrics, {"seconds": 1.0, "peak_memory_bytes": 1}, None, {}) for name in runs]
    for worse, badge in (([], "better"), (["two"], "")):
        page = Comparison(names, differences(runs, False), best(runs, False, worse), language)
        html = page.html(["a note"], ["/home/someone/x is odd"], [])
        assert f'class="badge {badge}"' in html and f'<html lang="{language}">' in html
        assert "someone" not in html and "&lt;one&gt;" in html and "<one>" not in html
    means = page.say(
        "told_means", run="&lt;one&gt;", measure=page.say("reward_accuracy"), other="two", n="100", change=""
    )
    assert means[:4] in Comparison(names, [], best(runs, False, []), language).html([], [], [])
