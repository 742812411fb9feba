"""Rows of one kind in other clothes: what a source calls things must not decide what is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import DpoError
from dpo_cli.prepare.pipeline import prepare
from dpo_cli.recipe import load
from tests.prepare import kit

COUNT = 12


def pairs(change: Any, **more: Any) -> Any:
    """`prepare` on plain pairs, each row changed by `change(row, number)`."""
    rows = [kit.pair(number) for number in range(COUNT)]
    made = kit.run_rows([change(row, number) or row for number, row in enumerate(rows)], **more)
    assert made.funnel_holds()
    return made


def said(made: Any) -> str:
    return "\n".join(made.report["warnings"])


@pytest.mark.parametrize("columns", [None, {"prompt": "instruct"}])
def test_an_input_beside_the_prompt_is_part_of_the_question(columns: Any) -> None:
    def change(row: Any, number: int) -> Any:
        row["input"] = row["prompt"]
        row["prompt"] = "Translate this into French."
        return {**row, "instruct": row.pop("prompt")} if columns else row

    made = pairs(change, source={"columns": columns})
    assert len(made.rows) == COUNT
    for row in made.rows:
        asked = row["prompt"][0]["content"]
        assert asked.startswith("Translate this into French.\n\n")
        assert len(asked) > 50
    assert "nothing reads" not in said(made)


def test_an_input_that_repeats_the_prompt_is_asked_once() -> None:
    made = pairs(lambda row, number: {**row, "input": row["prompt"]})
    assert all(row["prompt"][0]["content"].count(".") == 1 for row in made.rows)


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_prompt_may_have_longer_names(name: str) -> None:
    made = pairs(lambda row, number: {**row, name: "You are a pirate."})
    assert all(row["prompt"][0] == {"role": "system", "content": "You are a pirate."} for row in made.rows)


@pytest.mark.parametrize("name", ["context", "margin", "chosen_rank", "chosen_reasoning", "lang"])
def test_a_telling_column_that_nothing_reads_is_said(name: str) -> None:
    assert f"nothing reads {name} (read as pairs)" in said(pairs(lambda row, number: {**row, name: "en"}))


def test_other_columns_are_not_remarked() -> None:
    assert "nothing reads" not in said(pairs(lambda row, number: {**row, "id": number, "source": "web"}))


@pytest.mark.parametrize(
    "prompt",
    ["[INST] {} [/INST]", "### Instruction:\n{}\n\n### Response:\n", "USER: {} ASSISTANT:", "用户：{}\n助手："],
)
def test_a_prompt_in_another_models_template_is_dropped(prompt: str) -> None:
    def change(row: Any, number: int) -> None:
        row["prompt"] = prompt.format(row["prompt"]) if number % 2 else row["prompt"]

    made = pairs(change)
    assert made.dropped() == {"markers": COUNT // 2}
    assert "without another model's template" in said(made)


@pytest.mark.parametrize("turn", [{"sender": "user", "text": "Hi"}, {"role": "user", "parts": [{"text": "Hi"}]}])
def test_turns_of_other_keys_are_shown_with_the_keys_they_have(turn: Any) -> None:
    with pytest.raises(DpoError, match="a turn is role and content, or from and value") as error:
        pairs(lambda row, number: {**row, "prompt": [turn]})
    assert ", ".join(turn) in error.value.message


def test_openais_preference_format_is_read_with_a_column_map() -> None:
    def change(row: Any, number: int) -> Any:
        answers = ([{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected"))
        asked = {"messages": [{"role": "user", "content": row["prompt"]}], "tools": []}
        return dict(zip(("input", "preferred_output", "non_preferred_output"), (asked, *answers), strict=True))

    columns = {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"}
    with pytest.raises(DpoError) as error:
        pairs(change)
    assert str(columns).replace("'", "") in str(error.value.hint)
    assert len(pairs(change, source={"columns": columns}).rows) == COUNT


@pytest.mark.parametrize("name", ["Images", "image_path", "image_url", "chosen_image", "multi_modal_inputs", "图片"])
def test_images_are_unsupported_whatever_their_column_is_called(name: str) -> None:
    made = pairs(lambda row, number: {**row, name: ["a.png"] if number % 2 else None})
    assert made.dropped() == {"unsupported": COUNT // 2}


@pytest.mark.parametrize("prompt", ["<image>\n{}", "{} <image>", "<video> {}"])
def test_a_placeholder_is_an_image_without_a_column_too(prompt: str) -> None:
    def change(row: Any, number: int) -> None:
        row["prompt"] = prompt.format(row["prompt"]) if number % 2 else f"What does <image> in SVG do? {row['prompt']}"

    assert pairs(change).dropped() == {"unsupported": COUNT // 2}


@pytest.mark.parametrize(
    ("method", "said"), [("kto", ": set data.format: unpaired"), ("dpo", "take train.method: kto with data.format")]
)
def test_kto_without_its_format_is_told_the_edit(tmp_path: Path, method: str, said: str) -> None:
    rows = [{"prompt": kit.sentence(n), "completion": kit.sentence((n, "x")), "label": n % 2} for n in range(6)]
    kit.write_rows(tmp_path / "rows.jsonl", rows)
    text = (
        "model: {id: nobody/none}\ndata: {format: pairs, sources: [{id: ./rows.jsonl}], filters: {too_long: false}}\n"
    )
    (tmp_path / "kto.yaml").write_text(f"{text}train: {{method: {method}}}\n", encoding="utf-8")
    (tmp_path / "out").mkdir()
    with pytest.raises(DpoError) as error:
        prepare(load(tmp_path / "kto.yaml"), tmp_path / "out", quiet=True)
    assert said in str(error.value.hint)


@pytest.mark.parametrize("token", ["<s>", "<bos>", "<|begin_of_text|>", "<|assistant|>\n"])
@pytest.mark.parametrize("end", ["", "</s>"])
def test_start_tokens_are_cut_too(token: str, end: str) -> None:
    made = pairs(lambda row, number: {**row, "chosen": token + row["chosen"] + end})
    assert len(made.rows) == COUNT
    assert all("<" not in row["chosen"][0]["content"] for row in made.rows)


def test_a_word_struck_out_stays() -> None:
    made = pairs(lambda row, number: {**row, "chosen": "<s>Old</s> " + row["chosen"]})
    assert all(row["chosen"][0]["content"].startswith("<s>Old</s>") for row in made.rows)


def test_an_answer_in_tags_behind_a_thought_is_taken_out_of_them() -> None:
    made = pairs(lambda row, number: {**row, "chosen": f"<think>Hm.</think><answer>{row['chosen']}</answer>"})
    assert all("<" not in row["chosen"][0]["content"] for row in made.rows)


def test_answers_without_a_rank_say_what_they_have() -> None:
    answers = [{"answer": "One answer to it.", "score": 1}, {"answer": "Another answer to it.", "score": 2}]
    with pytest.raises(DpoError, match="an answer has answer, score, and no rank that is a number: 1 is best"):
        kit.run_rows([{"prompt": "Why is that?", "answers": answers}])


def test_column_names_with_spaces_are_quoted_in_the_line_to_write() -> None:
    with pytest.raises(DpoError) as error:
        kit.run_rows([{"prompt ": "Why?", "chosen, a": "x", " chosen": "So.", "rejected": "No."}])
    assert '{prompt: "prompt ", chosen: " chosen"}' in str(error.value.hint)


def test_nothing_for_training_says_what_was_dropped() -> None:
    with pytest.raises(DpoError, match=r"none of the 1 pairs .*; of 4 prompts went 3 duplicate"):
        kit.run_rows(
            [
                {"prompt": "Why is it so?", "chosen": "Because of this.", "rejected": f"Because of it, {n}."}
                for n in range(4)
            ],
            eval_fraction=0.99,
        )  # fmt: skip
