"""SFT, then DPO from its adapter: the reference is the model after SFT, and one adapter comes out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.chat import chat_tokens
from dpo_cli.cli import app
from safetensors.numpy import load_file
from tests.train.runs import cut_short, dpo_cli, weights
from typer.testing import CliRunner

RECIPES = Path(__file__).parents[2] / "recipes"
FEW = ("data.total=48", "data.eval_size=12", "train.logging_steps=1", "train.max_steps=4", "train.save_steps=2",
       "eval.prompts=2", "eval.max_new_tokens=4", "eval.judge=null")  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the recipes, in which both steps have been trained and evaluated and the second exported."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(RECIPES, home / "recipes")
    for name, commands in (("sft", ("train", "eval")), ("sft_then_dpo", ("train", "eval", "export"))):
        for command in commands:
            options = [part for setting in FEW for part in ("--set", setting)]
            options += ["--runs-dir", str(home / "runs")]
            done = CliRunner().invoke(app, [command, str(home / f"recipes/sft_then_dpo/{name}.yaml"), *options])
            assert done.exit_code == 0, done.output
    return home / "runs"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_dpo_starts_at_the_sft_which_is_its_reference(home: Path) -> None:
    first = json.loads((home / "sft_then_dpo/train/log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    answers = {name: read(home / name / "eval/metrics.json")["answers"] for name in ("sft", "sft_then_dpo")}
    after, before = answers["sft"]["loss_tuned"]["value"], answers["sft_then_dpo"]["loss_base"]["value"]
    assert before == pytest.approx(after, abs=1e-4), "the model after SFT is what DPO is compared with"
    assert after < answers["sft"]["loss_base"]["value"], "SFT has learned the answers"


def test_against_base_it_is_compared_with_the_model_before_sft(home: Path) -> None:
    shutil.copytree(home / "sft_then_dpo", home / "against/sft_then_dpo")
    options = [part for setting in FEW for part in ("--set", setting)] + ["--runs-dir", str(home / "against")]
    recipe = str(home.parent / "recipes/sft_then_dpo/sft_then_dpo.yaml")
    done = CliRunner().invoke(app, ["eval", recipe, "--against", "base", *options])
    assert done.exit_code == 0, done.output
    found, before, sft = (
        read(folder / "eval/metrics.json")
        for folder in (home / "against/sft_then_dpo", home / "sft_then_dpo", home / "sft")
    )
    assert found["answers"]["loss_base"] == sft["answers"]["loss_base"]
    assert found["samples"]["kl_total"]["value"] > 2 * before["samples"]["kl_total"]["value"], "answered anew"


def test_one_adapter_comes_out_and_is_merged_once(home: Path) -> None:
    adapters = [load_file(home / name / "train/adapter/adapter_model.safetensors") for name in ("sft", "sft_then_dpo")]
    assert adapters[0].keys() == adapters[1].keys()
    assert {name: one.shape for name, one in adapters[0].items()} == {n: one.shape for n, one in adapters[1].items()}
    assert any((adapters[0][name] != adapters[1][name]).any() for name in adapters[0]), "DPO has moved it"
    assert not list((home / "sft_then_dpo/train/adapter").rglob("ref*")), "no copy of the reference is left in it"
    checks = read(home / "sft_then_dpo/export/verify.json")
    assert all(one["ok"] for one in checks) and any(one["name"].startswith("merged.") for one in checks)


def test_one_that_was_cut_short_goes_on_from_its_own_adapter(home: Path, tmp_path: Path) -> None:
    """Not from the copy of the SFT's, its reference, which the checkpoint holds too."""
    runs = tmp_path / "runs"
    for name in ("sft", "sft_then_dpo"):
        shutil.copytree(home / name, runs / name)
    expected = weights(runs / "sft_then_dpo")
    cut_short(runs / "sft_then_dpo", step=2)
    done = dpo_cli("train", home.parent / "recipes/sft_then_dpo/sft_then_dpo.yaml", runs, *FEW)
    assert "resumed from step 2" in done.output, done.output
    assert weights(runs / "sft_then_dpo") == expected


