"""Which answer is better: scores that contradict, labels in words, ties; and rows that are broken or unknown."""

from __future__ import annotations

from typing import Any

import pytest
from dpo_cli.errors import DpoError

ASKED, GOOD, BAD = (
    "Name two uses of baking soda and explain one of them.",
    "It cleans pans and lifts batter: heated with an acid it gives off gas.",
    "Baking soda is used for a great many different things.",
)
USER = {"role": "user", "content": ASKED}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def only(kit: Any, row: Any, source: Any = None, **data: Any) -> Any:
    """What a lone row is written as."""
    return kit.run_rows([row], source, eval_fraction=1e-9, **data).train[0]


# ------------------------------------------------------------------------------------------------ scores that disagree


def scored(kit: Any, name: str, chosen: Any, rejected: Any, count: int = 1, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "prompt": kit.sentence(n),
            "chosen": kit.sentence((n, "a")),
            "rejected": kit.sentence((n, "b")),
            name.format("chosen"): chosen,
            name.format("rejected"): rejected,
        }
        for n in range(first, first + count)
    ]


@pytest.mark.parametrize("name", ["score_{}", "{}_score", "{}-rating", "{}_rating", "reward_{}", "{}_reward"])
@pytest.mark.parametrize(("low", "high"), [(0.1, 0.8), (2, 9), (-3.5, 12.25), ("1.0", "4.5")])
def test_scores_that_contradict_drop_the_row(kit: Any, name: str, low: Any, high: Any) -> None:
    rows = scored(kit, name, low, high) + scored(kit, name, high, low, 5, 1)
    for format in ("ranked", "unpaired"):
        assert kit.run_rows(rows, format=format).dropped() == {"contradicts_scores": 1}
    made = kit.run_rows(rows)
    assert made.dropped() == {"contradicts_scores": 1} and made.funnel_holds()
    detail = made.report["examples"]["dropped"]["contradicts_scores"][0]["detail"]
    assert f"{float(low):g} is below" in detail and f"{float(high):g}" in detail
    chosen = {kit.sentence((n, "a")) for n in range(1, 6)}
    assert {row["chosen"][0]["content"] for row in made.rows} == chosen, "columns win, whatever the scores"


def test_most_scores_upside_down_are_an_error_with_its_fix(kit: Any) -> None:
    rows = scored(kit, "score_{}", 0.1, 0.8, 40)
    with pytest.raises(
        DpoError, match="score_rejected is the higher one in 40 of 40 rows of rows: is lower better"
    ) as error:
        kit.run_rows(rows)
    assert "columns: {score_chosen: score_rejected, score_rejected: score_chosen}" in str(error.value.hint)
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


@pytest.mark.parametrize("name", ["score_{}", "chosen-rating,rejected-rating"])
def test_binarized_sets_too(kit: Any, name: str) -> None:
    columns = "{}-rating" if "rating" in name else name
    made = kit.run_rows(scored(kit, columns, 2.0, 4.0) + scored(kit, columns, 4.0, 2.0, 3, 1))
    assert made.report["provenance"]["sources"]["rows"]["layout"] == "ultrafeedback_binarized"
    assert made.dropped() == {"contradicts_scores": 1}


def test_ratings_that_the_weights_turn_round_drop_the_row(kit: Any) -> None:
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
def test_equal_scores_are_a_tie_on_any_scale(kit: Any, score: float) -> None:
    made = kit.run_rows(scored(kit, "score_{}", score, score) + scored(kit, "score_{}", score + 0.5, score, 3, 1))
    assert made.dropped() == {"tie": 1}


def test_scores_of_unknown_scale_are_said_to_count_for_their_order_only(kit: Any) -> None:
    made = kit.run_rows(scored(kit, "{}_score", -1.5, -3.5, 4))
    assert {row["margin"] for row in made.rows} == {None}
    [said] = [text for text in made.report["warnings"] if "scale is not known" in text]
    assert "chosen_score and rejected_score" in said and "4 of 4" in said


# -------------------------------------------------------------------------------------------------------------- labels

WORDS = [
    (True, False), (1, 0), (1, -1), (1.0, -1.0), ("true", "false"), ("True", "False"), ("yes", "no"), ("good", "bad"),
    ("chosen", "rejected"), ("desirable", "undesirable"), ("thumbs_up", "thumbs_down"), ("1", "-1"), ("好", "坏"),
]  # fmt: skip


