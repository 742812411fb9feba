"""Runs side by side: what may be compared, what is reported where it may not, and which is the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import recipe
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.evaluate.compare import HELD_OUT, JUDGE, VALID, Compared, best, differences, examples, read, read_runs
from dpo_cli.evaluate.comparison_page import Comparison, print_comparison
from dpo_cli.recipe import Recipe
from dpo_cli.run import Run
from dpo_cli.stats import wilson

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
SAMPLING = {"prompts": 8, "max_new_tokens": 8, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 42}
NOTHING: dict[str, Any] = {
    "verdict": {"kind": "better"}, "languages": {}, "sets": {}, "pairs": None, "samples": None, "report_language": "en",
}  # fmt: skip
ANSWER: dict[str, Any] = {"text": "好的。", "ids": [1, 2, 3], "finished": True, "thought": 0}
ROW = {"language": "zh", "base": ANSWER, "tuned": ANSWER}


def asked(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"为什么 {number}？"}]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluated(
    folder: Path,
    scores: list[float | None] | None,
    *settings: str,
    held_out: str = "a",
    judge: str | None = "m",
    sampling: dict[str, Any] | None = None,
) -> tuple[Recipe, Run]:
    """A run as `eval` leaves it, as far as a comparison reads it."""
    for name in ("eval", "data", "train"):
        (folder / name).mkdir(parents=True)
    answers = {side: [{"role": "assistant", "content": f"{side} {held_out}"}] for side in ("chosen", "rejected")}
    pair = {"id": "p0", "prompt": [{"role": "user", "content": "?"}], "language": "en", "source": "s"}
    ranked = {"candidates": [{"text": answers[side][0]["content"], "score": None} for side in answers]}
    write(folder / "data" / "eval.jsonl", [{**pair, **(ranked if "train.method=lipo" in settings else answers)}])
    (folder / "train" / "metrics.json").write_text(json.dumps({"seconds": 1.0, "peak_memory_bytes": 1}))
    judged = None if scores is None or judge is None else {"kind": "openai", "model": judge, "template_sha256": "t"}
    metrics = {"judge": judged, "sampling": None if sampling == {} else {**SAMPLING, **(sampling or {})}, **NOTHING}
    (folder / "eval" / "metrics.json").write_text(json.dumps(metrics))
    judgments = [{"id": f"p{number}", "score": score} for number, score in enumerate(scores or [])]
    write(folder / "eval" / "judgments.jsonl", [*judgments, {"id": "calibration/p0", "score": 0.0}])
    samples = [{"id": f"p{number}", "prompt": asked(number), **ROW} for number in range(len(scores or []))]
    write(folder / "eval" / "samples.jsonl", samples)
    return recipe.load(SMOKE, list(settings)), Run(folder)


def by_judge(compared: dict[str, Compared]) -> bool:
    """Whether the judge's scores are compared."""
    return all(JUDGE in one.values for one in compared.values())


def test_who_wins_more_is_ahead_and_failures_and_calibration_count_nowhere(tmp_path: Path) -> None:
    strong = evaluated(tmp_path / "strong", [1, 1, 1, 0.5, 1, 0.75, 1, 0])
    even = evaluated(tmp_path / "even", [1, 0, 1, 0, 0.5, None, 1, 0])
    compared, remarks = read_runs([even, strong])
    assert remarks == [] and list(compared) == ["even", "strong"]
    [found] = [one.change for one in differences(compared) if one.measure == JUDGE]
    first, second = (one.strength for one in compared.values())
    assert first and first["value"] == pytest.approx(0, abs=1e-6) and first["n"] == 7
    assert second and (second["value"] or 0) > 0
    assert found["n"] == 7 and found["value"] == pytest.approx((0 + 1 + 0 + 0.5 + 0.5 + 0 + 0) / 7, abs=1e-6)


def test_a_judge_without_samples_compares_nothing(tmp_path: Path) -> None:
    """`eval.prompts: 0` leaves a judge only its calibration."""
    compared, remarks = read_runs([evaluated(tmp_path / name, [], sampling={}) for name in ("one", "two")])
    assert remarks == [] and differences(compared) == []


def test_a_run_beside_itself_is_an_error(tmp_path: Path) -> None:
    loaded, run = evaluated(tmp_path / "one", [1, 1, 0, 1])
    with pytest.raises(DpoError, match="stands twice") as raised:
        read_runs([(loaded, run), (loaded, Run(tmp_path / "elsewhere" / ".." / "one"))])
    assert raised.value.exit_code == USAGE


