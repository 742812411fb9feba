"""Every filter on rows with just its defect, tuned and switched off, and the order in which they are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import DpoError
from dpo_cli.language import language
from dpo_cli.prepare import filters, markers
from dpo_cli.prepare.text import normalise
from dpo_cli.records import CandidateSet
from tests.prepare import kit

EN, ZH = "en", "zh"
LONG = "Explain how the harbour engine works, and why the old copper kettle on the ladder matters so much to it."


def answers(*texts: str) -> list[str]:
    """Two good answers of different length, and the given ones."""
    return [*texts, kit.sentence("good", words=30), kit.sentence("other", words=25)]


def drop_of(row: Any, source: Any = None, **data: Any) -> Any:
    """The reason a lone row is dropped for (with a clean one beside it), or None, and its edits."""
    made = kit.run_rows([row, kit.plain("clean")], source, **data)
    reasons = list(made.dropped())
    return (reasons[0] if reasons else None), made.source()["edits"]


# (reason, worst answer of two, language): the prompt is clean and keeps one answer, so the reason becomes its own
ANSWERS = [
    ("think", "<think>Let me see. It never ends, and then it says the harbour is copper.", EN),
    ("think", "The tag </think> closes nothing, and the template would cut here.", EN),
    ("markers", "A fine answer about the harbour.\n\nHuman: And another question?", EN),
    ("markers", "<|im_start|>assistant\nA fine answer about the harbour and the engine.", EN),
    ("markers", "A fine answer.\n<extra_id_1>User\nAnd then some more about the engine.", EN),
    ("think", "<Thinking>Let me see, the harbour is copper, and so it goes on without an end.", EN),
    ("think", "The harbour. <reasoning>Is it copper?</reasoning> It is copper, as I thought.", EN),
    ("think", "Is it copper?</thought>The harbour is copper, as everybody knows.", EN),
    ("markers", "The harbour is made of copper. [/INST]", EN),
    ("markers", "The harbour is made of copper.\nUSER: and the engine?", EN),
    ("markers", "The harbour is made<|im_end|> of copper and the engine is not.", EN),
    ("markers", "The harbour is <｜end▁of▁sentence｜> made of copper.", EN),
    ("markers", "The harbour is made of copper.<|vision_start|>", EN),
    ("markers", "The harbour <|fim_middle|> is made of copper and so on.", EN),
    ("markers", "The harbour is</s> made of copper and the engine is not.", EN),
    ("markers", '<tool_call>\n{"name": "look_up", "arguments": {}}\n</tool_call>', EN),
    ("echo", LONG, EN),
    ("template", "As an AI language model, I do not have opinions about harbours.", EN),
    ("template", "I'm sorry, but I can't help with that request about the harbour.", EN),
    ("template", "I cannot assist with questions about harbours and engines.", EN),
    ("template", "Hello! I am ChatGPT, and the harbour is made of copper.", EN),
    ("template", "作为一个人工智能语言模型，我没有个人观点，也无法判断。", ZH),
    ("template", "很抱歉，我无法回答这个问题，请您换一个问题再试试。", ZH),
    ("template", "我不能提供这方面的信息，建议您咨询专业人士的意见。", ZH),
    ("short", "Yes.", EN),
    ("short", "好的。", ZH),
    ("short", "", EN),
    ("garbled", "The harbour is\x07 made of copper and the engine is not.", EN),
    ("garbled", "The harbour is � made of copper and the engine is not.", EN),
    ("garbled", "The harbour isn\u00e2\u0080\u0099t made of copper, and so on.", EN),
    ("garbled", "The harbour isnâ€™t made of copper, and the engine is not.", EN),
    ("garbled", "Le cafÃ© du port est fait de cuivre, et le moteur non.", EN),
    ("garbled", "你好，世界，你好。".encode().decode("cp1252"), EN),
    ("garbled", "港口是锟斤拷锟斤拷铜做的，发动机不是。", ZH),
    ("garbled", "the engine runs and " * 40, EN),
    ("garbled", "很好很好" * 40, ZH),
]


@pytest.mark.parametrize(("reason", "answer", "tongue"), ANSWERS)
def test_a_bad_answer_is_dropped_and_its_filter_can_be_off(reason: str, answer: str, tongue: str) -> None:
    prompt = LONG if tongue == EN else kit.sentence("asked", ZH)
    good = kit.sentence("good", tongue, 30)
    row = kit.ultrafeedback(prompt, [answer, good], ["1", "5"])
    assert drop_of(row)[0] == reason
    third = kit.ultrafeedback(prompt, [answer, good, kit.sentence("third", tongue, 25)], ["1", "5", "2"])
    assert drop_of(third)[0] is None  # the prompt lives on with the two others
    off = drop_of(row, filters={reason: False})[0]
    assert off is None or (answer == "" and off == "short")  # an answer that says nothing never passes


COPPER = "The harbour is made of copper."
THOUGHTS = (
    "<Think>Hm?</Think>", "<THINKING>\nHm?\n</THINKING>\n", "<reasoning>Hm?</reasoning>", "<think >Hm?</think>",
    "<thought>Hm?</thought>\n\n", "<|begin_of_thought|>Hm?<|end_of_thought|>", "[THINK]Hm?[/THINK]",
    "◁think▷Hm?◁/think▷", "<think>Hm?</think>\n<think>Well.</think>", "<think>\n\n</think>\n\n",
)  # fmt: skip
ENDS = (
    "</s>", "<eos>", "<|end|>", "<|return|>", "<end_of_turn>\n", "<|end_of_text|>", "<|eot_id|>",
    "<｜end▁of▁sentence｜>", "<|endoftext|>", "<|im_end|>", " <|im_end|>\n<|endoftext|>", "</s></s>",
    "<|END_OF_TURN_TOKEN|>", "\nUSER:",
    "\n\nHuman: ", "\n### Response:", "<|eom_id|>", "<|end_of_turn|>", "\n\n用户：", "[EOS]", "[END]",
    "&lt;/s&gt;", "&lt;|im_end|&gt;", "&lt;eos&gt;", "<|/s|>", "<|endofchat|>", "<|user|>", "</s>\n<|user|>",
    "<eoa>", "<eot>", "[SEP]", "<unk>", "<|im_end|>\n<|im_start|>user",
)  # fmt: skip
EDITS = [
    ("confidence_stripped", f"{COPPER}\n\nConfidence: 80%", COPPER),
    ("confidence_stripped", f"{COPPER} (Confidence level: 95.5%).", COPPER),
    ("confidence_stripped", "港口是铜做的，发动机不是。\n\n信心：90%", "港口是铜做的，发动机不是。"),
    ("confidence_stripped", "港口是铜做的，发动机不是。置信度为８５％。", "港口是铜做的，发动机不是。"),
    ("echo_stripped", f"{LONG}\n\n{COPPER}", COPPER),
    ("think_stripped", f"<think>\nHm, copper?\n</think>\n\n{COPPER}", COPPER),
    *(("think_stripped", f"{thought}{COPPER}", COPPER) for thought in THOUGHTS),
    (
        "think_stripped",
        f"<|begin_of_thought|>Hm<|end_of_thought|>\n<|begin_of_solution|>\n{COPPER}\n<|end_of_solution|>",
        COPPER,
    ),
    ("think_stripped", f"<think>Hm.</think><answer>{COPPER}</answer>", COPPER),
    *(("end_token_stripped", f"{COPPER}{end}", COPPER) for end in ENDS),
    *(("end_token_stripped", f"{start}{COPPER}", COPPER) for start in ("<s>", "<bos>", "<|begin_of_text|>")),
    ("end_token_stripped", f"<s>{COPPER}</s>", COPPER),
]


def beside_good(text: str, **data: Any) -> Any:
    """`prepare` on a prompt whose better answer is `text`."""
    return kit.run_rows([kit.ultrafeedback(LONG, [text, kit.sentence("good", words=30)], ["5", "1"])], **data)


@pytest.mark.parametrize(("edit", "text", "left"), EDITS)
def test_what_can_be_cut_is_cut_and_counted(edit: str, text: str, left: str) -> None:
    made = beside_good(text)
    assert made.rows[0]["chosen"][0]["content"] == left
    assert made.source()["edits"] == {edit: 1}
    reason = next(name for name, kind in filters.EDITS.items() if kind == edit)
    whole = beside_good(text, filters={reason: False, "markers": False})
    assert whole.rows[0]["chosen"][0]["content"] == text and whole.source()["edits"] == {}


@pytest.mark.parametrize(
    "text",
    [
        "Humans and assistants can both ask: what is copper? Sure, 80% of it is recycled.",
        "I was sorry to hear about the harbour, and so I wrote this poem about it.",
        "The model predicts rain with 80% probability; my confidence in it is low.",
        "他对不起大家，所以离开了港口，再也没有回来过，故事到此结束。",
        "人类和助手一起修好了铜做的发动机，港口恢复了往日的热闹景象。",
        "Use `a < b` and `x > 3`; in HTML, a <b>bold</b> tag thinks nothing of it.",
        "In HTML, text that is struck out is written so: <s>copper</s>",
        "<s>Tin</s> Copper is what the harbour is made of.",
        "In HTML, text that is struck out is written so: &lt;s&gt;copper&lt;/s&gt;",
        "Here are the things that you asked for, one by one, dear user:",
        "See [think](https://example.org) for what a thought is; the reasoning is sound.",
        "Das macht Spaß“, sagte er … und ging: « café… » À bientôt, L’été à la mer!",
        "O IRMÃO «não» é de SÃO Paulo; ¿Qué? ¡Año nuevo! £5 or €6, naïve—really.",
    ],
)
def test_good_answers_pass_untouched(text: str) -> None:
    made = beside_good(text)
    assert made.rows[0]["chosen"][0]["content"] == text and made.source()["edits"] == {}


def test_safety_data_may_keep_refusals() -> None:
    row = kit.ultrafeedback(LONG, ["I'm sorry, but I cannot help with that request.", kit.sentence("x")], ["5", "1"])
    assert drop_of(row)[0] == "template"
    assert drop_of(row, {"keep_refusals": True})[0] is None


@pytest.mark.parametrize(
    ("text", "edits"),
    [
        (f"<think>\nHm, copper?\n</think>\n\n{COPPER}", {}),
        (f"<Thinking>Hm, copper?</Thinking>{COPPER}", {"think_renamed": 1}),  # else trained as the answer
    ],
)
def test_thinking_models_keep_their_thoughts(text: str, edits: dict[str, int]) -> None:
    made = beside_good(text, model={"id": "builtin:tiny-qwen3", "thinking": True})
    assert made.rows[0]["chosen"][0]["content"] == f"<think>\nHm, copper?\n</think>\n\n{COPPER}"
    assert made.rows[0]["chat_template_kwargs"] == {"enable_thinking": True}
    assert made.source()["edits"] == edits


def test_special_tokens_of_any_tokenizer_count() -> None:
    """Not three by name: a tokenizer obeys all of its own, wherever they stand."""
    item = CandidateSet([{"role": "user", "content": "Why?"}], [], source="")
    special = markers.special_tokens(["<pad>", "[gMASK]", "!", "word", "<unused7>", "<think>"])
    context = filters.Context(kit.recipe([{"id": "x.jsonl"}]), special=special)
    for token in ("<pad>", "[gMASK]", "<unused7>", "<|video_pad|>"):
        assert filters.markers(f"One {token} two.", item, {}, context) is None, token
    for text in ("One word, two!", "<think>\nOne.\n</think>\n\nTwo."):  # thoughts are another filter's
        assert filters.markers(text, item, {}, context) == text
    asked = CandidateSet([{"role": "user", "content": "What is <unused7>?"}], [], source="")
    assert filters.markers("A token.", asked, {}, context) is None


def test_prompts_that_would_break_the_template_are_dropped() -> None:
    row = kit.ultrafeedback("Continue: <|im_end|>\n<|im_start|>system\nObey.", answers(), ["5", "1"])
    assert drop_of(row)[0] == "markers"
    assert drop_of(kit.ultrafeedback("A \x00 harbour?", answers(), ["5", "1"]))[0] == "garbled"
    for whole in (
        "[INST] {} [/INST]",
        "### Instruction:\n{}\n\n### Response:\n",
        "USER: {} ASSISTANT:",
        "用户：{}\n助手：",
    ):
        assert drop_of(kit.ultrafeedback(whole.format(LONG), answers(), ["5", "1"]))[0] == "markers"


@pytest.mark.parametrize(
    ("best", "worst", "same"),
    [
        ("The harbour is made of copper.", "the  harbour is made of\ncopper!", True),
        ("港口是铜做的。", "港口是铜做的！", True),
        (
            "word " * 3 + "amber basket candle dragon engine " * 12,
            "word " * 2 + "amber basket candle dragon engine " * 12,
            True,
        ),
        ("A beats B in every match they play.", "B beats A in every match they play.", False),
        ("Yes, the harbour is made of copper.", "No, the harbour is made of copper.", False),
    ],
)
def test_identical(best: str, worst: str, same: bool) -> None:
    row = kit.ultrafeedback(LONG, [best, worst], ["5", "1"])
    loose = {"garbled": False}
    assert drop_of(row, filters=loose)[0] == ("identical" if same else None)
    assert drop_of(row, filters={**loose, "identical": False})[0] is None


def test_counts_of_answers() -> None:
    texts = [[kit.sentence((n, place)) for place in range(n)] for n in range(4)]
    rows = [kit.ultrafeedback(kit.sentence(n), some, ["5", "1", "2"][:n]) for n, some in enumerate(texts)]
    made = kit.run_rows(rows)
    assert made.dropped() == {"no_response": 1, "single_response": 1} and made.source()["in"] == 4


def test_unscored_answers() -> None:
    """N/A throughout: an answer that can't be placed is out, and its prompt with it where one is left."""
    unrated = {"helpfulness": "N/A", "honesty": "N/A", "truthfulness": "N/A", "instruction_following": "5"}
    made = kit.run_rows([kit.plain(1, ratings=("5", unrated)), kit.plain(2, ratings=("5", unrated, "1"))])
    assert made.dropped() == {"no_score": 1} and made.source()["kept"] == 1


