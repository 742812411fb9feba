"""SFT on the data of the other methods: which answers it learns, and from which tokens; and the order of KTO's rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from dpo_cli.backends import Backend, import_backend
from dpo_cli.recipe import load
from dpo_cli.run import Run
from dpo_cli.train import single_answers
from dpo_cli.train.methods import METHODS
from dpo_cli.train.single_answers import order
from dpo_cli.train.trainer import build
from dpo_cli.train.watchdog import Watchdog
from hypothesis import given
from hypothesis import strategies as st
from tests.train.runs import SMOKE, dpo_cli

FEW = ("data.total=40", "data.eval_size=12", "train.max_steps=2", "train.logging_steps=1", "eval.prompts=0")


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text} for text in texts]


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def row(number: int, prompt: str, **more: Any) -> dict[str, Any]:
    return {"id": f"row-{number}", "prompt": asked(prompt), "chat_template_kwargs": {"enable_thinking": False}, **more}


SHAPES: dict[str, list[dict[str, Any]]] = {
    # Every pair of three answers, as `data.pairs.pick: all` makes them, and one pair of another prompt.
    "pairs": [
        row(0, "a", chosen=said("fair"), rejected=said("poor")),
        row(1, "a", chosen=said("good"), rejected=said("fair")),
        row(2, "a", chosen=said("good"), rejected=said("poor")),
        row(3, "b", chosen=said("fair"), rejected=said("poor")),
    ],
    "ranked": [
        row(1, "a", candidates=[{"text": text, "score": None} for text in ("good", "fair", "poor")]),
        row(3, "b", candidates=[{"text": text, "score": None} for text in ("fair", "poor")]),
    ],
    "unpaired": [
        row(0, "a", completion=said("poor"), label=False),
        row(1, "a", completion=said("good"), label=True),
        row(3, "b", completion=said("fair"), label=True),
    ],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_answers_and_no_others_are_learned(shape: str) -> None:
    rows = list(single_answers.best_rows(Dataset.from_list(SHAPES[shape]), seed=42))
    learned = [(one["id"], one["prompt"][0]["content"], one["completion"][0]["content"]) for one in rows]
    assert learned == [("row-1", "a", "good"), ("row-3", "b", "fair")]
    assert all(set(one) == set(single_answers.COLUMNS) for one in rows)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    runs = tmp_path_factory.mktemp("runs")
    assert dpo_cli("prepare", SMOKE, runs, *FEW).exit_code == 0
    import_backend(Backend("hf", ""))

    def go(method: str, *settings: str) -> Any:
        recipe = load(SMOKE, [*FEW, "data.format=pairs", f"train.method={method}", *settings])
        return build(recipe, Run(runs / "smoke", {}), Backend("hf", ""))

    return go


def test_its_tokens_are_those_of_dpos_chosen_answers_and_its_loss_is_their_mean(trainers: Callable[..., Any]) -> None:
    import torch

    trainer, dpo = trainers("sft"), trainers("dpo")
    pairs = {one["id"]: one for one in dpo.train_dataset}
    assert len(trainer.train_dataset) == len(pairs) == 40
    for one in trainer.train_dataset:
        prompt, answer = pairs[one["id"]]["prompt_ids"], pairs[one["id"]]["chosen_ids"]
        assert one["input_ids"] == prompt + answer and one["labels"] == [-100] * len(prompt) + answer
    limit = max(len(one["prompt_ids"]) for one in dpo.train_dataset) + 4
    for one in trainers("sft", f"model.max_length={limit}").train_dataset:
        prompt, answer = pairs[one["id"]]["prompt_ids"], pairs[one["id"]]["chosen_ids"]
        assert one["input_ids"] == (prompt + answer)[:limit]
        assert one["labels"] == ([-100] * len(prompt) + answer)[:limit]
    batch = [trainer.train_dataset[index] for index in range(4)]
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(batch)))
        of_pairs = dpo.data_collator([pairs[one["id"]] for one in batch])
        chosen = torch.cat(dpo.compute_ref_log_probs(dpo.model, dpo._prepare_inputs(of_pairs)))[:4]
    assert float(loss) == pytest.approx(
        -float(chosen.sum()) / sum(len(one["completion_ids"]) for one in batch), rel=1e-4
    )


ANSWER = "An answer that is long enough to be kept: {}."
CHAT: dict[str, dict[str, Any]] = {
    "messages": {"messages": [*asked("What is {}?"), *said(ANSWER)]},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "What is {}?"},
            {"from": "gpt", "value": ANSWER},
        ]
    },
    "prompt": {"prompt": "What is {}?", "response": ANSWER},
    "alpaca": {"instruction": "What is {}?", "input": "", "output": ANSWER},
    "chinese": {"instruction": "请解释一下 {}？", "input": "", "output": "这是一个足够长的回答：{}。"},
}
NAMES = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "joker")


@pytest.mark.parametrize("shape", CHAT)
def test_instruction_data_need_no_second_answer(shape: str, tmp_path: Path) -> None:
    names = [f"{first} {second}" for first in NAMES for second in NAMES[:6]]
    lines = (json.dumps(CHAT[shape], ensure_ascii=False).replace("{}", name) + "\n" for name in names)
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    recipe = tmp_path / "chat.yaml"
    recipe.write_text(
        "model: {id: builtin:tiny-qwen3, load_in_4bit: false, max_length: 256}\n"
        "data: {sources: [{id: rows.jsonl}], languages: null, total: null, eval_fraction: 0.2, "
        "filters: {near_duplicate: false}}\n"
        "train: {method: sft}\n",
        encoding="utf-8",
    )
    made = dpo_cli("prepare", recipe, tmp_path / "runs")
    assert made.exit_code == 0, made.output
    files = [tmp_path / "runs/chat/data" / name for name in ("train.jsonl", "eval.jsonl")]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 60 and all(one["label"] for one in rows)
    for one in rows:
        name = one["completion"][-1]["content"].strip(".。").split(":")[-1].split("：")[-1].strip()
        assert name in names and name in one["prompt"][-1]["content"]
    assert {one["prompt"][0]["role"] for one in rows} == {"system" if shape == "sharegpt" else "user"}
    if shape == "messages":
        assert_trains_and_ships(recipe, tmp_path / "runs")


def assert_trains_and_ships(recipe: Path, runs: Path) -> None:
    few = ("train.max_steps=2", "train.gradient_accumulation_steps=2", "eval.prompts=2", "eval.max_new_tokens=4")
    for command in ("train", "eval", "export"):
        done = dpo_cli(command, recipe, runs, *few)
        assert done.exit_code == 0, done.output
    metrics = json.loads((runs / "chat/eval/metrics.json").read_text(encoding="utf-8"))
    held_out = (runs / "chat/data/eval.jsonl").read_text(encoding="utf-8").splitlines()
    assert metrics["pairs"] is None and metrics["answers"]["loss_tuned"]["n"] == len(held_out)
    assert metrics["languages"]["en"]["answers"]["perplexity_tuned"]["value"] > 1
    report = (runs / "chat/eval/report.md").read_text(encoding="utf-8")
    assert "nats a token" in report and "Reward accuracy" not in report
    assert "SFT, loss nll" in (runs / "chat/export/merged/README.md").read_text(encoding="utf-8")


def test_instruction_data_for_dpo_name_the_method_that_takes_them(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(CHAT["prompt"]), encoding="utf-8")
    recipe = tmp_path / "chat.yaml"
    recipe.write_text(
        "model: {id: builtin:tiny-qwen3}\n"
        "data: {sources: [{id: rows.jsonl, layout: chat}], languages: null, filters: {too_long: false}}\n",
        encoding="utf-8",
    )
    refused = dpo_cli("prepare", recipe, tmp_path / "runs")
    assert refused.exit_code == 1
    assert "good answers, with no other to compare them with" in " ".join(refused.stderr.split())
    assert "train.method: sft with data.format: unpaired" in " ".join(refused.stderr.split())


def test_the_watchdog_compares_with_the_models_own_first_loss() -> None:
    watchdog = Watchdog(["nll"], 1.0, 100, steps=40, method=METHODS["sft"])
    rows = [{"step": step, "loss": 2.0 if step < 10 else 2.3, "grad_norm": 1.0} for step in range(1, 40)]
    remarks = [text for one in rows for text in watchdog.observe(one)]
    assert len(remarks) == 1 and "worse than no training (2.00)" in remarks[0] and "200 rows" in remarks[0]
    assert "train.beta" not in remarks[0]
    falling = Watchdog(["nll"], 1.0, 100, steps=40, method=METHODS["sft"])
    assert not [text for step in range(1, 40) for text in falling.observe({"step": step, "loss": 2 / step})]


# ------------------------------------------------------------------------------------------- the order of KTO's rows


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 5))
def test_every_row_once_and_the_same_for_the_same_seed(labels: list[bool], seed: int) -> None:
    made = order(labels, seed)
    assert sorted(made) == list(range(len(labels)))
    assert made == order(tuple(labels), seed)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 5))
def test_every_stretch_has_its_share_of_both_labels(labels: list[bool], seed: int) -> None:
    made, share = order(labels, seed), sum(labels) / len(labels)
    good = 0
    for number, index in enumerate(made, 1):
        good += labels[index]
        assert abs(good - share * number) <= 1


@given(st.integers(4, 40), st.integers(0, 5))
def test_a_pairs_two_rows_stand_half_the_data_apart(pairs: int, seed: int) -> None:
    made = order([True, False] * pairs, seed)
    place = {index: number for number, index in enumerate(made)}
    apart = [abs(place[2 * pair] - place[2 * pair + 1]) for pair in range(pairs)]
    assert min(apart) >= pairs - 3


def test_another_seed_is_another_order() -> None:
    labels = [True, False] * 20
    assert order(labels, 1) != order(labels, 2)
    assert order(labels, 1) != list(range(40)), "shuffled"
