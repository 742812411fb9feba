"""What a row means: who speaks, what is asked, which answer is better; and what is no text, or contradicts itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.prepare import kit
from tests.prepare.kit import ASKED, BAD, GOOD, answer, user

ZH, ZH_GOOD, ZH_BAD = "请介绍一下如何给多肉植物浇水。", "多肉怕涝，土干透再浇。", "浇水，然后再浇一点水。"
OTHER = "Where is the copper harbour, and who built it?"
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED}
EARLIER = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]


def pair(prompt: Any = None, head: Any = (), good: Any = GOOD, bad: Any = BAD, **more: Any) -> dict[str, Any]:
    """A row of pairs: `head` stands in front of both answers."""
    row = {"prompt": prompt, "chosen": [*head, answer(good)], "rejected": [*head, answer(bad)], **more}
    return {name: value for name, value in row.items() if value is not None}


def only(row: Any, source: Any = None, **data: Any) -> Any:
    """What becomes of a lone row: its written pair and its report."""
    made = kit.run_rows([row], source, eval_fraction=1e-9, **data)
    assert made.funnel_holds()
    return made.train[0], made.report


def dropped(row: Any, source: Any = None, **data: Any) -> tuple[str, str]:
    """(reason, detail) of a row beside a good one of its columns."""
    made = kit.run_rows([kit.pair("good"), row], source, **data)
    assert made.funnel_holds() and made.source()["kept"] == 1
    [reason] = made.dropped()
    return reason, made.detail(reason)


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
def test_text_parts_are_joined(content: Any) -> None:
    row, _ = only(pair([{"role": "user", "content": content}]))
    assert row["prompt"] == [USER]


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "image_url", "image_url": {"url": "data:…"}}, "image_url"),
        ({"type": "tool_use", "name": "search", "input": {}}, "tool_use"),
        ({"image_url": "x", "text": None}, "image_url"),
    ],
)
@pytest.mark.parametrize("side", ["prompt", "chosen"])
def test_a_part_that_is_no_text_is_named(part: Any, named: str, side: str) -> None:
    parts = [{"type": "text", "text": ASKED}, part]
    row = pair([user(parts)]) if side == "prompt" else pair([USER], good=parts)
    reason, detail = dropped(row)
    assert reason == "schema" and f"part of '{named}'" in detail and side in detail


@pytest.mark.parametrize(
    "turn",
    [
        {"role": None, "from": "human", "content": None, "value": ASKED},
        {"role": "", "from": "human", "content": "", "value": ASKED},
        {"role": "user", "from": None, "content": ASKED, "value": None, "tool_calls": None, "weight": 1},
        {"role": "human", "text": ASKED},
    ],
)
def test_keys_that_are_null_hide_nothing(turn: Any) -> None:
    """Arrow gives each row every key of the file, null where the row has it not."""
    assert only(pair([turn]))[0]["prompt"] == [USER]


@pytest.mark.parametrize(
    ("asks", "answers"),
    [("User", "Assistant"), ("human", "gpt"), ("prompter", "bot"), ("用户", "助手"), ("user", "AI"), ("user", "model")],
)
def test_roles_have_many_names(asks: str, answers: str) -> None:
    row = pair([{"role": "developer", "content": "Be brief."}, {"role": asks, "content": ASKED}])
    row["chosen"][0]["role"] = row["rejected"][0]["role"] = answers
    assert only(row)[0]["prompt"] == [SYSTEM, USER]


def test_an_unknown_role_lists_those_that_are_known() -> None:
    reason, detail = dropped(pair([{"role": "narrator", "content": "Once."}, USER]))
    assert reason == "schema" and "'narrator' at 0" in detail and "user, human" in detail and "developer" in detail


def test_a_late_system_turn_is_named() -> None:
    reason, detail = dropped(pair([*EARLIER, SYSTEM, USER]))
    assert reason == "schema" and "system turn at 2" in detail


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
    "one side repeats it": ({"prompt": [USER], "chosen": [USER, answer(GOOD)], "rejected": BAD}, [USER]),
    "system on one side": ({"chosen": [SYSTEM, USER, answer(GOOD)], "rejected": [USER, answer(BAD)]}, [SYSTEM, USER]),
    "Chinese": (pair([user(ZH)], [SYSTEM, user(ZH + "\n")], ZH_GOOD, ZH_BAD), [SYSTEM, user(ZH)]),
}


@pytest.mark.parametrize("name", ONE_QUESTION)
def test_a_prompt_that_is_repeated_is_asked_once(name: str) -> None:
    row, turns = ONE_QUESTION[name]
    written, report = only(row)
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
def test_two_different_questions_are_dropped(name: str) -> None:
    row, said = TWO_QUESTIONS[name]
    reason, detail = dropped(row)
    assert reason == "schema" and said in detail


@pytest.mark.parametrize("history", [[["Hi!", "Hello."]], EARLIER, '[["Hi!", "Hello."]]'])
def test_earlier_turns_in_a_history_column_come_first(history: Any) -> None:
    for row in (
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"instruction": ASKED, "input": "", "chosen": GOOD, "rejected": BAD},
        {"query": ASKED, "response": GOOD, "rejected_response": BAD},
    ):
        assert only({**row, "history": history})[0]["prompt"] == [*EARLIER, USER]
    with_system = {"prompt": [SYSTEM, USER], "chosen": GOOD, "rejected": BAD, "history": history}
    assert only(with_system)[0]["prompt"] == [SYSTEM, *EARLIER, USER]


@pytest.mark.parametrize("value", ["[]", "null", "None", "7"])
def test_an_input_that_looks_empty_is_not_lost(value: str) -> None:
    row = {"instruction": "What type is this JSON value?", "input": value, "chosen": GOOD, "rejected": BAD}
    assert only(row)[0]["prompt"] == [user(f"What type is this JSON value?\n\n{value}")]


def test_columns_that_are_null_throughout_hide_no_layout() -> None:
    empty = dict.fromkeys(("conversations", "messages", "rejected_response", "instruction", "completions", "images"))
    rows = [{"prompt": ASKED, "chosen": GOOD, "rejected": BAD, **empty}]
    made = kit.run_rows(rows, eval_fraction=1e-9)
    assert made.report["provenance"]["sources"]["rows"]["layout"] == "pairs" and made.source()["kept"] == 1


def test_a_system_column_that_says_otherwise_is_counted() -> None:
    rows = [
        pair([SYSTEM, user(kit.sentence(n))], system=said) for n, said in enumerate(("Be brief.", "Rhyme.", "", None))
    ]
    made = kit.run_rows(rows)
    assert all(row["prompt"][0] == SYSTEM for row in made.rows if len(row["prompt"]) == 2) and len(made.rows) == 4
    [said] = [text for text in made.report["warnings"] if "system column" in text]
    assert said.startswith("rows: left out of 1 of 4 prompts")


@pytest.mark.parametrize("prompt", [f"\n\nHuman: {ASKED} \n\nAssistant: ", f"Human: {ASKED}\nAssistant:"])
def test_a_prompt_that_is_a_transcript_becomes_turns(prompt: str) -> None:
    pairs = [{"prompt": prompt, "chosen": f" {GOOD}", "rejected": f" {BAD}"}]
    kto = [{"prompt": prompt, "completion": f" {text}", "label": text == GOOD} for text in (GOOD, BAD)]
    for rows in (pairs, kto):
        [row] = kit.run_rows(rows, eval_fraction=1e-9).train
        assert row["prompt"] == [USER] and row["chosen"] == [answer(GOOD)] and row["rejected"] == [answer(BAD)]


def test_a_longer_transcript_and_transcripts_in_the_answers() -> None:
    talk = f"\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: {ASKED}\n\nAssistant:"
    for sides in ((f" {GOOD}", f" {BAD}"), (f"{talk} {GOOD}", f"{talk} {BAD}")):
        row, _ = only({"prompt": talk, "chosen": sides[0], "rejected": sides[1]})
        assert row["prompt"] == [*EARLIER, USER] and row["chosen"] == [answer(GOOD)]


@pytest.mark.parametrize(
    "asked", ["Human: explain this word, please.", "Human: Hi!\nAssistant: Hello.\nGo on with it."]
)
def test_a_question_that_only_begins_like_a_transcript_stays_text(asked: str) -> None:
    assert only({"prompt": asked, "chosen": GOOD, "rejected": BAD})[0]["prompt"] == [user(asked)]


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
def test_messages_written_as_text_are_messages(row: Any) -> None:
    """As pandas and CSV leave them."""
    written, _ = only(row)
    assert written["prompt"] == [USER] and written["rejected"] == [answer(BAD)]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "reasoning_details"])
@pytest.mark.parametrize("thinking", [True, False])
def test_a_thought_of_its_own_key_is_the_answers_thought(key: str, thinking: bool) -> None:
    thought = [{"text": "It is a base."}] if key == "reasoning_details" else "It is a base."
    row = {"prompt": [USER], "chosen": [answer(GOOD, **{key: thought})], "rejected": [answer(BAD, **{key: None})]}
    written, report = only(row, model={"id": "builtin:tiny-qwen3", "thinking": thinking})
    block = "<think>\nIt is a base.\n</think>\n\n"
    assert written["chosen"] == [answer(block + GOOD if thinking else GOOD)]
    assert report["sources"]["rows"]["edits"] == ({} if thinking else {"think_stripped": 1})


def test_thoughts_as_parts_and_thoughts_that_stand_in_the_content_already() -> None:
    parts = [{"type": "thinking", "thinking": "It is a base."}, {"type": "text", "text": GOOD}]
    inline = answer(f"<think>\nNo idea.\n</think>\n\n{BAD}", reasoning_content="No idea.")
    row = {"prompt": [USER], "chosen": [answer(parts)], "rejected": [inline]}
    written, _ = only(row, model={"id": "builtin:tiny-qwen3", "thinking": True})
    assert written["chosen"][0]["content"] == f"<think>\nIt is a base.\n</think>\n\n{GOOD}"
    assert written["rejected"][0]["content"].count("<think>") == 1


def test_thoughts_of_earlier_turns_are_left_out_and_said() -> None:
    earlier = [EARLIER[0], answer("Hello.", reasoning_content="A greeting.")]
    written, report = only(pair([*earlier, USER]))
    assert written["prompt"] == [*EARLIER, USER]
    assert any("thoughts in earlier turns" in text for text in report["warnings"])


CALL = [{"type": "function", "function": {"name": "search", "arguments": "{}"}}]
TEXTS = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
CALLED = [{"from": "human", "value": ASKED}, {"from": "function_call", "value": "{}"}]
NO_TEXT: dict[str, tuple[Any, str]] = {
    "chosen calls a tool": ({**TEXTS, "chosen": [answer("Wait.", tool_calls=CALL)]}, "tool"),
    "no content but a call": ({**TEXTS, "rejected": [answer(None, tool_calls=CALL)]}, "rejected calls a tool"),
    "old function call": ({**TEXTS, "chosen": [answer(None, function_call={"name": "search"})]}, "tool"),
    "a tool's turn": (
        pair([USER, answer("", tool_calls=CALL), {"role": "tool", "content": "7"}, user("And?")]), "tool",
    ),
    "a turn of LLaMA-Factory's tool": ({**TEXTS, "prompt": CALLED}, "function_call"),
    "images": ({**TEXTS, "prompt": "<image>" + ASKED, "images": ["0.jpg"]}, "images"),
    "images as text": ({**TEXTS, "images": "['0.jpg']"}, "images"),
    "a placeholder": ({**TEXTS, "prompt": "<image>" + ASKED, "images": []}, "<image>"),
    "videos": ({**TEXTS, "videos": [{"path": "0.mp4"}]}, "videos"),
    "audios": ({**TEXTS, "audios": ["0.wav"], "images": None}, "audios"),
    "of another name": ({**TEXTS, "chosen_image_url": "0.png"}, "chosen_image_url"),
    "of a Chinese name": ({**TEXTS, "图片": ["0.png"]}, "图片"),
    "a placeholder without a column": ({**TEXTS, "prompt": f"<image>\n{ASKED}"}, "<image>"),
    "a placeholder at the end": ({**TEXTS, "prompt": f"{ASKED} <video>"}, "<video>"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_TEXT)
def test_tools_and_images_are_unsupported(name: str) -> None:
    row, said = NO_TEXT[name]
    reason, detail = dropped(row)
    assert reason == "unsupported" and said in detail


@pytest.mark.parametrize("empty", [None, [], "", "[]", [None]])
def test_empty_columns_of_tools_and_images_are_nothing(empty: Any) -> None:
    row = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "images": empty, "tools": empty}
    _, report = only(row)
    assert not any("tools" in text for text in report["warnings"])
    html = {"prompt": f"{ASKED} What is <image> in SVG?", "chosen": GOOD, "rejected": BAD}
    assert "<image>" in only(html)[0]["prompt"][0]["content"]


def test_a_column_of_tools_is_remarked() -> None:
    rows = [{"prompt": kit.sentence(n), "chosen": GOOD, "rejected": BAD, "tools": CALL if n else []} for n in range(4)]
    rows.append({"prompt": ASKED, "chosen": [answer("Wait.", tool_calls=CALL)], "rejected": BAD, "tools": CALL})
    made = kit.run_rows(rows)
    assert made.dropped() == {"unsupported": 1}
    assert "rows: left out of 3 of 5 prompts: the tools column" in made.report["warnings"]


@pytest.mark.parametrize("name", ["prompt", "instruct"])
def test_an_input_beside_the_prompt_is_part_of_the_question(name: str) -> None:
    source = {"columns": {"prompt": name}}
    row = {name: "Translate this into French.", "input": ASKED, "chosen": GOOD, "rejected": BAD}
    assert only(row, source)[0]["prompt"] == [user(f"Translate this into French.\n\n{ASKED}")]
    assert only({**row, name: f"Answer this: {ASKED}"}, source)[0]["prompt"] == [user(f"Answer this: {ASKED}")]


@pytest.mark.parametrize("name", ["system_prompt", "system_message"])
def test_a_system_column_may_have_longer_names(name: str) -> None:
    assert only({**TEXTS, name: "Be brief."})[0]["prompt"] == [SYSTEM, USER]


@pytest.mark.parametrize("turn", [{"sender": "user", "text": "Hi"}, {"role": "user", "parts": [{"text": "Hi"}]}])
def test_turns_of_other_keys_are_shown_with_the_keys_they_have(turn: Any) -> None:
    _, detail = dropped({**TEXTS, "prompt": [turn]})
    assert f"has {', '.join(turn)}; a turn is role and content, or from and value" in detail