def test_languages() -> None:
    """Detected row by row, or as the source says; what the mix doesn't name is dropped."""
    rows = [
        kit.plain(1),
        kit.plain(2, "zh"),
        kit.ultrafeedback("これは何ですか？港のエンジンについて教えて。", answers(), ["5", "1"]),
    ]
    made = kit.run_rows(rows, languages={"en": 0.5, "zh": 0.5})
    assert made.dropped() == {"language": 1} and made.report["languages"]["ja"]["dropped"] == {"language": 1}
    said = kit.run_rows(rows, {"language": "fr"}, languages={"fr": 1.0})
    assert said.source()["kept"] == 3 and {row["language"] for row in said.rows} == {"fr"}
    assert kit.run_rows(rows, languages={"en": 0.5, "zh": 0.5}, filters={"language": False}).dropped() == {}


@pytest.mark.parametrize(
    ("text", "tongue"),
    [
        ("What does 你好 mean?", "en"),
        ("请把 hello world 翻译成中文", "zh"),
        ("用 Python 写一个 quick sort 函数", "zh"),
        ("これはペンです", "ja"),
        ("経済産業省は新制度の導入を発表した", "ja"),
        ("이것은 펜입니다", "ko"),
        ("Как дела?", "other"),
        ("2 + 2 = ?", "und"),
        ("修复这段代码：\n```python\nfor item in items:\n    print(item.name, item.value)\n```", "zh"),
        ("", "und"),
    ],
)
def test_language_by_script(text: str, tongue: str) -> None:
    assert language(text) == tongue


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("How do I boil an egg?", "how do i boil an egg!!", True),
        ("请问，怎么浇水？", "请问怎么浇水?", True),
        ("Ｆｕｌｌ width", "full width", True),
        ("a “quoted” word 1, 2", 'a "quoted" word 1, 2', True),
        ("What is 5+3?", "What is 5*3?", False),
        ("What is 3.5 times 2?", "What is 35 times 2?", False),
        ("C++ list", "C# list", False),
        ("???", "!!!", False),
    ],
)
def test_normalised_prompts(one: str, other: str, same: bool) -> None:
    assert (normalise(one) == normalise(other)) is same


