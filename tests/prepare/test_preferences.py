"""Which answer is better: scores that contradict, labels in words, ties; and rows that are broken or unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import DpoError
from dpo_cli.prepare.pipeline import prepare
from dpo_cli.recipe import load
from tests.prepare import kit
from tests.prepare.kit import ASKED, BAD, GOOD, answer, user

USER = {"role": "user", "content": ASKED}


def scored(name: str, chosen: Any, rejected: Any, count: int = 1, first: int = 0) -> list[dict[str, Any]]:
    scores = {name.format("chosen"): chosen, name.format("rejected"): rejected}
    return [kit.pair(number, **scores) for number in range(first, first + count)]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        *((name, 0.1, 0.8) for name in ("score_{}", "{}-rating", "reward_{}")),
        *((name, 1, 5) for name in ("{}_scores", "{}_avg_rating", "quality_{}")),
        ("score_{}", 2, 9), ("{}_rating", -3.5, 12.25), ("{}-rating", "1.0", "4.5"),
    ],
)  # fmt: skip
def test_scores_that_contradict_drop_the_row(name: str, low: Any, high: Any) -> None:
    rows = scored(name, low, high) + scored(name, high, low, 5, 1)
    for format in ("ranked", "unpaired"):
        assert kit.run_rows(rows, format=format).dropped() == {"contradicts_scores": 1}
    made = kit.run_rows(rows)
    assert made.dropped() == {"contradicts_scores": 1} and made.funnel_holds()
    detail = made.detail("contradicts_scores")
    assert f"{float(low):g} is below" in detail and f"{float(high):g}" in detail
    assert {row["chosen"][0]["content"] for row in made.rows} == {row["chosen"] for row in rows[1:]}, "columns win"


def test_most_scores_upside_down_are_an_error_with_its_fix() -> None:
    rows = scored("score_{}", 0.1, 0.8, 40)
    error = kit.refused(rows)
    assert "score_rejected is the higher one in 40 of 40 rows of rows: is lower better" in error.message
    assert "columns: {score_chosen: score_rejected, score_rejected: score_chosen}" in str(error.hint)
    turned = {"score_chosen": "score_rejected", "score_rejected": "score_chosen"}
    made = kit.run_rows(rows, {"columns": turned})
    assert made.source()["kept"] == 40 and {row["margin"] for row in made.rows} == {0.7}
    assert {row["chosen"][0]["content"] for row in made.rows} == {row["chosen"] for row in rows}
    swapped = kit.run_rows(rows, {"columns": {**turned, "chosen": "rejected", "rejected": "chosen"}})
    assert swapped.source()["kept"] == 40
    assert {row["chosen"][0]["content"] for row in swapped.rows} == {row["rejected"] for row in rows}
    off = kit.run_rows(rows, filters={"contradicts_scores": False})
    assert off.source()["kept"] == 40 and {row["margin"] for row in off.rows} == {None}
    assert {row["chosen"][0]["content"] for row in off.rows} == {row["chosen"] for row in rows}


def test_ratings_that_the_weights_turn_round_drop_the_row() -> None:
    rows = [
        {
            "instruction": kit.sentence(n),
            "chosen_response": kit.sentence((n, "a")),
            "rejected_response": kit.sentence((n, "b")),
            "chosen_rating": {"helpfulness": "1" if n == 0 else "5", "honesty": "5"},
            "rejected_rating": {"helpfulness": "3", "honesty": "5"},
        }
        for n in range(4)
    ]
    assert kit.run_rows(rows).dropped() == {"contradicts_scores": 1}


@pytest.mark.parametrize("score", [0.25, -7, -2.5])
def test_equal_scores_are_a_tie_on_any_scale(score: float) -> None:
    made = kit.run_rows(scored("score_{}", score, score) + scored("score_{}", score + 0.5, score, 3, 1))
    assert made.dropped() == {"tie": 1}


def test_scores_of_unknown_scale_are_said_to_count_for_their_order_only() -> None:
    made = kit.run_rows(scored("{}_score", -1.5, -3.5, 4))
    assert {row["margin"] for row in made.rows} == {None}
    [said] = made.warnings("scale is not known")
    assert "chosen_score and rejected_score" in said and "4 of 4" in said


WORDS = [
    (True, False), (1, 0), (1, -1), (1.0, -1.0), ("true", "false"), ("True", "False"), ("yes", "no"), ("good", "bad"),
    ("chosen", "rejected"), ("desirable", "undesirable"), ("thumbs_up", "thumbs_down"), ("1", "-1"), ("好", "坏"),
]  # fmt: skip


def labelled(good: Any, bad: Any, count: int = 6, **more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": kit.sentence(n), "completion": kit.sentence((n, "a")), "label": bad if n % 2 else good, **more}
        for n in range(count)
    ]


@pytest.mark.parametrize(("good", "bad"), WORDS)
def test_labels_have_many_words(good: Any, bad: Any) -> None:
    made = kit.run_rows(labelled(good, bad), format="unpaired")
    assert sorted(row["label"] for row in made.rows) == [False] * 3 + [True] * 3


@pytest.mark.parametrize("word", ["great", 2, 0.5, None, [1], {"a": 1}, "neutral"])
def test_other_labels_are_dropped_with_the_words_that_are_known(word: Any) -> None:
    rows = [*labelled(True, False), {"prompt": ASKED, "completion": GOOD, "label": word}]
    made = kit.run_rows(rows, format="unpaired")
    assert made.dropped() == {"schema": 1}
    detail = made.detail("schema")
    assert "neither good (true, 1, " in detail and "nor bad (false, 0, " in detail


def test_an_answer_called_good_and_bad_is_dropped_and_a_repeated_one_kept_once() -> None:
    rows = labelled(True, False, 8)
    rows.append({**rows[0], "label": False})  # contradiction: nothing is left of its prompt
    rows.append({**rows[1], "completion": rows[1]["completion"] + "\n"})  # the same again
    other = {**rows[2], "completion": kit.sentence("other")}
    rows += [
        other,
        {**other, "completion": other["completion"] + "</s>", "label": False},
    ]  # beside one that is only good
    for order in (rows, rows[::-1]):
        made = kit.run_rows(order, format="unpaired")
        assert made.source()["in"] == 8 and made.dropped() == {"identical": 1} and made.funnel_holds()
        assert made.source()["answers_dropped"] == {"duplicate": 1, "identical": 4}
        assert len(made.rows) == 7
    assert len({row["completion"][0]["content"].strip() for row in made.rows}) == 7


@pytest.mark.parametrize("label", [True, False])
def test_rows_of_one_label_are_refused(label: bool) -> None:
    with pytest.raises(DpoError, match=f"all 5 training rows are {'good' if label else 'bad'} answers") as error:
        kit.run_rows(labelled(label, label), format="unpaired", eval_fraction=1e-9)  # of 6 one is held out
    assert f"add {'bad' if label else 'good'} answers" in str(error.value.hint)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": 1, "chosen": 1, "rejected": 1}, "columns: {prompt: question}"),
        ({"question": 1, "good": 1, "bad": 1}, "columns: {prompt: question, chosen: good, rejected: bad}"),
        ({"Query": 1, "Chosen": 1, "Rejected": 1}, "columns: {prompt: Query, chosen: Chosen, rejected: Rejected}"),
        ({"问题": 1, "好": 1, "坏": 1}, "columns: {prompt: 问题, chosen: 好, rejected: 坏}"),
        ({"question": 1, "answer": 1, "is_good": 1}, "columns: {prompt: question, completion: answer, label: is_good}"),
        ({"question": 1, "a": 1, "b": 1}, "columns: {prompt: question, chosen: <yours>, rejected: <yours>}"),
    ],
)
def test_an_unknown_layout_shows_the_line_to_write(row: Any, said: str) -> None:
    names = {name: kit.sentence(name) for name in row} | ({"is_good": True} if "is_good" in row else {})
    with pytest.raises(DpoError, match="can't tell the layout") as error:
        kit.run_rows([names])
    assert said in str(error.value.hint)


def test_a_map_that_is_the_wrong_way_round_says_whose_name_comes_first() -> None:
    rows = [{"question": ASKED, "good": GOOD, "bad": BAD}]
    with pytest.raises(DpoError, match="there is no 'question' to map") as error:
        kit.run_rows(rows, {"columns": {"question": "prompt", "good": "chosen", "bad": "rejected"}})
    assert "our name comes first, which is one of prompt, chosen, rejected" in str(error.value.hint)
    assert str(error.value.where).endswith("columns")


def test_a_mapped_instruction_keeps_its_input() -> None:
    row = {"instruction": "Answer briefly.", "input": ASKED, "good": GOOD, "bad": BAD}
    columns = {"prompt": "instruction", "chosen": "good", "rejected": "bad"}
    assert kit.only(row, {"columns": columns})["prompt"] == [user(f"Answer briefly.\n\n{ASKED}")]


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "both_bad"])
def test_arenas_ties_are_dropped_as_ties(winner: str) -> None:
    rows = [
        {
            "winner": "model_a" if n else winner, "model_a": "one", "model_b": "two",
            "conversation_a": [user(kit.sentence(n)), answer(kit.sentence((n, "a")))],
            "conversation_b": [user(kit.sentence(n)), answer(kit.sentence((n, "b")))],
        }
        for n in range(4)
    ]  # fmt: skip
    made = kit.run_rows(rows, eval_fraction=1e-9)
    assert made.dropped() == {"tie": 1}
    assert {row["chosen"][0]["content"] for row in made.train} == {kit.sentence((n, "a")) for n in range(1, 4)}
    rows[0]["winner"] = "model_c"
    made = kit.run_rows(rows)
    assert made.dropped() == {"schema": 1}
    assert "known are model_a" in made.detail("schema")


def test_arena_takes_the_turn_that_was_judged() -> None:
    talks = {
        f"conversation_{side}": [USER, answer(text), user("Shorter?"), answer(f"{side}: shorter.")]
        for side, text in (("a", GOOD), ("b", BAD))
    }
    row = kit.only({"winner": "model_a", "turn": 1, "model_a": "x", "model_b": "y", **talks})
    assert row["prompt"] == [USER] and row["chosen"] == [answer(GOOD)]


def test_openais_preference_format_is_read_with_a_column_map() -> None:
    row = {
        "input": {"messages": [USER], "tools": []},
        "preferred_output": [answer(GOOD)], "non_preferred_output": [answer(BAD)],
    }  # fmt: skip
    columns = {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"}
    assert str(columns).replace("'", "") in str(kit.refused([row]).hint)
    written = kit.only(row, {"columns": columns})
    assert (written["prompt"], written["chosen"]) == ([USER], [answer(GOOD)])


def test_column_names_with_spaces_are_quoted_in_the_line_to_write() -> None:
    error = kit.refused([{"prompt ": "Why?", "chosen, a": "x", " chosen": "So.", "rejected": "No."}])
    assert '{prompt: "prompt ", chosen: " chosen"}' in str(error.hint)


@pytest.mark.parametrize(
    ("method", "said"), [("kto", ": set data.format: unpaired"), ("dpo", "take train.method: kto with data.format")]
)
def test_labelled_rows_without_their_format_are_told_the_edit(tmp_path: Path, method: str, said: str) -> None:
    kit.write_rows(tmp_path / "rows.jsonl", labelled(True, False))
    (tmp_path / "kto.yaml").write_text(
        "model: {id: nobody/none}\ndata: {format: pairs, sources: [./rows.jsonl], filters: {too_long: false}}\n"
        f"train: {{method: {method}}}\n"
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(DpoError) as error:
        prepare(load(tmp_path / "kto.yaml"), tmp_path / "out", quiet=True)
    assert said in str(error.value.hint)