def labelled(kit: Any, good: Any, bad: Any, count: int = 6, **more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": kit.sentence(n), "completion": kit.sentence((n, "a")), "label": bad if n % 2 else good, **more}
        for n in range(count)
    ]


@pytest.mark.parametrize(("good", "bad"), WORDS)
def test_labels_have_many_words(kit: Any, good: Any, bad: Any) -> None:
    made = kit.run_rows(labelled(kit, good, bad), format="unpaired")
    assert sorted(row["label"] for row in made.rows) == [False] * 3 + [True] * 3


@pytest.mark.parametrize("word", ["great", 2, 0.5, None, [1], {"a": 1}, "neutral"])
def test_other_labels_are_dropped_with_the_words_that_are_known(kit: Any, word: Any) -> None:
    rows = [*labelled(kit, True, False), {"prompt": ASKED, "completion": GOOD, "label": word}]
    made = kit.run_rows(rows, format="unpaired")
    assert made.dropped() == {"schema": 1}
    detail = made.report["examples"]["dropped"]["schema"][0]["detail"]
    assert "neither good (true, 1, " in detail and "nor bad (false, 0, " in detail


def test_an_answer_called_good_and_bad_is_dropped_and_a_repeated_one_kept_once(kit: Any) -> None:
    rows = labelled(kit, True, False, 8)
    rows.append({**rows[0], "label": False})  # contradiction: nothing is left of its prompt
    rows.append({**rows[1], "completion": rows[1]["completion"] + "\n"})  # the same again
    other = {**rows[2], "completion": kit.sentence("other")}
    rows += [other, {**other, "label": False}]  # contradiction beside an answer that is only good
    for order in (rows, rows[::-1]):
        made = kit.run_rows(order, format="unpaired")
        assert made.source()["in"] == 8 and made.dropped() == {"identical": 1} and made.funnel_holds()
        assert made.source()["answers_dropped"] == {"duplicate": 1, "identical": 4}
        assert len(made.rows) == 7
    assert len({row["completion"][0]["content"].strip() for row in made.rows}) == 7


@pytest.mark.parametrize("label", [True, False])
def test_rows_of_one_label_are_refused(kit: Any, label: bool) -> None:
    with pytest.raises(DpoError, match=f"all 5 training rows are {'good' if label else 'bad'} answers") as error:
        kit.run_rows(labelled(kit, label, label), format="unpaired", eval_fraction=1e-9)  # of 6 one is held out
    assert f"add {'bad' if label else 'good'} answers" in str(error.value.hint)


def test_labelled_rows_for_dpo_name_the_method_that_takes_them(kit: Any) -> None:
    with pytest.raises(DpoError, match="6 single_response") as error:
        kit.run_rows(labelled(kit, True, False))
    assert "train.method: kto with data.format: unpaired" in str(error.value.hint)


# ---------------------------------------------------------------------------------------------------------- robustness


@pytest.mark.parametrize("depth", [450, 900])
def test_a_deeply_nested_value_is_one_dropped_row(kit: Any, depth: int) -> None:
    deep: Any = "x"
    for n in range(depth):
        deep = [deep] if n % 2 else {"content": deep, "role": "user", "Rating": deep} if n == 0 else [deep]
    good = kit.plain("good")
    bad = [kit.plain(n) for n in range(2)]
    bad[0]["completions"][0]["annotations"]["helpfulness"]["Rating"] = deep
    bad[1]["completions"] = deep
    made = kit.run_rows([good, *bad], {"layout": "ultrafeedback"})
    assert made.funnel_holds() and made.dropped().get("schema") == 1
    for row in ({"prompt": deep}, {"chosen": deep}, {"score_chosen": deep}, {"label": deep}, {"images": deep}):
        rows = [*scored(kit, "score_{}", 0.9, 0.1), {"prompt": ASKED, "chosen": GOOD, "rejected": BAD, **row}]
        assert kit.run_rows(rows).funnel_holds()


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
def test_an_unknown_layout_shows_the_line_to_write(kit: Any, row: Any, said: str) -> None:
    names = {name: kit.sentence(name) for name in row} | ({"is_good": True} if "is_good" in row else {})
    with pytest.raises(DpoError, match="can't tell the layout") as error:
        kit.run_rows([names])
    assert said in str(error.value.hint)