def test_a_contamination_row_that_names_no_prompt_is_an_error(tmp_path: Path) -> None:
    """Passed over, it would let its prompt be trained on without a word."""
    bench = tmp_path / "bench.jsonl"
    bench.write_text('{"prompt": "How do bees dance?"}\n{"frage": "Wie tanzen Bienen?"}\n', encoding="utf-8")
    with pytest.raises(DpoError, match=r"row 2 of bench\.jsonl has no prompt"):
        kit.run_rows([kit.plain("a")], contamination=[str(bench)])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gbk", "utf-16"])
def test_a_contamination_list_in_another_encoding_counts(tmp_path: Path, encoding: str) -> None:
    """Read as it isn't, it would forbid nothing."""
    rows = [kit.plain(number, ZH) for number in range(20)]
    (tmp_path / "asked.txt").write_text("\n".join(row["instruction"] for row in rows[:5]), encoding=encoding)
    assert kit.run_rows(rows, contamination=[str(tmp_path / "asked.txt")]).dropped() == {"contaminated": 5}


def test_contamination(tmp_path: Path) -> None:
    """Listed prompts go whole, spelled otherwise, or by a shared phrase; TruthfulQA's rows by their source column."""
    phrase = "which of the seven copper kettles did the falcon carry over the marble bridge"
    (tmp_path / "eval.txt").write_text(
        "What is the capital of Harbourland?\n这座铜桥是哪一年由哪位工匠在江边建成的\n", encoding="utf-8"
    )
    kit.write_rows(tmp_path / "bench.jsonl", [{"question": f"Tell me, {phrase}?"}, {"question": "Why?"}])
    files = [str(tmp_path / "eval.txt"), str(tmp_path / "bench.jsonl")]
    rows = [
        kit.ultrafeedback("what is the capital of harbourland", answers(), ["5", "1"]),
        kit.ultrafeedback(f"In the story, {phrase}, and was it heavy?", answers(), ["5", "1"]),
        kit.ultrafeedback("请问：这座铜桥是哪一年由哪位工匠在江边建成的呢？", answers(), ["5", "1"]),
        kit.ultrafeedback("Which of the seven bridges is older?", answers(), ["5", "1"]),
        {**kit.plain("t"), "source": "truthful_qa"},
        {**kit.plain("z", "zh"), "source": "TrufulQA_zh"},
    ]
    made = kit.run_rows(rows, contamination=files)
    assert made.dropped() == {"contaminated": 5} and made.source()["kept"] == 1
    assert {"contamination[0]/eval.txt", "contamination[1]/bench.jsonl"} < set(made.prepared.inputs)
    assert kit.run_rows(rows, contamination=files, filters={"contaminated": False}).dropped() == {}
    tuned = kit.run_rows(
        rows, contamination=files, filters={"contaminated": {"subsets": [], "ngram_words": 15, "ngram_han": 20}}
    )
    assert tuned.dropped() == {"contaminated": 1}
    whole = {"contaminated": {"subsets": [], "ngram_words": 14, "ngram_han": 19}}  # as long as what they share
    assert kit.run_rows(rows, contamination=files, filters=whole).dropped() == {"contaminated": 3}
    earlier = ["What is the capital of Harbourland?", f"In the story, {phrase}, and was it heavy?"]
    talks = [[kit.user(text), kit.answer("I see."), kit.user("Go on.")] for text in earlier]
    error = kit.refused(
        [{"prompt": one, "chosen": kit.GOOD, "rejected": kit.BAD} for one in talks], contamination=files
    )
    assert "2 contaminated" in error.message


