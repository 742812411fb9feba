"""The promise, on the four real commands: it learns, it says so with an interval, and the export is that model."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.cli import app
from tests.tools.show_answers import changed
from tests.tools.smoke_grammar import styles
from typer.testing import CliRunner

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
TOO_HOT = SMOKE.with_name("smoke_too_hot.yaml")
STAGES = ("prepare", "train", "eval", "export")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_held_out_reward_accuracy_rises_to_nine_tenths_in_both_languages(smoke: Any) -> None:
    metrics = read(smoke.folder / "eval" / "metrics.json")
    accuracy = metrics["pairs"]["reward_accuracy"]
    assert accuracy["n"] >= 100
    assert accuracy["value"] >= 0.9
    assert accuracy["low"] > metrics["pairs"]["longer_wins"]["high"], "length alone must not explain it"
    for language in ("en", "zh"):
        assert metrics["languages"][language]["pairs"]["reward_accuracy"]["value"] >= 0.8
    assert metrics["verdict"]["kind"] == "better"


def direct_shares(run: Path) -> dict[tuple[str, str], float]:
    """(language, model) -> the share of its sampled sentences that are direct ones of that language."""
    said: dict[tuple[str, str], list[bool]] = {}
    for row in map(json.loads, (run / "eval" / "samples.jsonl").read_text(encoding="utf-8").splitlines()):
        for model in ("base", "tuned"):
            found = styles(row[model]["text"], row["language"])
            said.setdefault((row["language"], model), []).extend(style == "direct" for style in found)
    return {key: sum(direct) / len(direct) for key, direct in said.items()}


def test_the_answers_turn_from_half_direct_to_direct_and_stay_whole(smoke: Any) -> None:
    direct = direct_shares(smoke.folder)
    for language in ("en", "zh"):
        assert 0.3 <= direct[language, "base"] <= 0.7, direct
        assert direct[language, "tuned"] >= 0.9, direct
    samples = read(smoke.folder / "eval" / "metrics.json")["samples"]
    for figure in ("valid_rate_tuned", "language_match_tuned"):
        assert samples[figure]["value"] >= 0.95
    assert samples["truncated_tuned"]["value"] <= 0.05
    assert 0.9 <= samples["length_ratio"]["value"] <= 1.1


@pytest.mark.slow  # word for word: another processor may draw another token
@pytest.mark.parametrize("page", ["README.md", "recipes/README.zh.md"])
def test_the_readmes_show_the_answers_that_make_smoke_ends_with(smoke: Any, page: str) -> None:
    text = (SMOKE.parents[1] / page).read_text(encoding="utf-8").replace("**", "")
    for row in changed(smoke.folder):
        assert f"| {row['prompt'][-1]['content']} | {row['base']['text']} | {row['tuned']['text']} |" in text


def test_the_judge_prefers_the_tuned_answers(smoke: Any) -> None:
    judge = read(smoke.folder / "eval" / "metrics.json")["judge"]
    assert judge["win_rate"]["value"] >= 0.8 and judge["win_rate"]["low"] > 0.6
    assert judge["calibration"]["value"] >= 0.9, "it sees what the data prefer"
    assert judge["length_adjusted_win_rate"]["value"] is not None and judge["failures"] == 0


@pytest.mark.slow  # test_watchdog.py and test_verdict.py have its parts
def test_too_hot_a_learning_rate_is_warned_of_and_called_worse(tmp_path: Path, command: Any) -> None:
    said = " ".join(command("train", TOO_HOT, "--runs-dir", tmp_path).stdout.split())
    assert re.search(r"! step \d+: [^!]*lower train\.learning_rate", said), said
    command("eval", TOO_HOT, "--runs-dir", tmp_path, "--set", "eval.prompts=16")
    metrics = read(tmp_path / "smoke_too_hot" / "eval" / "metrics.json")
    assert metrics["verdict"]["kind"] == "worse", metrics["verdict"]
    assert metrics["samples"]["valid_rate_change"]["high"] < 0


@pytest.mark.slow  # a control of the data and the figures, which seldom change
def test_shuffled_labels_teach_nothing(tmp_path: Path, command: Any) -> None:
    """The control experiment: were the answer leaking from anywhere, accuracy would rise here too."""
    from tests.tools.smoke_data import write_source

    lines = []
    for name, layout, language in (
        ("style-helpsteer2", "helpsteer2", "en"),
        ("style-ultrafeedback-en", "ultrafeedback", "en"),
        ("style-ultrafeedback-zh", "ultrafeedback_zh", "zh"),
    ):
        write_source(name, tmp_path / f"{name}.jsonl", shuffle_labels=True)
        lines.append(f"    - {{id: {name}.jsonl, layout: {layout}, language: {language}}}")
    recipe = tmp_path / "shuffled.yaml"
    # All pairs, once: among few, chance alone prefers one of the styles.
    text = f"extends: {SMOKE}\ntrain: {{num_train_epochs: 1}}\neval: {{prompts: 20}}\n"
    text += "data:\n  total: null\n  languages: null\n  sources:\n"
    recipe.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    for stage in ("train", "eval"):
        command(stage, recipe, "--runs-dir", tmp_path / "runs")
    metrics = read(tmp_path / "runs" / "shuffled" / "eval" / "metrics.json")
    assert metrics["pairs"]["reward_accuracy"]["n"] >= 100
    for figure in (metrics["pairs"]["reward_accuracy"], metrics["judge"]["win_rate"]):
        assert figure["low"] <= 0.5 <= figure["high"], figure
    assert 0.3 <= metrics["pairs"]["reward_accuracy"]["value"] <= 0.7
    direct = direct_shares(tmp_path / "runs" / "shuffled")
    for language in ("en", "zh"):
        assert abs(direct[language, "tuned"] - direct[language, "base"]) < 0.25, direct
    assert metrics["verdict"]["kind"] in ("not_learned", "too_little_to_tell")


def test_every_file_of_the_contract_is_there(smoke: Any) -> None:
    for name in (
        "recipe.yaml", "manifest.json", "data/train.jsonl", "data/eval.jsonl", "data/report.json", "data/report.md",
        "train/adapter/adapter_model.safetensors", "train/log.jsonl", "train/metrics.json", "eval/pairs.jsonl",
        "eval/metrics.json", "eval/report.md", "eval/report.html", "export/adapter/adapter_config.json",
        "export/merged/config.json", "export/verify.json",
    ):  # fmt: skip
        assert (smoke.folder / name).stat().st_size > 0, name
    leftovers = [path.name for path in smoke.folder.iterdir() if path.name.startswith(".") and path.name != ".lock"]
    assert not leftovers
    assert not list((smoke.folder / "train").rglob("ref")), "TRL's frozen adapter, which a resume would load instead"
    stages = read(smoke.folder / "manifest.json")["stages"]
    assert [stages[stage]["status"] for stage in STAGES] == ["complete"] * 4


def test_training_metrics_are_those_of_the_log(smoke: Any) -> None:
    rows = [json.loads(line) for line in (smoke.folder / "train" / "log.jsonl").read_text().splitlines()]
    metrics = read(smoke.folder / "train" / "metrics.json")
    assert metrics["final"] == rows[-1]
    assert metrics["steps"] == rows[-1]["step"] == 48
    assert metrics["resumed_from"] is None
    assert metrics["pairs_per_second"] > 0 and metrics["tokens_per_second"] > 0 and metrics["peak_memory_bytes"] > 1e8


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_says_there_is_nothing_to_do_in_a_copied_run_too(
    smoke: Any, tmp_path: Path, stage: str
) -> None:
    copied = shutil.copytree(smoke.folder, tmp_path / "elsewhere" / "smoke")
    done = CliRunner().invoke(app, [stage, str(SMOKE), "--runs-dir", str(copied.parent)])
    assert f"{stage}: nothing has changed, nothing to do" in done.stdout
    assert (copied / "manifest.json").read_bytes() == (smoke.folder / "manifest.json").read_bytes()


def test_a_changed_recipe_makes_eval_name_the_change_and_the_command(smoke: Any) -> None:
    done = CliRunner().invoke(app, ["eval", str(SMOKE), "--runs-dir", str(smoke.runs), "--set", "train.beta=0.2"])
    assert done.exit_code == 1
    assert "train.beta is 0.2, was 0.1" in done.stderr and "dpo-cli train" in done.stderr


def test_the_exported_adapter_names_a_base_that_loads(smoke: Any) -> None:
    from peft import AutoPeftModelForCausalLM

    config = read(smoke.folder / "export" / "adapter" / "adapter_config.json")
    assert Path(config["base_model_name_or_path"]).is_absolute()
    AutoPeftModelForCausalLM.from_pretrained(smoke.folder / "export" / "adapter")


def test_the_report_stands_alone(smoke: Any) -> None:
    from dpo_cli.evaluate.words import say

    page = (smoke.folder / "eval" / "report.html").read_text(encoding="utf-8")
    metrics = read(smoke.folder / "eval" / "metrics.json")
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)\s*=|url\(|@import""", page), "nothing may be fetched"
    assert html.escape(metrics["verdict"]["sentence"]).replace("&#x27;", "&#39;") in page
    names = re.findall(r'<svg [^>]*aria-label="([^"]*)"', page)
    curves = [f"{say('curve_' + curve['key'])} over training steps" for curve in metrics["curves"]]
    for chart in ("Reward accuracy. By language", "reward margins of 123 held-out pairs", *curves):
        assert any(name.startswith(chart) for name in names), chart
    assert "prefers-color-scheme: dark" in page


def test_what_is_printed_fits_80_columns_and_is_in_plain_words(smoke: Any) -> None:
    for stage, done in smoke.printed.items():
        assert done.stderr == "", stage
        for line in done.stdout.replace(str(smoke.runs), "runs").splitlines():
            assert len(line) <= 80, (stage, line)
    assert "report: " in smoke.printed["eval"].stdout