def test_a_map_that_is_the_wrong_way_round_is_turned(kit: Any) -> None:
    rows = [{"question": ASKED, "good": GOOD, "bad": BAD}]
    with pytest.raises(DpoError, match="wrong way round") as error:
        kit.run_rows(rows, {"columns": {"question": "prompt", "good": "chosen", "bad": "rejected"}})
    assert "columns: {prompt: question, chosen: good, rejected: bad}" in str(error.value.hint)
    assert str(error.value.where).endswith("columns")


def test_a_mapped_instruction_keeps_its_input(kit: Any) -> None:
    row = {"instruction": "Answer briefly.", "input": ASKED, "good": GOOD, "bad": BAD}
    columns = {"prompt": "instruction", "chosen": "good", "rejected": "bad"}
    assert only(kit, row, {"columns": columns})["prompt"] == [user(f"Answer briefly.\n\n{ASKED}")]


def test_a_file_without_its_header_is_asked_about(kit: Any, tmp_path: Any) -> None:
    (tmp_path / "rows.csv").write_text(f'"{ASKED}","{GOOD}","{BAD}"\n' * 3, encoding="utf-8")
    with pytest.raises(DpoError, match="can't tell the layout") as error:
        kit.run(kit.recipe([{"id": str(tmp_path / "rows.csv")}]), tmp_path / "out")
    assert "no header" in str(error.value.hint)


# --------------------------------------------------------------------------------------------------------------- arena


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "both_bad"])
def test_arenas_ties_are_dropped_as_ties(kit: Any, winner: str) -> None:
    rows = [
        {
            "winner": "model_a" if n else winner,
            "conversation_a": [user(kit.sentence(n)), answer(kit.sentence((n, "a")))],
            "conversation_b": [user(kit.sentence(n)), answer(kit.sentence((n, "b")))],
            "model_a": "one",
            "model_b": "two",
        }
        for n in range(4)
    ]
    made = kit.run_rows(rows, eval_fraction=1e-9)
    assert made.dropped() == {"tie": 1}
    assert {row["chosen"][0]["content"] for row in made.train} == {kit.sentence((n, "a")) for n in range(1, 4)}
    rows[0]["winner"] = "model_c"
    made = kit.run_rows(rows)
    assert made.dropped() == {"schema": 1}
    assert "known are model_a" in made.report["examples"]["dropped"]["schema"][0]["detail"]


def test_arena_takes_the_turn_that_was_judged(kit: Any) -> None:
    talks = {
        f"conversation_{side}": [USER, answer(text), user("Shorter?"), answer(f"{side}: shorter.")]
        for side, text in (("a", GOOD), ("b", BAD))
    }
    row = only(kit, {"winner": "model_a", "turn": 1, "model_a": "x", "model_b": "y", **talks})
    assert row["prompt"] == [USER] and row["chosen"] == [answer(GOOD)]


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("alpaca", {"instruction": "Answer briefly.", "input": ASKED, "chosen": GOOD, "rejected": BAD}),
        ("orca", {"system": "Be brief.", "question": ASKED, "chosen": GOOD, "rejected": BAD}),
        ("swift", {"messages": [USER, answer(GOOD)], "rejected_response": BAD}),
        (
            "arena",
            {
                "conversation_a": [USER, answer(BAD)],
                "conversation_b": [USER, answer(GOOD)],
                "winner": "model_b",
                "model_a": "one",
                "model_b": "two",
            },
        ),
    ],
)
def test_new_layouts_through_the_command(kit: Any, tmp_path: Any, layout: str, row: Any) -> None:
    """Detected and named by the command, and the same row as a part of a recipe that insists on the layout."""
    from dpo_cli.cli import app
    from typer.testing import CliRunner

    kit.write_rows(tmp_path / "rows.jsonl", [row])
    data = "languages: null, total: null, eval_fraction: 1.0e-9, filters: {too_long: false}"
    for name, written in (("detected", ""), ("insisted", f", layout: {layout}")):
        text = f"model: {{id: builtin:tiny-qwen3}}\ndata: {{sources: [{{id: rows.jsonl{written}}}], {data}}}\n"
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        done = CliRunner().invoke(
            app, ["prepare", str(tmp_path / f"{name}.yaml"), "--runs-dir", str(tmp_path / "runs")]
        )
        assert done.exit_code == 0 and f"rows {layout}" in done.stdout, done.output
        [pair] = kit.read_jsonl(tmp_path / "runs" / name / "data" / "train.jsonl")
        assert ASKED in pair["prompt"][-1]["content"] and pair["chosen"] == [answer(GOOD)]