def test_eval_of_sft_has_its_loss_by_language_and_figures_of_its_pairs(home: Path) -> None:
    metrics = read(home / "sft/eval/metrics.json")
    for figures in (metrics, *metrics["languages"].values()):
        loss, perplexity = figures["answers"]["loss_tuned"], figures["answers"]["perplexity_tuned"]
        assert perplexity["value"] == pytest.approx(math.exp(loss["value"]), rel=1e-4)
        assert loss["low"] <= loss["value"] <= loss["high"]
        assert figures["pairs"]["reward_accuracy"]["n"] > 0
    assert set(metrics["languages"]) == {"en", "zh"}
    report = (home / "sft/eval/report.md").read_text(encoding="utf-8")
    assert "Perplexity" in report and "Held-out answers" in report


def test_a_file_of_prompts_is_answered_by_both_models_as_alpaca_eval_reads_it(home: Path) -> None:
    file = home / "bench.json"
    rows = [{"instruction": text, "dataset": "x"} for text in ("Why is the sky blue?", "天空为什么是蓝色的？", "Why?")]
    file.write_text(json.dumps([*rows, rows[0]], ensure_ascii=False), encoding="utf-8")
    options = [part for setting in FEW for part in ("--set", setting)] + ["--runs-dir", str(home)]
    recipe = str(home.parent / "recipes/sft_then_dpo/sft.yaml")
    done = CliRunner().invoke(app, ["eval", recipe, "--answer", str(file), *options])
    assert done.exit_code == 0, done.output
    for model in ("base", "tuned"):
        answers = read(home / f"sft/answers/bench-{model}.json")
        assert [one["instruction"] for one in answers] == [one["instruction"] for one in [*rows, rows[0]]]
        assert {one["generator"] for one in answers} == {f"sft-{model}"} and {one["dataset"] for one in answers} == {
            "x"
        }
        assert all(one["output"] for one in answers) and answers[0] == answers[3]
    assert {path.name for path in (home / "sft/answers").iterdir()} == {"bench-base.json", "bench-tuned.json"}


def test_each_model_answers_all_turns_of_a_question_from_its_own_answers(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def spied(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
        if messages[0]["content"] in ("为什么？", "Hi"):  # loading renders messages of its own
            seen.append([one["content"] for one in messages])
        return chat_tokens(tokenizer, messages, **options)

    monkeypatch.setattr("dpo_cli.evaluate.prompt_file.chat.chat_tokens", spied)
    file = home / "mt.jsonl"
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["为什么？", "然后呢？"], "reference": ["x"]},
        {"question_id": 82, "category": "math", "turns": [{"content": "Hi"}]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = [part for setting in FEW for part in ("--set", setting)] + ["--runs-dir", str(home)]
    recipe = str(home.parent / "recipes/sft_then_dpo/sft.yaml")
    done = CliRunner().invoke(app, ["eval", recipe, "--answer", str(file), *options])
    assert done.exit_code == 0, done.output
    assert len(seen) == 6, "two first turns and one second one, by both models"
    for model in ("base", "tuned"):
        text = (home / f"sft/answers/mt-{model}.jsonl").read_text(encoding="utf-8")
        first, second = map(json.loads, text.splitlines())
        assert (first["question_id"], second["question_id"]) == (81, 82) and first["model_id"] == f"sft-{model}"
        said = first["choices"][0]["turns"]
        assert len(said) == 2
        [reply] = second["choices"][0]["turns"]
        assert reply.keys() == {"content"}, "turns are what the question's are"
        assert ["为什么？", said[0], "然后呢？"] in seen
    assert not [path for path in (home / "sft/answers").iterdir() if path.name.startswith(".")]