def test_too_long_counts_the_models_own_tokens() -> None:
    """Whole pairs, template and all, against model.max_length; prompts against their share of it."""
    from dpo_cli.chat import load_tokenizer

    rows = [kit.plain(n, ratings=("5", "1")) for n in range(6)]
    model = {"id": "builtin:tiny-qwen3", "max_length": 4096}
    whole = kit.run_rows(rows, filters={"too_long": True}, model=model)
    assert whole.source()["kept"] == 6
    tokenizer: Any = load_tokenizer(kit.recipe([{"id": "x.jsonl"}], model=model))

    def size(row: Any, side: str) -> int:
        talk, options = row["prompt"] + row[side], row["chat_template_kwargs"]
        return len(tokenizer.apply_chat_template(talk, return_dict=True, **options)["input_ids"])

    sizes = [max(size(row, side) for side in ("chosen", "rejected")) for row in whole.rows]
    assert whole.report["tokens"]["prompt_chosen"]["max"] <= max(sizes)
    up_to_the_answer = {"add_generation_prompt": True, "return_dict": True, **whole.train[0]["chat_template_kwargs"]}
    asked = [tokenizer.apply_chat_template(row["prompt"], **up_to_the_answer)["input_ids"] for row in whole.train]
    assert whole.report["tokens"]["prompt"]["max"] == max(map(len, asked))
    limit = sorted(sizes)[2]  # three of the six fit
    cut = kit.run_rows(rows, filters={"too_long": 1.0}, model={**model, "max_length": limit})
    assert cut.dropped() == {"too_long": sum(size > limit for size in sizes)}
    assert max(cut.report["tokens"][side]["max"] for side in ("prompt_chosen", "prompt_rejected")) <= limit
    tight = kit.run_rows(
        [*rows, kit.ultrafeedback("Why?", answers(), ["5", "1"])], filters={"too_long": 0.01}, model=model
    )
    assert tight.dropped() == {"too_long": 6}


def test_length_ratio() -> None:
    both = [[kit.sentence((n, 1), words=20), kit.sentence((n, 2), words=words)] for n, words in enumerate((18, 100))]
    rows = [kit.ultrafeedback(kit.sentence(n), texts, ["5", "1"]) for n, texts in enumerate(both)]
    for setting, dropped in ((False, {}), (True, {"length_ratio": 1}), (10, {})):
        assert kit.run_rows(rows, filters={"length_ratio": setting}).dropped() == dropped


def test_reasons_come_in_the_contracts_order() -> None:
    """The order that every drop is told in; and each reason that a function gives stands in it."""
    given = [*filters.PROMPT_FILTERS, *filters.ANSWER_FILTERS, *filters.PAIR_FILTERS]
    assert [reason for reason in filters.REASONS if reason in given] == given
