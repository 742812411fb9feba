"""Test sets as prepare reads them: any layout of pairs, whole, with what was trained on counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import DpoError
from dpo_cli.prepare.eval_sets import prepare_sets, read_sets
from dpo_cli.recipe import Recipe, load
from dpo_cli.run import Run
from tests.prepare import kit

Made = tuple[list[dict[str, Any]], dict[str, Any]]
CODE = "def add(a, b):\n    return a {} b"


def rewardbench(number: int, subset: str, **more: Any) -> dict[str, Any]:
    """A row of allenai/reward-bench: the rejected solution differs from the chosen one by a sign."""
    return {
        "prompt": f"Write a function that adds two numbers, variant {number} of many.",
        "chosen": CODE.format("+"), "chosen_model": "human", "rejected": CODE.format("-"), "rejected_model": "buggy",
        "subset": subset, "id": number, **more,
    }  # fmt: skip


def recipe(sets: list[Any], **data: Any) -> Recipe:
    sources = [{"id": "builtin:style-helpsteer2"}]
    values = {"data": {"sources": sources, **data}, "eval": {"sets": sets}}
    return Recipe.model_validate({"name": "t", "model": {"id": "builtin:tiny-qwen3", "max_length": 256}, **values})


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Made]:
    """`made({name: rows}, settings by name, training prompts, **data)`: the pairs and the report."""

    def go(
        rows: dict[str, list[Any]], settings: dict[str, Any] | None = None, trained: tuple[str, ...] = (), **data: Any
    ) -> Made:
        train = [{"prompt": [{"role": "user", "content": asked}]} for asked in trained]
        train_pairs = kit.write_rows(tmp_path / "train.jsonl", train)
        sets = []
        for name, several in rows.items():
            path = kit.write_rows(tmp_path / f"{name}.jsonl", several)
            sets.append({"id": str(path), **(settings or {}).get(name, {})})
        folder = tmp_path / "sets"
        folder.mkdir()
        prepare_sets(recipe(sets, **data), train_pairs, folder)
        return kit.read_jsonl(folder / "pairs.jsonl"), json.loads((folder / "report.json").read_text("utf-8"))

    return go


def test_sets_of_several_layouts_with_their_subsets_and_languages(made: Any) -> None:
    bench = [rewardbench(number, "hep-python" if number % 2 else "math-prm") for number in range(4)]
    chinese = kit.ultrafeedback(
        "怎么把木地板打上蜡？", ["先薄薄涂一层蜡，再用软布打磨。", "也许涂一点吧，说不准。"], ["5", "2"]
    )
    talks = [
        {"chosen": f"\n\nHuman: {asked}\n\nAssistant: Yes.", "rejected": f"\n\nHuman: {asked}\n\nAssistant: No."}
        for asked in ("May cats eat figs?", "May dogs?")
    ]
    rows, report = made({"bench": bench, "ultra": [chinese], "talks": talks}, {"ultra": {"name": "超"}})
    assert {name: (one["in"], one["kept"], one["layout"]) for name, one in report.items()} == {
        "bench": (4, 4, "pairs"), "超": (1, 1, "ultrafeedback"), "talks": (2, 2, "hh_rlhf"),
    }  # fmt: skip
    assert [row["subset"] for row in rows if row["source"] == "bench"].count("hep-python") == 2
    zh = next(row for row in rows if row["source"] == "超")
    assert zh["prompt"][0]["content"] == "怎么把木地板打上蜡？" and zh["language"] == "zh"
    assert zh["chosen"][0]["content"].startswith("先薄薄涂一层蜡")
    assert len({row["id"] for row in rows}) == 7


def test_the_recipes_own_filters_have_no_say(made: Any) -> None:
    """A right refusal, a short answer, a prompt twice, a fix of one sign, a long prompt: all of them are tested."""
    refusal = {"prompt": "How do I pick my neighbour's lock?", "chosen": "I'm sorry, but I can't help with that.",
               "rejected": "Sure! " + kit.sentence("lock")}  # fmt: skip
    long = {"prompt": kit.sentence("long", words=50), "chosen": kit.GOOD, "rejected": kit.BAD}
    bench = [rewardbench(0, "a"), rewardbench(0, "b"), refusal, long]
    strict = {"min_margin": 1.0, "min_chosen_score": 1.0}
    rows, report = made({"bench": bench}, contamination=[], pairs=strict, languages={"zh": 1.0})
    assert report["bench"]["kept"] == 4 and report["bench"]["dropped"] == {}
    assert len({row["id"] for row in rows}) == 4


def test_what_is_no_pair_or_too_long_is_left_out_and_counted(made: Any) -> None:
    unscored = kit.ultrafeedback(kit.sentence("u"), [kit.sentence(1), kit.sentence(2)], ["N/A", "N/A"])
    tied = kit.ultrafeedback(kit.sentence("t"), [kit.sentence(3), kit.sentence(4)], ["4", "4"])
    long = kit.ultrafeedback(kit.sentence("l"), [kit.sentence(5, words=300), kit.sentence(6)], ["5", "1"])
    steered = kit.ultrafeedback("Say <|im_start|>system", [kit.sentence(7), kit.sentence(8)], ["5", "1"])
    rows, report = made({"ultra": [unscored, tied, long, steered, kit.plain("good"), {"instruction": 3}]})
    assert report["ultra"]["in"] == 6 and report["ultra"]["kept"] == len(rows) == 1
    assert report["ultra"]["dropped"] == {"markers": 1, "no_score": 1, "schema": 1, "tie": 1, "too_long": 1}


def test_prompts_that_were_trained_on_are_counted_also_where_they_differ_a_little(made: Any) -> None:
    asked = [kit.sentence(number, words=30) for number in range(4)]
    rows = [{"prompt": one, "chosen": kit.sentence("c"), "rejected": kit.sentence("r")} for one in asked]
    trained = (asked[0].upper() + "!!", asked[1].removesuffix(".") + " now", kit.sentence("unlike"))
    _, report = made({"one": rows, "two": [rewardbench(1, "a")]}, trained=trained)
    assert report["one"]["overlap"] == 2 and report["two"]["overlap"] == 0


def test_the_recipes_weights_say_which_answer_is_better(made: Any) -> None:
    ratings = ({name: str(one) for name in ("honesty", "instruction_following", "truthfulness")} for one in (1, 4))
    helpful, right = ({**rest, "helpfulness": own} for rest, own in zip(ratings, ("5", "1"), strict=True))
    weights = {"helpfulness": 1.0, "correctness": 0.0, "coherence": 0.0, "complexity": 0.0, "verbosity": 0.0}
    row = kit.ultrafeedback(kit.ASKED, [kit.GOOD, kit.BAD], [helpful, right])
    [pair], _ = made({"ultra": [row]}, score_weights=weights)
    assert pair["chosen"][0]["content"] == kit.GOOD


def test_the_commits_of_sets_on_the_hub_are_in_the_record(hub: list[Any], tmp_path: Path) -> None:
    run = Run(tmp_path / "t")
    run.train_pairs.parent.mkdir(parents=True)
    kit.write_rows(run.train_pairs, [])
    read_sets(recipe([{"id": "me/pairs", "revision": "v2"}]), run)
    assert run.record("sets")["revisions"] == {"me/pairs": "commit-v2"}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "set has no rows"),
        ([{"prompt": "Why?", "completion": "Because.", "label": True}], "nothing is left of 1 prompts"),
        ([{"question": "Why?"}], "can't tell the layout of set.jsonl"),
    ],
)
def test_a_set_without_pairs_is_an_error_that_names_its_line(rows: list[Any], says: str, tmp_path: Path) -> None:
    kit.write_rows(tmp_path / "set.jsonl", rows)
    text = "model: {id: builtin:tiny-qwen3}\ndata: {sources: builtin:style-helpsteer2}\neval:\n  sets:\n"
    text += "    - id: set.jsonl\n"
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(DpoError, match=says) as error:
        prepare_sets(load(tmp_path / "r.yaml"), kit.write_rows(tmp_path / "train.jsonl", []), tmp_path)
    assert "r.yaml:5  eval.sets[0]" in str(error.value)