@pytest.mark.parametrize(
    ("settings", "other", "differ"),
    [
        ([], {"held_out": "b"}, "held-out pairs"),
        ([], {"judge": "another"}, "judges"),
        ([], {"judge": None}, "judges"),
        ([], {"sampling": {"temperature": 0.0}}, "sampling settings"),
        ([], {"sampling": {"prompts": 4}}, None),
        (["model.id=Qwen/Qwen3-1.7B"], {}, "base models"),
        (["model.adapter=me/before", "lora={}"], {}, "base models"),
    ],
)
def test_win_rates_need_the_same_pairs_judge_sampling_and_base(
    tmp_path: Path, settings: list[str], other: dict[str, Any], differ: str | None
) -> None:
    runs = [evaluated(tmp_path / "one", [1, 1, 0, 1]), evaluated(tmp_path / "two", [1, 0, 0, 1], *settings, **other)]
    compared, remarks = read_runs(runs)
    assert by_judge(compared) == (differ is None) == (remarks == [])
    if differ:
        assert remarks[-1] == f"win rates can't be compared: the runs have different {differ}"
    assert any("different held-out pairs: of accuracies" in one for one in remarks) == (differ == "held-out pairs")


def test_without_any_judge_there_is_nothing_to_remark(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / "one", None), evaluated(tmp_path / "two", None, "model.id=Qwen/Qwen3-1.7B")]
    assert read_runs(runs)[1] == []


def test_what_sets_a_recipe_apart_is_named_wherever_it_stands(tmp_path: Path) -> None:
    settings = ("train.beta=0.3", "data.total=100", "eval.prompts=5")
    compared, _ = read_runs([evaluated(tmp_path / "one", None), evaluated(tmp_path / "two", None, *settings)])
    assert compared["one"].differs == {}
    assert compared["two"].differs == {"data.total": 100, "train.beta": 0.3, "eval.prompts": 5}


def test_runs_of_one_name_have_as_much_of_their_folders_in_it_as_sets_them_apart(tmp_path: Path) -> None:
    """And no more, for the page is to be shown to others."""
    compared, _ = read_runs([evaluated(tmp_path / where, None) for where in ("a/smoke", "b/smoke", "b/other")])
    assert list(compared) == ["a/smoke", "b/smoke", "other"]


def test_it_is_printed_and_written_and_a_run_that_may_only_be_read_is_compared_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [evaluated(tmp_path / "one", [1, 0, 1]), evaluated(tmp_path / "two", [1, 1, 1])]
    page = tmp_path / "one" / "compare.html"
    print_comparison(runs)
    assert f"report: {page}" in capsys.readouterr().out
    assert "http" not in page.read_text(encoding="utf-8")
    page.unlink()
    page.mkdir()  # root may write anywhere, but no file over a folder
    print_comparison(runs)
    assert f"warning: {page} can't be written" in capsys.readouterr().out


def test_of_another_method_only_what_both_have_is_named(tmp_path: Path) -> None:
    """The best and the worst of a ranked list are the pairs of the other run."""
    settings = ("train.method=lipo", "train.learning_rate=0.1")
    compared, remarks = read_runs([evaluated(tmp_path / "one", None), evaluated(tmp_path / "two", None, *settings)])
    assert remarks == []
    differs = compared["two"].differs
    assert differs["train.method"] == "lipo" and differs["train.learning_rate"] == 0.1
    assert "train.label_smoothing" not in differs


# -------------------------------------------------------------------------------------------------------- differences


def shares(won: int, kind: str = "better") -> Compared:
    """A run that won so many of 100 held-out prompts, the first ones."""
    metrics = {**NOTHING, "verdict": {"kind": kind}, "judge": None}
    values = {HELD_OUT: {f"p{number}": float(number < won) for number in range(100)}}
    return Compared(metrics, {"seconds": 1.0, "peak_memory_bytes": 1}, values, {HELD_OUT: "held out"})


def test_the_best_run_has_to_lead_every_other_one() -> None:
    found = best({"one": shares(80), "two": shares(60), "three": shares(50)})
    assert found and (found.run, found.against, found.measure, found.clear) == ("one", "two", HELD_OUT, True)
    assert found.change["value"] == pytest.approx(0.2) and found.change["n"] == 100
    near = best({"one": shares(80), "two": shares(50), "three": shares(79)})
    assert near and not near.clear and near.against == "three"


def test_a_run_that_got_worse_is_not_called_the_best() -> None:
    runs = {"broken": shares(99, "worse"), "one": shares(80), "two": shares(60)}
    assert Comparison(runs, "en").best()[0] == "Best: one"
    assert Comparison(runs, "en").no_candidates()[0].startswith("broken is no candidate")


