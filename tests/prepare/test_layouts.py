"""Each public layout on a row of its own shape, recognised by its columns, and what is said of a shape nobody knows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import USAGE, DpoError
from tests.prepare import kit
from tests.prepare.kit import ASKED, BAD, GOOD, answer, user

TURN = user(ASKED)
CHOSEN, REJECTED = [TURN, answer(GOOD)], [TURN, answer(BAD)]
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def completion(text: str, rating: str, **more: Any) -> dict[str, Any]:
    annotations = {aspect: {"Rating": rating, "Rationale": "Why."} for aspect in ASPECTS}
    return {"model": "m", "response": text, "annotations": annotations, "overall_score": 5.0, **more}


HELPSTEER = {"coherence": 4, "complexity": 1, "verbosity": 1}
ZH = "请用三句话介绍一下如何给多肉植物浇水，语气轻松一些。"
ZH_GOOD, ZH_BAD = "多肉怕涝，土干透再浇。", "浇水，然后再浇一点水。"

NO_SCORES = (None, None)
SOURCE_ZH = {"instruction": ZH, "source": "smoltalk_zh"}
SIDES_ZH = {"chosen_response": ZH_GOOD, "rejected_response": ZH_BAD}
EARLIER = [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Hello."}]


def out_of_five(rating: str, **more: Any) -> dict[str, Any]:
    return {**dict.fromkeys(ASPECTS, rating), **more}


def talk(answer: str) -> str:
    return f"\n\nHuman: An egg?\n\nAssistant: Soft or hard?\n\nHuman: Soft\n\nAssistant: {answer}"


# layout -> (rows, prompt's last turn, chosen, rejected, score of chosen and rejected)
Expected = tuple[list[dict[str, Any]], str, str, str, tuple[float | None, float | None]]
ROWS: dict[str, Expected] = {
    "ultrafeedback": ([{
        "source": "evol_instruct", "instruction": ASKED, "models": ["a", "b"], "correct_answers": ["None"],
        "completions": [completion(GOOD, "5", critique="Clear."), completion(BAD, "2", critique="Vague.")],
    }], ASKED, GOOD, BAD, (1.0, 0.25)),
    "ultrafeedback_zh": ([{
        **SOURCE_ZH, "correct_answers": None, "models": ["a", "b"], "empty": False,
        "completions": [completion(ZH_BAD, "1"), completion(ZH_GOOD, "5")],
    }], ZH, ZH_GOOD, ZH_BAD, (1.0, 0.0)),
    "ultrafeedback_zh binarized": ([{
        **SOURCE_ZH, **SIDES_ZH, "chosen_rating": out_of_five("5", overall_score=4.0, honesty="N/A"),
        "rejected_rating": out_of_five("2", overall_score=1.6, honesty="N/A"),
    }], ZH, ZH_GOOD, ZH_BAD, (1.0, 0.25)),
    "ultrafeedback_zh ratings as text": ([{
        **SOURCE_ZH, **SIDES_ZH, "chosen_rating": str(out_of_five("5", overall_score=5.0)),
        "rejected_rating": json.dumps(out_of_five("1", overall_score=1.0)),
    }], ZH, ZH_GOOD, ZH_BAD, (1.0, 0.0)),
    "ultrafeedback_binarized H4": ([{
        "prompt": ASKED, "prompt_id": "0f3c", "chosen": CHOSEN, "rejected": REJECTED, "messages": CHOSEN,
        "score_chosen": 10.0, "score_rejected": 5.5,
    }], ASKED, GOOD, BAD, (1.0, 0.5)),
    "ultrafeedback_binarized argilla": ([{
        "source": "flan", "prompt": ASKED, "chosen": CHOSEN, "chosen-rating": 5.0, "chosen-model": "gpt-4",
        "rejected": REJECTED, "rejected-rating": 2.0, "rejected-model": "alpaca-7b",
    }], ASKED, GOOD, BAD, (1.0, 0.25)),
    "ultrafeedback_binarized trl-lib": (
        [{"chosen": CHOSEN, "rejected": REJECTED, "score_chosen": 10.0, "score_rejected": 1.0}],
        ASKED, GOOD, BAD, (1.0, 0.0),
    ),
    "helpsteer2": ([
        {"prompt": ASKED, "response": BAD, "helpfulness": 0, "correctness": 0, **HELPSTEER},
        {"prompt": ASKED, "response": GOOD, "helpfulness": 4, "correctness": 4, **HELPSTEER},
    ], ASKED, GOOD, BAD, (0.925, 0.225)),
    "helpsteer2_preference": ([{
        "split": "train", "prompt": ASKED, "response_1": BAD, "response_2": GOOD, "preference_strength": 3,
        "preference_statement": "…", "all_preferences_unprocessed": [{"strength": -100, "justification": "…"}],
    }], ASKED, GOOD, BAD, (1.0, 0.0)),
    "helpsteer3": ([{
        "domain": "multilingual", "language": "chinese", "response1": ZH_GOOD, "response2": ZH_BAD,
        "context": [user("推荐一本入门统计书"), answer("你有编程基础吗？"), user("会一点 Python")],
        "overall_preference": -1, "individual_preference": [{"score": -2, "reasoning": "…"}],
    }], "会一点 Python", ZH_GOOD, ZH_BAD, (0.666667, 0.333333)),
    "hh_rlhf": ([{"chosen": talk(GOOD), "rejected": talk(BAD)}], "Soft", GOOD, BAD, NO_SCORES),
    "nectar": ([{
        "prompt": "\n\nHuman: Why is the sky blue?\n\nAssistant: ", "turns": 1, "num_responses": 3,
        "answers": [
            {"answer": "Something in between the two of them.", "model": "b", "rank": 1.0},
            {"answer": [answer(BAD)], "model": "c", "rank": 2.0}, {"answer": GOOD, "model": "a", "rank": 0.0},
        ],
    }], "Why is the sky blue?", GOOD, BAD, NO_SCORES),
    "sharegpt": ([{
        "conversations": [*EARLIER, {"from": "human", "value": ASKED}],
        "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD},
    }], ASKED, GOOD, BAD, NO_SCORES),
    "swift": ([{"messages": CHOSEN, "rejected_response": BAD}], ASKED, GOOD, BAD, NO_SCORES),
    "swift messages": (
        [{"messages": CHOSEN, "rejected_messages": REJECTED, "rejected_response": None}], ASKED, GOOD, BAD, NO_SCORES,
    ),
    "swift query": ([{
        "query": ZH, "response": ZH_GOOD, "rejected_response": ZH_BAD, "history": [["你好", "你好！"]], "system": "",
    }], ZH, ZH_GOOD, ZH_BAD, NO_SCORES),
    "alpaca": (
        [{"instruction": "Answer briefly.", "input": ASKED, "chosen": GOOD, "rejected": BAD}],
        f"Answer briefly.\n\n{ASKED}", GOOD, BAD, NO_SCORES,
    ),
    "alpaca scored": ([{
        "instruction": ASKED, "input": "", "chosen": CHOSEN[1:], "rejected": REJECTED[1:],
        "score_chosen": 0.75, "score_rejected": 0.5,
    }], ASKED, GOOD, BAD, (0.75, 0.5)),
    "alpaca outputs": ([{"instruction": ASKED, "input": None, "output": [GOOD, BAD]}], ASKED, GOOD, BAD, NO_SCORES),
    "orca": (
        [{"system": "Be brief.", "question": ASKED, "chosen": GOOD, "rejected": BAD}], ASKED, GOOD, BAD, NO_SCORES,
    ),
    "orca argilla": (
        [{"system": "", "input": ASKED, "chosen": GOOD, "rejected": BAD, "rating": [9.0, 8.0]}],
        ASKED, GOOD, BAD, NO_SCORES,
    ),
    "arena": ([{
        "question_id": "58210e39b3fd4441a2bd4a518bb44c2d", "model_a": "chatglm-6b", "model_b": "koala-13b",
        "winner": "model_b", "conversation_a": REJECTED, "conversation_b": CHOSEN, "turn": 1, "language": "English",
    }], ASKED, GOOD, BAD, NO_SCORES),
    "arena lists": ([{
        "id": 30192, "model_a": "gpt-4-1106-preview", "model_b": "gpt-4-0613", "prompt": json.dumps([ZH]),
        "response_a": json.dumps([ZH_GOOD]), "response_b": json.dumps([ZH_BAD]),
        "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0,
    }], ZH, ZH_GOOD, ZH_BAD, NO_SCORES),
    "pairs": ([{"prompt": ASKED, "chosen": GOOD, "rejected": BAD}], ASKED, GOOD, BAD, NO_SCORES),
    "pairs of messages": ([{
        "prompt": [TURN], "chosen": CHOSEN[1:], "rejected": REJECTED[1:], "score_chosen": 0.75, "score_rejected": 0.5,
    }], ASKED, GOOD, BAD, (0.75, 0.5)),
    "pairs without prompt": ([{"chosen": CHOSEN, "rejected": REJECTED}], ASKED, GOOD, BAD, NO_SCORES),
    "kto": ([
        {"prompt": [TURN], "completion": CHOSEN[1:], "label": True},
        {"prompt": [TURN], "completion": REJECTED[1:], "label": False},
    ], ASKED, GOOD, BAD, (1.0, 0.0)),
    "kto alpaca": ([
        {"instruction": "Answer briefly.", "input": ASKED, "output": text, "kto_tag": tag}
        for text, tag in ((GOOD, True), (BAD, False))
    ], f"Answer briefly.\n\n{ASKED}", GOOD, BAD, (1.0, 0.0)),
    "kto conversations": ([
        {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": text}], "label": label}
        for text, label in ((GOOD, 1), (BAD, 0))
    ], ASKED, GOOD, BAD, (1.0, 0.0)),
    "kto response": ([
        {"prompt": ASKED, "response": text, "label": label} for text, label in ((GOOD, 1), (BAD, 0))
    ], ASKED, GOOD, BAD, (1.0, 0.0)),
    "kto messages": (
        [{"messages": CHOSEN, "label": True}, {"messages": REJECTED, "label": False}], ASKED, GOOD, BAD, (1.0, 0.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("told", ["auto", "named"])
def test_layout_reads_its_row(name: str, told: str) -> None:
    """Prompt, answers and scores come out right, and `auto` takes the layout that a person would name."""
    rows, asked, chosen, rejected, scores = ROWS[name]
    layout = name.split()[0]
    made = kit.run_rows(rows, {"layout": layout if told == "named" else "auto"}, eval_fraction=1e-9)
    [row] = made.train
    assert made.report["provenance"]["sources"]["rows"]["layout"] == layout
    assert row["prompt"][-1] == user(asked)
    assert (row["chosen"], row["rejected"]) == ([answer(chosen)], [answer(rejected)])
    assert (row["score_chosen"], row["score_rejected"]) == pytest.approx(scores)
    assert row["chat_template_kwargs"] == {"enable_thinking": False}
    assert row["language"] == ("zh" if "多" in chosen else "en")


def test_helpsteer2_turns_become_messages() -> None:
    prompt = "Plan a picnic\n<extra_id_1>Assistant\nFor how many?\n<extra_id_1>User\nSix, two are vegan"
    made = kit.run_rows([kit.helpsteer2(prompt, GOOD, 4), kit.helpsteer2(prompt, BAD, 1)], eval_fraction=1e-9)
    turns = [user("Plan a picnic"), answer("For how many?"), user("Six, two are vegan")]
    assert made.train[0]["prompt"] == turns


@pytest.mark.parametrize(
    ("said", "code"), [("Chinese", "zh"), ("zh-CN", "zh"), ("fr", "fr"), ("legalese", "en"), (3, "en")]
)
def test_a_language_column_counts_where_it_names_one(said: Any, code: str) -> None:
    assert kit.only({**ROWS["pairs"][0][0], "language": said})["language"] == code


def test_columns_are_mapped() -> None:
    row = {"question": ASKED, "good": GOOD, "bad": BAD, "prompt": "not this one"}
    written = kit.only(row, {"columns": {"prompt": "question", "chosen": "good", "rejected": "bad"}})
    assert (written["prompt"][0]["content"], written["chosen"][0]["content"]) == (ASKED, GOOD)


@pytest.mark.parametrize(
    ("ours", "theirs", "meant"), [("prompt", "qestion", "question"), ("promt", "question", "prompt")]
)
def test_a_wrong_column_map_names_the_nearest(ours: str, theirs: str, meant: str) -> None:
    columns = {ours: theirs, "chosen": "good", "rejected": "bad"}
    error = kit.refused([{"question": ASKED, "good": GOOD, "bad": BAD}], {"columns": columns, "layout": "pairs"})
    assert f"did you mean '{meant}'" in error.message
    assert error.exit_code == USAGE and "columns" in str(error.where)


def test_an_unknown_layout_lists_columns_and_the_map_to_fill_in() -> None:
    error = kit.refused([{"context": "c", "response1": "a", "response2": "b", "winner": 1}])
    assert error.exit_code == USAGE and "context, response1, response2, winner" in error.message
    assert "columns: {prompt: context, chosen: <yours>, rejected: <yours>}" in str(error.hint)


@pytest.mark.parametrize("names", ["score_chosen,score_rejected", "chosen-rating,rejected-rating"])
def test_scores_written_as_text_tell_the_layout(tmp_path: Path, names: str) -> None:
    """In CSV every number is text; taken for plain pairs, these would lose their scores."""
    line = ",".join([kit.sentence(n) for n in range(3)] + ["4.0", "2.0"])
    (tmp_path / "rows.csv").write_text(f"prompt,chosen,rejected,{names}\n{line}\n", encoding="utf-8")
    made = kit.run_file(tmp_path / "rows.csv", eval_fraction=1e-9)
    assert made.train[0]["margin"] == pytest.approx(0.222222 if "score_chosen" in names else 0.5)


@pytest.mark.parametrize("names", [None, "**", "/etc/*.jsonl", "", "sub", "*"])
def test_only_files_are_read_from_a_folder(tmp_path: Path, names: str | None) -> None:
    """Not a folder called like a file; and what names no file is said, not a traceback."""
    (tmp_path / "data" / "sub.jsonl").mkdir(parents=True)
    (tmp_path / "data" / "sub").mkdir()
    kit.write_rows(tmp_path / "data" / "a.csv.jsonl", [kit.pair("good")])
    made = kit.recipe([{"id": str(tmp_path / "data"), "data_files": names}], eval_fraction=1e-9)
    if names in (None, "*"):
        assert kit.run(made, tmp_path / "out").source("data")["kept"] == 1
    else:
        with pytest.raises(DpoError, match="no data files for split train"):
            kit.run(made, tmp_path / "out")


def test_a_wrong_layout_says_what_it_looks_like() -> None:
    error = kit.refused(ROWS["nectar"][0], {"layout": "helpsteer2"})
    assert error.exit_code == USAGE and "helpsteer2" in error.message and "layout: nectar" in str(error.hint)


def test_a_ranking_of_ones_own_may_have_a_plain_prompt() -> None:
    prompts = {f"Why is the sky blue, for the {n}th time?\n\nBe brief." for n in range(9)}
    rows = [{**ROWS["nectar"][0][0], "prompt": prompt} for prompt in sorted(prompts)]
    made = kit.run_rows(rows, filters={"near_duplicate": False})
    assert {pair["prompt"][0]["content"] for pair in made.train + made.held} == prompts


def test_files_of_two_layouts_are_not_mixed(tmp_path: Path) -> None:
    for name in ("nectar", "sharegpt"):
        kit.write_rows(tmp_path / f"{name}.jsonl", ROWS[name][0])
    with pytest.raises(DpoError, match="differ") as caught:
        kit.run(kit.recipe([{"id": str(tmp_path)}]), tmp_path / "out")
    assert caught.value.exit_code == USAGE


PAIR = b'{"prompt": "x", "chosen": "y", "rejected": "z"}\n'


def test_a_folder_gives_the_files_of_its_split(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train-00000.jsonl", "train-00001.jsonl", "validation.jsonl"):
        kit.write_rows(folder / name, [kit.plain((name, n)) for n in range(5)])
    (folder / "README.md").write_text("not data")
    made = kit.run(kit.recipe([{"id": str(folder)}]), tmp_path / "out")
    assert made.source("data")["in"] == 10
    assert set(made.prepared.inputs) == {"data/train-00000.jsonl", "data/train-00001.jsonl"}
    other = kit.recipe([{"id": str(folder), "data_files": "validation.jsonl"}])
    assert kit.run(other, tmp_path / "out2").source("data")["in"] == 5


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder, "no data files"),
        (lambda folder: write(folder / "empty.json", b"[]"), "no rows"),
        (lambda folder: write(folder / "cut.jsonl.gz", gzip.compress(PAIR * 999)[:-9]), "can't read"),
        (lambda folder: write(folder / "cut.parquet", b"PAR1 and then nothing"), "can't read"),
    ],
)
def test_missing_and_broken_inputs_are_said_with_their_place(tmp_path: Path, make: Any, said: str) -> None:
    path = make(tmp_path)
    with pytest.raises(DpoError, match=said) as caught:
        kit.run(kit.recipe([{"id": str(path)}]), tmp_path / "data_out")
    assert caught.value.exit_code == 1
    assert caught.value.where


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_loaded_data_set_reads_like_a_file(tmp_path: Path) -> None:
    """What `datasets` hands over of a Hub download gives the rows that the file gives."""
    from datasets import Dataset
    from dpo_cli.prepare.feed import Feed
    from dpo_cli.prepare.files import file_feed
    from dpo_cli.prepare.tables import dataset_rows

    rows = [{**kit.plain(n), "extra": n} for n in range(600)]
    feed = Feed("set", lambda feed: dataset_rows(Dataset.from_list(rows), feed))
    numbered = list(enumerate(rows, 1))
    assert list(feed.rows()) == numbered and feed.share >= 1
    path = kit.write_rows(tmp_path / "rows.jsonl", rows)
    assert list(file_feed("file", path).rows()) == numbered


def test_answers_without_a_rank_say_what_they_have() -> None:
    answers = [{"answer": "One answer to it.", "score": 1}, {"answer": "Another answer to it.", "score": 2}]
    error = kit.refused([{"prompt": "Why is that?", "answers": answers}])
    assert "an answer has answer, score, and no rank that is a number: 1 is best" in error.message
