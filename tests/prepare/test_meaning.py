"""What a row means: who speaks, what is asked, which answer is better; and what is no text, or contradicts itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dpo_cli.errors import DpoError

ASKED, GOOD, BAD = (
    "Name two uses of baking soda and explain one of them.",
    "It cleans pans and lifts batter: heated with an acid it gives off gas.",
    "Baking soda is used for a great many different things.",
)
ZH, ZH_GOOD, ZH_BAD = "请介绍一下如何给多肉植物浇水。", "多肉怕涝，土干透再浇。", "浇水，然后再浇一点水。"
OTHER = "Where is the copper harbour, and who built it?"
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED}
EARLIER = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def pair(prompt: Any = None, head: Any = (), good: Any = GOOD, bad: Any = BAD, **more: Any) -> dict[str, Any]:
    """A row of pairs: `head` stands in front of both answers."""
    row = {"prompt": prompt, "chosen": [*head, answer(good)], "rejected": [*head, answer(bad)], **more}
    return {name: value for name, value in row.items() if value is not None}


def only(kit: Any, row: Any, source: Any = None, **data: Any) -> Any:
    """What becomes of a lone row: its written pair and its report."""
    made = kit.run_rows([row], source, eval_fraction=1e-9, **data)
    assert made.funnel_holds()
    return made.train[0], made.report


def dropped(kit: Any, row: Any, source: Any = None, **data: Any) -> tuple[str, str]:
    """(reason, detail) of a row beside a good one of its columns."""
    good = {"prompt": kit.sentence("q"), "chosen": kit.sentence("a"), "rejected": kit.sentence("b")}
    made = kit.run_rows([good, row], source, **data)
    assert made.funnel_holds() and made.source()["kept"] == 1
    [reason] = made.dropped()
    return reason, made.report["examples"]["dropped"][reason][0]["detail"]


# --------------------------------------------------------------------------------------------------- content of turns


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": ASKED}],
        [{"type": "text", "text": ASKED, "image_url": None}],
        [{"type": "text", "text": ASKED[:20]}, {"type": "text", "text": ASKED[20:]}],
        [{"type": "input_text", "text": ASKED}],
        [{"text": ASKED}],
        [ASKED],
        {"type": "text", "text": ASKED},
    ],
)
def test_text_parts_are_joined(kit: Any, content: Any) -> None:
    row, _ = only(kit, pair([{"role": "user", "content": content}]))
    assert row["prompt"] == [USER]


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "image_url", "image_url": {"url": "data:…"}}, "image_url"),
        ({"type": "image"}, "image"),
        ({"type": "input_audio", "input_audio": {"data": "…"}}, "input_audio"),
        ({"type": "tool_use", "name": "search", "input": {}}, "tool_use"),
        ({"image_url": "x", "text": None}, "image_url"),
    ],
)
@pytest.mark.parametrize("side", ["prompt", "chosen"])
def test_a_part_that_is_no_text_is_named(kit: Any, part: Any, named: str, side: str) -> None:
    parts = [{"type": "text", "text": ASKED}, part]
    row = pair([user(parts)]) if side == "prompt" else pair([USER], good=parts)  # type: ignore[arg-type]
    reason, detail = dropped(kit, row)
    assert reason == "schema" and f"part of '{named}'" in detail and side in detail


@pytest.mark.parametrize(
    ("turns", "side"),
    [
        ([{"role": None, "from": "human", "content": None, "value": ASKED}], "prompt"),
        ([{"role": "", "from": "human", "content": "", "value": ASKED}], "prompt"),
        ([{"role": "user", "from": None, "content": ASKED, "value": None, "tool_calls": None, "weight": 1}], "prompt"),
        ([{"role": "human", "text": ASKED}], "prompt"),
    ],
)
def test_keys_that_are_null_hide_nothing(kit: Any, turns: Any, side: str) -> None:
    """Arrow gives each row every key of the file, null where the row has it not."""
    assert only(kit, pair(turns))[0]["prompt"] == [USER]


@pytest.mark.parametrize("asks", ["User", "human", "prompter", "用户"])
@pytest.mark.parametrize("answers", ["Assistant", "gpt", "bot", "AI", "model", "chatgpt", "助手"])
def test_roles_have_many_names(kit: Any, asks: str, answers: str) -> None:
    row = pair([{"role": "developer", "content": "Be brief."}, {"role": asks, "content": ASKED}])
    row["chosen"][0]["role"] = row["rejected"][0]["role"] = answers
    assert only(kit, row)[0]["prompt"] == [SYSTEM, USER]


def test_an_unknown_role_lists_those_that_are_known(kit: Any) -> None:
    reason, detail = dropped(kit, pair([{"role": "narrator", "content": "Once."}, USER]))
    assert reason == "schema" and "'narrator' at 0" in detail and "user, human" in detail and "developer" in detail


def test_a_late_system_turn_is_named(kit: Any) -> None:
    reason, detail = dropped(kit, pair([*EARLIER, SYSTEM, USER]))
    assert reason == "schema" and "system turn at 2" in detail


# ---------------------------------------------------------------------------------------------------- one question

ONE_QUESTION = {
    "system in prompt": (pair([SYSTEM, USER], [USER]), [SYSTEM, USER]),
    "system in answers": (pair([USER], [SYSTEM, USER]), [SYSTEM, USER]),
    "system in both": (pair([SYSTEM, USER], [SYSTEM, USER]), [SYSTEM, USER]),
    "system column and answers": (pair([USER], [SYSTEM, USER], system="Be brief."), [SYSTEM, USER]),
    "system column alone": (pair([USER], [USER], system="Be brief."), [SYSTEM, USER]),
    "system column without prompt": (pair(None, [USER], system="Be brief."), [SYSTEM, USER]),
    "system alone in answers": (pair([USER], [SYSTEM]), [SYSTEM, USER]),
    "white space": (pair([user(ASKED + "\n")], [user(" " + ASKED)]), [user(ASKED + "\n")]),
    "text prompt": (pair(ASKED + " ", [SYSTEM, USER]), [SYSTEM, user(ASKED + " ")]),
    "text prompt, earlier turns": (pair(ASKED, [*EARLIER, USER]), [*EARLIER, USER]),
    "first question as text": (pair("Hi!", [*EARLIER, USER]), [*EARLIER, USER]),
    "answers repeat the last question": (pair([*EARLIER, USER], [USER]), [*EARLIER, USER]),
    "prompt is the last question": (pair([USER], [*EARLIER, USER]), [*EARLIER, USER]),
    "prompt is what came before": (pair(EARLIER, [USER]), [*EARLIER, USER]),
    "answers go on": (pair([EARLIER[0]], [EARLIER[1], USER]), [*EARLIER, USER]),
    "one side repeats it": (
        {"prompt": [USER], "chosen": [USER, answer(GOOD)], "rejected": BAD},
        [USER],
    ),
    "system on one side": (
        {"chosen": [SYSTEM, USER, answer(GOOD)], "rejected": [USER, answer(BAD)]},
        [SYSTEM, USER],
    ),
    "Chinese": (pair([user(ZH)], [SYSTEM, user(ZH + "\n")], ZH_GOOD, ZH_BAD), [SYSTEM, user(ZH)]),
}


@pytest.mark.parametrize("name", ONE_QUESTION)
def test_a_prompt_that_is_repeated_is_asked_once(kit: Any, name: str) -> None:
    row, turns = ONE_QUESTION[name]
    written, report = only(kit, row)
    assert written["prompt"] == turns and report["warnings"][1:] == []


TWO_QUESTIONS = {
    "two prompts": (pair([USER], [user(OTHER)]), "ask different things"),
    "text not found": (pair(OTHER, [USER]), "text of prompt is not asked in chosen"),
    "answer to an earlier turn": (pair([*EARLIER, USER], [EARLIER[0]]), "ask different things"),
    "two systems": (pair([SYSTEM, USER], [{"role": "system", "content": "Be long."}, USER]), "different system turns"),
    "asked twice in one list": (pair([USER, USER]), "two user turns in a row"),
    "two user turns": (pair([user("Hi!"), USER]), "two user turns in a row"),
    "heads differ": (
        {"chosen": [USER, answer(GOOD)], "rejected": [user(OTHER), answer(BAD)]},
        "differ before their last turn",
    ),
    "history behind a question": (pair([user("Hi!")], [USER]), "ask different things"),
}


@pytest.mark.parametrize("name", TWO_QUESTIONS)
def test_two_different_questions_are_dropped(kit: Any, name: str) -> None:
    row, said = TWO_QUESTIONS[name]
    reason, detail = dropped(kit, row)
    assert reason == "schema" and said in detail


@pytest.mark.parametrize("layout", ["kto", "sharegpt"])
def test_other_layouts_ask_once_too(kit: Any, layout: str) -> None:
    rows: list[dict[str, Any]]
    if layout == "kto":
        rows = [
            {"prompt": [USER], "messages": [SYSTEM, USER, answer(text)], "label": label, "completion": None}
            for text, label in ((GOOD, True), (BAD, False))
        ]
    else:
        turns = [{"from": "human", "value": ASKED + " "}]
        sides = {"chosen": [turns[0], answer(GOOD)], "rejected": [turns[0], answer(BAD)]}
        rows = [{"system": "Be brief.", "conversations": turns, **sides}]
    [row] = kit.run_rows(rows, {"layout": layout}, eval_fraction=1e-9).train
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]


@pytest.mark.parametrize("history", [[["Hi!", "Hello."]], EARLIER, '[["Hi!", "Hello."]]'])
def test_earlier_turns_in_a_history_column_come_first(kit: Any, history: Any) -> None:
    for row in (
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"instruction": ASKED, "input": "", "chosen": GOOD, "rejected": BAD},
        {"query": ASKED, "response": GOOD, "rejected_response": BAD},
    ):
        assert only(kit, {**row, "history": history})[0]["prompt"] == [*EARLIER, USER]
    with_system = {"prompt": [SYSTEM, USER], "chosen": GOOD, "rejected": BAD, "history": history}
    assert only(kit, with_system)[0]["prompt"] == [SYSTEM, *EARLIER, USER]


@pytest.mark.parametrize("value", ["[]", "null", "None", "7"])
def test_an_input_that_looks_empty_is_not_lost(kit: Any, value: str) -> None:
    row = {"instruction": "What type is this JSON value?", "input": value, "chosen": GOOD, "rejected": BAD}
    assert only(kit, row)[0]["prompt"] == [user(f"What type is this JSON value?\n\n{value}")]


def test_columns_that_are_null_throughout_hide_no_layout(kit: Any) -> None:
    empty = dict.fromkeys(("conversations", "messages", "rejected_response", "instruction", "completions", "images"))
    rows = [{"prompt": ASKED, "chosen": GOOD, "rejected": BAD, **empty}]
    made = kit.run_rows(rows, eval_fraction=1e-9)
    assert made.report["provenance"]["sources"]["rows"]["layout"] == "pairs" and made.source()["kept"] == 1


def test_a_system_column_that_says_otherwise_is_counted(kit: Any) -> None:
    rows = [
        pair([SYSTEM, user(kit.sentence(n))], system=said) for n, said in enumerate(("Be brief.", "Rhyme.", "", None))
    ]
    made = kit.run_rows(rows)
    assert all(row["prompt"][0] == SYSTEM for row in made.rows if len(row["prompt"]) == 2) and len(made.rows) == 4
    [said] = [text for text in made.report["warnings"] if "system column" in text]
    assert said.startswith("rows: left out of 1 of 4 prompts")


@pytest.mark.parametrize(
    "prompt",
    [
        f"\n\nHuman: {ASKED}\n\nAssistant:",
        f"\n\nHuman: {ASKED} \n\nAssistant: ",
        f"Human: {ASKED}\n\nAssistant:",
        f"Human: {ASKED}\nAssistant:",
    ],
)
@pytest.mark.parametrize("layout", ["pairs", "kto", "nectar"])
def test_a_prompt_that_is_a_transcript_becomes_turns(kit: Any, prompt: str, layout: str) -> None:
    rows: dict[str, Any] = {
        "pairs": [{"prompt": prompt, "response": f" {GOOD}", "chosen": f" {GOOD}", "rejected": f" {BAD}"}],
        "kto": [
            {"prompt": prompt, "completion": f" {text}", "label": label} for text, label in ((GOOD, True), (BAD, False))
        ],
        "nectar": [{"prompt": prompt, "answers": [{"answer": GOOD, "rank": 1}, {"answer": BAD, "rank": 2}]}],
    }
    [row] = kit.run_rows(rows[layout], eval_fraction=1e-9).train
    assert row["prompt"] == [USER] and row["chosen"] == [answer(GOOD)] and row["rejected"] == [answer(BAD)]


def test_a_longer_transcript_and_transcripts_in_the_answers(kit: Any) -> None:
    talk = f"\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: {ASKED}\n\nAssistant:"
    for sides in ((f" {GOOD}", f" {BAD}"), (f"{talk} {GOOD}", f"{talk} {BAD}")):
        row, _ = only(kit, {"prompt": talk, "chosen": sides[0], "rejected": sides[1]})
        assert row["prompt"] == [*EARLIER, USER] and row["chosen"] == [answer(GOOD)]


@pytest.mark.parametrize(
    "asked", ["Human: explain this word, please.", "Human: Hi!\nAssistant: Hello.\nGo on with it."]
)
def test_a_question_that_only_begins_like_a_transcript_stays_text(kit: Any, asked: str) -> None:
    assert only(kit, {"prompt": asked, "chosen": GOOD, "rejected": BAD})[0]["prompt"] == [user(asked)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": json.dumps([USER]), "chosen": json.dumps([answer(GOOD)]), "rejected": str([answer(BAD)])},
        {
            "prompt": ASKED,
            "chosen": str({"from": "gpt", "value": GOOD}),
            "rejected": json.dumps({"from": "gpt", "value": BAD}),
        },
    ],
)
def test_messages_written_as_text_are_messages(kit: Any, row: Any) -> None:
    """As pandas and CSV leave them."""
    written, _ = only(kit, row)
    assert written["prompt"] == [USER] and written["rejected"] == [answer(BAD)]


# ------------------------------------------------------------------------------------------- thoughts, tools, images


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("thinking", [True, False])
def test_a_thought_of_its_own_key_is_the_answers_thought(kit: Any, key: str, thinking: bool) -> None:
    row = {
        "prompt": [USER],
        "chosen": [answer(GOOD, **{key: "It is a base."})],
        "rejected": [answer(BAD, **{key: None})],
    }
    written, report = only(kit, row, model={"id": "builtin:tiny-qwen3", "thinking": thinking})
    block = "<think>\nIt is a base.\n</think>\n\n"
    assert written["chosen"] == [answer(block + GOOD if thinking else GOOD)]
    assert report["sources"]["rows"]["edits"] == ({} if thinking else {"think_stripped": 1})


def test_thoughts_as_parts_and_thoughts_that_stand_in_the_content_already(kit: Any) -> None:
    parts = [{"type": "thinking", "thinking": "It is a base."}, {"type": "text", "text": GOOD}]
    inline = answer(f"<think>\nNo idea.\n</think>\n\n{BAD}", reasoning_content="No idea.")
    row = {"prompt": [USER], "chosen": [answer(parts)], "rejected": [inline]}
    written, _ = only(kit, row, model={"id": "builtin:tiny-qwen3", "thinking": True})
    assert written["chosen"][0]["content"] == f"<think>\nIt is a base.\n</think>\n\n{GOOD}"
    assert written["rejected"][0]["content"].count("<think>") == 1


def test_thoughts_of_earlier_turns_are_left_out_and_said(kit: Any) -> None:
    earlier = [EARLIER[0], answer("Hello.", reasoning_content="A greeting.")]
    written, report = only(kit, pair([*earlier, USER]))
    assert written["prompt"] == [*EARLIER, USER]
    assert any("thoughts in earlier turns" in text for text in report["warnings"])


CALL = [{"type": "function", "function": {"name": "search", "arguments": "{}"}}]
NO_TEXT = {
    "chosen calls a tool": ({"prompt": [USER], "chosen": [answer("Wait.", tool_calls=CALL)], "rejected": BAD}, "tool"),
    "no content but a call": (
        {"prompt": [USER], "chosen": GOOD, "rejected": [answer(None, tool_calls=CALL)]},
        "rejected calls a tool",
    ),
    "old function call": (
        {"prompt": [USER], "chosen": [answer(None, function_call={"name": "search"})], "rejected": BAD},
        "tool",
    ),
    "a tool's turn": (
        pair([USER, answer("", tool_calls=CALL), {"role": "tool", "content": "7"}, user("And?")]),
        "tool",
    ),
    "a turn of LLaMA-Factory's tool": (
        {
            "prompt": [{"from": "human", "value": ASKED}, {"from": "function_call", "value": "{}"}],
            "chosen": GOOD,
            "rejected": BAD,
        },
        "function_call",
    ),
    "images": ({"prompt": "<image>" + ASKED, "chosen": GOOD, "rejected": BAD, "images": ["0.jpg"]}, "images"),
    "images as text": ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "images": "['0.jpg']"}, "images"),
    "a placeholder": ({"prompt": "<image>" + ASKED, "chosen": GOOD, "rejected": BAD, "images": []}, "<image>"),
    "videos": ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "videos": [{"path": "0.mp4"}]}, "videos"),
    "audios": ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "audios": ["0.wav"], "images": None}, "audios"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_tools_and_images_are_unsupported(kit: Any, name: str) -> None:
    row, said = NO_TEXT[name]
    reason, detail = dropped(kit, row)
    assert reason == "unsupported" and said in detail


@pytest.mark.parametrize("empty", [None, [], "", "[]", [None]])
def test_empty_columns_of_tools_and_images_are_nothing(kit: Any, empty: Any) -> None:
    row = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "images": empty, "tools": empty}
    _, report = only(kit, row)
    assert not any("tools" in text for text in report["warnings"])
    html = {"prompt": f"{ASKED} What is <image> in SVG?", "chosen": GOOD, "rejected": BAD}
    assert "<image>" in only(kit, html)[0]["prompt"][0]["content"]


def test_a_column_of_tools_is_remarked(kit: Any) -> None:
    rows = [{"prompt": kit.sentence(n), "chosen": GOOD, "rejected": BAD, "tools": CALL if n else []} for n in range(4)]
    rows.append({"prompt": ASKED, "chosen": [answer("Wait.", tool_calls=CALL)], "rejected": BAD, "tools": CALL})
    made = kit.run_rows(rows)
    assert made.dropped() == {"unsupported": 1}
    assert "rows: left out of 4 of 5 prompts: the tools column" in made.report["warnings"]


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
    made = kit.run_rows(labelled(kit, good, bad), format="unpaired", eval_fraction=1e-9)
    assert sorted(row["label"] for row in made.train) == [False] * 3 + [True] * 3


@pytest.mark.parametrize("word", ["great", 2, 0.5, None, [1], {"a": 1}, "neutral"])
def test_other_labels_are_dropped_with_the_words_that_are_known(kit: Any, word: Any) -> None:
    rows = [*labelled(kit, True, False), {"prompt": ASKED, "completion": GOOD, "label": word}]
    made = kit.run_rows(rows, format="unpaired")
    assert made.dropped() == {"schema": 1}
    detail = made.report["examples"]["dropped"]["schema"][0]["detail"]
    assert "known are true, 1, " in detail and "undesirable" in detail


def test_an_answer_called_good_and_bad_is_dropped_and_a_repeated_one_kept_once(kit: Any) -> None:
    rows = labelled(kit, True, False, 8)
    rows.append({**rows[0], "label": False})  # contradiction: nothing is left of its prompt
    rows.append({**rows[1], "completion": rows[1]["completion"] + "\n"})  # the same again
    other = {**rows[2], "completion": kit.sentence("other")}
    rows += [other, {**other, "label": False}]  # contradiction beside an answer that is only good
    for order in (rows, rows[::-1]):
        made = kit.run_rows(order, format="unpaired", eval_fraction=1e-9)
        assert made.source()["in"] == 8 and made.dropped() == {"identical": 1} and made.funnel_holds()
        assert made.source()["answers_dropped"] == {"duplicate": 1, "identical": 4}
        assert len(made.train) == 7
    assert len({row["completion"][0]["content"].strip() for row in made.train}) == 7


@pytest.mark.parametrize("label", [True, False])
def test_rows_of_one_label_are_refused(kit: Any, label: bool) -> None:
    with pytest.raises(DpoError, match=f"all 6 training rows are {'good' if label else 'bad'} answers") as error:
        kit.run_rows(labelled(kit, label, label), format="unpaired", eval_fraction=1e-9)
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
    assert only(kit, row, {"columns": columns})[0]["prompt"] == [user(f"Answer briefly.\n\n{ASKED}")]


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
    row, _ = only(kit, {"winner": "model_a", "turn": 1, "model_a": "x", "model_b": "y", **talks})
    assert row["prompt"] == [USER] and row["chosen"] == [answer(GOOD)]