def test_a_judge_that_saw_all_goes_first_and_shared_test_sets_where_held_out_pairs_differ() -> None:
    runs = {"one": shares(80), "two": shares(80)}
    by_pairs = best(runs)
    assert by_pairs and by_pairs.measure == HELD_OUT and not by_pairs.clear
    assert {one.measure for one in differences(runs)} == {HELD_OUT}
    for one, score in zip(runs.values(), (0.25, 0.75), strict=True):
        one.values[JUDGE] = dict.fromkeys(map(str, range(40)), score)
    by_judge = best(runs)
    assert by_judge and (by_judge.measure, by_judge.run, by_judge.clear) == (JUDGE, "two", True)
    for one, digest in zip(runs.values(), "ab", strict=True):  # trained on different data
        one.content = {HELD_OUT: digest, "bench": "same"}
        del one.values[JUDGE]
        one.values["bench"] = dict(one.values[HELD_OUT])
    runs["two"].values["bench"] = shares(20).values[HELD_OUT]
    by_set = best(runs)
    assert by_set and (by_set.measure, by_set.run, by_set.clear) == ("bench", "one", True)
    assert [(one.measure, one.run, one.against) for one in differences(runs)] == [("bench", "two", "one")]
    runs["two"].content["bench"] = "another edition"
    assert best(runs) is None


def test_a_difference_is_taken_prompt_by_prompt() -> None:
    """Both won 60 of 100, on other prompts: no difference, and a wider interval than for the same ones."""
    other = shares(60)
    other.values[HELD_OUT] = {f"p{number}": float(number >= 40) for number in range(100)}
    wide, narrow = (differences({"one": shares(60), "two": one})[0].change for one in (other, shares(60)))
    assert wide["value"] == narrow["value"] == 0
    assert (wide["high"] or 0) > 3 * (narrow["high"] or 1)


def test_what_eval_left_is_read_by_prompt(tmp_path: Path) -> None:
    _, run = evaluated(tmp_path / "one", [1, 0.25])
    logps = {"policy_chosen": -2.0, "policy_rejected": -3.0, "reference_chosen": -3.0, "reference_rejected": -3.0}
    lost = {**logps, "policy_rejected": -1.0}
    rows = [{"id": "a", "prompt": "x", **logps}, {"id": "b", "prompt": "x", **lost}, {"id": "c", "prompt": "", **logps}]
    write(run["eval"] / "pairs.jsonl", rows)
    samples = [json.loads(line) for line in (run["eval"] / "samples.jsonl").read_text().splitlines()]
    samples[0]["tuned"] = {**ANSWER, "ids": [7] * 20 + ANSWER["ids"], "thought": 20}  # thoughts may go in circles
    samples[1]["tuned"] = {**ANSWER, "finished": False}
    write(run["eval"] / "samples.jsonl", samples)
    found = read(run)
    assert found.values[HELD_OUT] == {"x": 0.5, "c": 1.0}
    assert list(found.values[VALID].values()) == [1.0, 0.0]
    assert found.scores == {json.dumps(asked(0)): 1, json.dumps(asked(1)): 0.25}
    shown = examples({"one": found, "two": found}, seed=0)
    assert [one["prompt"] for one in sorted(shown, key=str)] == [asked(0), asked(1)], "no scores are apart: at random"
    assert all(list(one["answers"]) == ["base", "one", "two"] for one in shown)


def test_examples_are_where_the_judge_saw_most_between_runs_and_a_base_only_where_it_is_one() -> None:
    prompts = [f"p{number}" for number in range(8)]
    one, two = (Compared(answers={p: {**ROW, "prompt": p} for p in prompts}) for _ in range(2))
    one.scores, two.scores = dict.fromkeys(prompts, 0.5), {p: 0.5 + 0.05 * n for n, p in enumerate(prompts)}
    two.answers["p7"] = {**ROW, "prompt": "p7", "base": {**ANSWER, "text": "sampled otherwise"}}
    changed = [shown for shown in examples({"one": one, "two": two}, seed=0) if shown["kind"] == "changed"]
    assert [shown["prompt"] for shown in changed] == ["p7", "p6", "p5"]
    assert [list(shown["answers"]) for shown in changed] == [["one", "two"], *[["base", "one", "two"]] * 2]


def test_every_test_set_has_a_column() -> None:
    sets = {f"set{number}": {"pairs": {"reward_accuracy": wilson(number, 10)}} for number in range(4)}
    runs = {"one": shares(80), "two": shares(60)}
    for one in runs.values():
        one.metrics = {**one.metrics, "sets": sets}
    text = "\n".join(Comparison(runs, "en").tables())
    assert all(name in text for name in sets)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_names_the_best_or_that_none_can_be_told(language: str) -> None:
    for kind, badge in (("better", "better"), ("worse", "")):
        page = Comparison({"<one>": shares(80), "two": shares(60, kind)}, language)
        html = page.html(["/home/someone/x is odd"], [])
        assert f'class="badge {badge}"' in html and f'<html lang="{language}">' in html
        assert "someone" not in html and "&lt;one&gt;" in html and "<one>" not in html
        assert (page.say("no_candidate", run="two") in html) == (kind == "worse")
        assert (page.say("left", run="&lt;one&gt;") in html) == (kind == "worse"), "what is left of two is named"
        assert page.say("best", run="&lt;one&gt;" if kind == "better" else "-") in html or kind == "worse"
