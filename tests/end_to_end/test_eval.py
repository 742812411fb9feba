"""`eval` as people use it: judged, killed in the middle, asked again, asked one thing, set beside another run.

All but the one that is killed run in this process: a new one takes seconds to import torch, and the smoke run has been.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import recipe
from dpo_cli.chat import chat_tokens
from dpo_cli.cli import app
from dpo_cli.errors import DpoError
from dpo_cli.evaluate.evaluate import evaluate
from dpo_cli.evaluate.prompt_file import answer_file
from dpo_cli.job import open_run
from dpo_cli.run import Run
from dpo_cli.store import Store
from rich.cells import cell_len
from tests.judging.judge_server import JudgeServer
from typer.testing import CliRunner

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
KEY = "sk-nobody-may-see-this-0123456789"


@pytest.fixture
def dpo_eval(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`dpo-cli eval` in this process; with `ok`, failing fails the test with what it printed."""
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*arguments: object, ok: bool = True, typed: str = "") -> Any:
        done = CliRunner().invoke(app, ["eval", *map(str, arguments)], input=typed)
        assert not ok or done.exit_code == 0, done.output
        return done

    return invoke


@pytest.fixture
def run(smoke: Any, tmp_path: Path) -> Path:
    """A copy of the finished smoke run, without its evaluation."""
    return Path(smoke.copy(tmp_path / "runs", "prepare", "train"))


def options(run: Path, **changes: object) -> list[object]:
    settings = {"eval.prompts": 12, "eval.max_new_tokens": 8, **changes}
    flags = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return [SMOKE, "--runs-dir", run.parent, *flags]


def judge(url: str, **more: object) -> dict[str, object]:
    return {"kind": "openai", "base_url": url, "model": "m", "calibration": 3, **more}


def metrics(run: Path) -> Any:
    return json.loads((run / "eval" / "metrics.json").read_text(encoding="utf-8"))


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kept(run: Path) -> dict[str, Any]:
    """The answers that are kept while `eval` works."""
    with Store(next(run.glob(".eval/samples-*.sqlite"), run / "none")) as store:
        return store.all()


def test_samples_of_a_killed_eval_are_taken_up_again(run: Path, dpo_eval: Any, spawn: Any) -> None:
    """What was answered before the kill is found again, and the result is that of an eval that nobody killed."""
    few = {"eval.batch_size": 2, "eval.prompts": 8}
    whole = shutil.copytree(run, run.parent / "whole" / "smoke")
    dpo_eval(*options(whole, **few))
    process = spawn("-m", "dpo_cli", "eval", *options(run, **few))
    deadline = time.monotonic() + 120
    while len(kept(run)) < 4:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "eval").exists(), "half an evaluation is none"
    some, first = next(iter(kept(run).items()))
    with Store(next(run.glob(".eval/samples-*.sqlite"))) as store:
        store.put({some: {**first, "tuned": {**first["tuned"], "text": "as it was"}}})
    dpo_eval(*options(run, **few))
    found, expected = rows(run / "eval" / "samples.jsonl"), rows(whole / "eval" / "samples.jsonl")
    marked = next(row for row in found if row["id"] == first["id"])
    assert marked["tuned"]["text"] == "as it was", "not sampled twice"
    (run / "eval" / "samples.jsonl").write_text(json.dumps(marked) + "\n", encoding="utf-8")
    marked["tuned"]["text"] = first["tuned"]["text"]
    assert found == expected
    assert not (run / ".eval").exists()
    dpo_eval(*options(run, **few))  # what somebody changed afterwards is not taken for an answer
    assert rows(run / "eval" / "samples.jsonl") == expected


def test_a_judge_that_dies_costs_neither_answers_nor_judgments(run: Path, dpo_eval: Any) -> None:
    with JudgeServer("alphabetical", "alphabetical", "alphabetical", "wrong_key") as server:
        asked = judge(server.url, concurrency=1, retries=0)
        done = dpo_eval(*options(run, **{"eval.judge": asked}), ok=False)
        assert done.exit_code == 1
        assert "answers HTTP 401" in done.stderr and server.url in done.stderr
        assert not (run / "eval").exists()
        assert len(server.asked) >= 4
        before = kept(run)
    with JudgeServer("alphabetical", port=server.port) as server:
        dpo_eval(*options(run, **{"eval.judge": asked}))
        differ = sum(row["base"]["text"] != row["tuned"]["text"] for row in rows(run / "eval" / "samples.jsonl"))
        questions = 2 * (differ + 3)  # answers that are alike are a tie without asking
        assert len(server.asked) == questions - 3, "the three verdicts are not paid for twice"
        assert {row["id"]: row for row in rows(run / "eval" / "samples.jsonl")} == before
        # Another setting that does not change the answers, nor what was asked: nothing is done again.
        asked = {**asked, "concurrency": 2}
        dpo_eval(*options(run, **{"eval.judge": asked}))
        assert len(server.asked) == questions - 3
        assert {row["id"]: row for row in rows(run / "eval" / "samples.jsonl")} == before


def test_a_judge_is_in_metrics_report_and_terminal(run: Path, dpo_eval: Any) -> None:
    with JudgeServer("alphabetical") as server:
        done = dpo_eval(*options(run, **{"eval.judge": judge(server.url)}))
    found = metrics(run)
    judged = rows(run / "eval" / "judgments.jsonl")
    assert [row["id"] for row in judged[:12]] == [row["id"] for row in rows(run / "eval" / "samples.jsonl")]
    assert found["judge"]["judged"] == 12
    assert found["judge"]["win_rate"]["value"] == pytest.approx(sum(row["score"] for row in judged[:12]) / 12)
    assert found["judge"]["calibration"]["n"] == 3
    assert found["about"]["seconds"] == json.loads((run / "train" / "metrics.json").read_text())["seconds"] > 0
    of_each = [(one["samples"]["kl"]["n"], one["judge"]["win_rate"]["n"]) for one in found["languages"].values()]
    assert [sum(counts) for counts in zip(*of_each, strict=True)] == [12, 12] and all(map(all, of_each))
    sources = json.loads((run / "data" / "report.json").read_text(encoding="utf-8"))["sources"].values()
    assert found["data"]["came"] == sum(one["in"] for one in sources) > sum(one["kept"] for one in sources)
    pairs = {f"calibration/{row['id']}": row for row in rows(run / "data" / "eval.jsonl")[:3]}
    answers = [[pairs[row["id"]][side][-1]["content"] for side in ("chosen", "rejected")] for row in judged[12:]]
    assert [row["score"] for row in judged[12:]] == [float(chosen < rejected) for chosen, rejected in answers]
    assert found["judge"]["position_consistency"]["value"] == 1
    assert {row["kind"] for row in found["examples"]} <= {"changed", "random"}
    page = (run / "eval" / "report.html").read_text(encoding="utf-8")
    for text in (page, (run / "eval" / "report.md").read_text(encoding="utf-8"), done.stdout):
        assert "Win rate" in text
    assert "judge" in found["verdict"]["sentence"]
    lines = [line for line in done.stdout.splitlines() if not line.startswith(("next: ", "report: "))]
    assert max(map(len, lines)) <= 80


def test_the_key_is_written_nowhere(run: Path, dpo_eval: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the server says it back, in a reply and in an error."""
    monkeypatch.setenv("A_KEY", KEY)
    with JudgeServer("echo", "echo", "echo_500", "echo") as server:
        asked = judge(server.url, api_key_env="A_KEY", retries=0)
        done = dpo_eval(*options(run, **{"eval.judge": asked}), "--debug")
        assert f"Bearer {KEY}" in server.keys
    with JudgeServer("wrong_key") as server:
        asked = judge(server.url, api_key_env="A_KEY", retries=0, calibration=5)
        refused = dpo_eval(*options(run, **{"eval.judge": asked}), "--debug", ok=False)
    assert refused.exit_code == 1
    for output in (done.stdout, done.stderr, refused.stdout, refused.stderr):
        assert KEY not in output
    for path in run.parent.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_missing_key_is_told_before_anything_is_loaded(run: Path, dpo_eval: Any) -> None:
    asked = judge("http://127.0.0.1:9/v1", api_key_env="NO_SUCH_KEY")
    done = dpo_eval(*options(run, **{"eval.judge": asked}), ok=False)
    assert done.exit_code == 1
    assert "NO_SUCH_KEY" in done.stderr
    assert "held-out pairs" not in done.stdout and not (run / ".eval").exists()


def test_one_prompt_several_times_and_nothing_written(run: Path, dpo_eval: Any) -> None:
    before = sorted(path for path in run.rglob("*"))
    done = dpo_eval(*options(run), "--prompt", "用三句话介绍如何给多肉浇水", "--samples", 2)
    assert "用三句话介绍如何给多肉浇水" in done.stdout
    assert "answer 2 of 2" in done.stdout and "answer 3" not in done.stdout
    assert done.stdout.count("base (8 tokens, cut off)") == 2
    assert "tuned (8 tokens, cut off)" in done.stdout
    assert sorted(path for path in run.rglob("*")) == before
    assert dpo_eval(*options(run), "--samples", 2, ok=False).exit_code == 2


def test_a_chat_has_both_models_a_history_and_a_system_prompt(
    run: Path, dpo_eval: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, questions = [], ("如何给多肉浇水？", "Why?")

    def spied(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
        if messages[-1]["content"] in questions:  # loading renders messages of its own
            seen.append([(one["role"], one["content"]) for one in messages])
        return chat_tokens(tokenizer, messages, **options)

    monkeypatch.setattr("dpo_cli.evaluate.talk.chat.chat_tokens", spied)
    before = sorted(run.rglob("*"))
    endless = "why? " * 3000
    typed = f"如何给多肉浇水？\nWhy?\n/new\n/system Be brief.\n/nonsense\n\n{endless}\nWhy?\n"
    done = dpo_eval(*options(run), "--chat", typed=typed)
    assert [len(messages) for messages in seen] == [1, 1, 3, 3, 2, 2]
    base, tuned = seen[2], seen[3]
    assert base[0] == tuned[0] == ("user", "如何给多肉浇水？") and base[1][0] == tuned[1][0] == "assistant"
    assert base[1] != tuned[1], "each goes on from its own answer"
    assert seen[-1] == [("system", "Be brief."), ("user", "Why?")]
    assert done.stdout.count("tuned (") == 3
    assert "are too many to answer" in done.stdout and "/new starts over" in done.stdout
    assert sorted(run.rglob("*")) == before


def test_test_sets_have_figures_of_their_own_and_are_stale_by_themselves(run: Path, dpo_eval: Any) -> None:
    trained_on = rows(run / "data" / "train.jsonl")[0]["prompt"][-1]["content"]
    answers = {"chosen": "先备好一张清单，动作要干脆。", "rejected": "也许一张清单吧，说不准。"}
    asked = [trained_on, "怎么给自行车换内胎？", "怎么洗羽绒服？", "How do I sharpen a pencil?"]
    bench = [{"prompt": one, **answers, "subset": name} for one, name in zip(asked, "aabb", strict=True)]
    path = run.parent / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in bench), encoding="utf-8")
    pairs = [row for name in ("eval", "train") for row in rows(run / "data" / f"{name}.jsonl")[-12:]]
    style = [{key: row[key][-1]["content"] for key in ("prompt", "chosen", "rejected")} for row in pairs]
    (run.parent / "style.jsonl").write_text("".join(json.dumps(row) + "\n" for row in style), encoding="utf-8")
    sets = [str(path), {"id": str(run.parent / "style.jsonl"), "name": "风格"}]
    settings = options(run, **{"eval.prompts": 2, "eval.judge": None, "eval.sets": sets})
    done = dpo_eval(*settings)
    found, scored = metrics(run), rows(run / "eval" / "sets.jsonl")
    assert list(found["sets"]) == ["bench", "风格"]
    for name, one in found["sets"].items():
        some = [row for row in scored if row["source"] == name]
        gains = [[row[f"policy_{side}"] - row[f"reference_{side}"] for side in ("chosen", "rejected")] for row in some]
        accuracy = one["pairs"]["reward_accuracy"]
        assert accuracy["n"] == one["kept"] == len(some)
        assert accuracy["value"] == pytest.approx(sum(chosen > rejected for chosen, rejected in gains) / len(gains))
    assert {name: one["pairs"]["margin"]["n"] for name, one in found["sets"]["bench"]["subsets"].items()} == {
        "a": 2,
        "b": 2,
    }
    assert set(found["sets"]["bench"]["languages"]) == {"en", "zh"}
    assert found["sets"]["风格"]["pairs"]["reward_accuracy"]["low"] > 0.5, "the style that it learned"
    assert found["sets"]["bench"]["overlap"] == 1 < found["sets"]["风格"]["overlap"]
    assert any(warning.startswith("1 of 4 prompts of bench were trained on") for warning in found["warnings"])
    for text in (done.stdout, *((run / "eval" / f"report.{kind}").read_text("utf-8") for kind in ("md", "html"))):
        assert "bench" in text and "风格" in text and "1 of them in the training data" in text
    tables = [line for line in done.stdout.splitlines() if not line.startswith(("next: ", "report: "))]
    assert max(map(cell_len, tables)) <= 80

    samples = (run / "eval" / "samples.jsonl").read_bytes()
    path.write_text(json.dumps(bench[1]) + "\n", encoding="utf-8")
    loaded, changed = open_run(SMOKE, [str(one) for one in settings[4::2]], run.parent)
    assert changed.fresh("train", loaded)
    assert changed.stale("eval", loaded)[0].text == "bench/bench.jsonl has changed"
    assert "nothing to do" not in dpo_eval(*settings).stdout
    assert metrics(run)["sets"]["bench"]["kept"] == 1
    assert (run / "eval" / "samples.jsonl").read_bytes() == samples
    assert "nothing to do" in dpo_eval(*settings).stdout


def test_prompts_that_leave_no_room_for_an_answer_are_an_error(run: Path) -> None:
    pairs = rows(run / "data" / "eval.jsonl")[:2]
    for pair in pairs:
        pair["prompt"][-1]["content"] = "why? " * 600
    (run / "data" / "eval.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    with pytest.raises(DpoError, match="every held-out prompt fills"):
        evaluate(recipe.load(SMOKE), Run(run), quiet=True)


def test_labelled_answers_of_one_a_prompt_are_told_apart_by_their_gains(run: Path) -> None:
    held_out = []
    for number, pair in enumerate(rows(run / "data" / "eval.jsonl")):
        row = {name: pair[name] for name in ("id", "prompt", "language", "source", "chat_template_kwargs")}
        good = number % 2 == 0
        held_out.append({**row, "completion": pair["chosen" if good else "rejected"], "label": good})
    (run / "data" / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out), encoding="utf-8")
    settings = ["train.method=kto", "eval.prompts=2", "eval.max_new_tokens=8", "eval.judge=null"]
    found = evaluate(recipe.load(SMOKE, settings), Run(run), quiet=True)
    assert found["pairs"] is None
    area = found["answers"]["auroc"]
    assert area["low"] > 0.5 and area["n"] == len(held_out) // 2
    assert {name for name, one in found["languages"].items() if one["answers"]["auroc"]["value"] > 0.5} == {"en", "zh"}
    assert "of good answers gained more than bad ones to other prompts" in found["verdict"]["sentence"]
    assert "AUROC" in (run / "eval" / "report.md").read_text(encoding="utf-8")
    assert rows(run / "eval" / "pairs.jsonl") == []


def test_the_judge_is_tried_once_a_prompt(run: Path) -> None:
    """Two pairs of one prompt are not two observations, and the interval counts prompts."""
    pairs = rows(run / "data" / "eval.jsonl")[:3]
    again = pairs[0] | {"id": "again", "chosen": pairs[1]["chosen"]}
    text = "".join(json.dumps(pair) + "\n" for pair in [pairs[0], again, *pairs[1:]])
    (run / "data" / "eval.jsonl").write_text(text, encoding="utf-8")
    with JudgeServer("alphabetical") as server:
        asked = recipe.load(SMOKE, [f"eval.judge={json.dumps(judge(server.url, calibration=10))}", "eval.prompts=0"])
        evaluate(asked, Run(run), quiet=True)
    found = metrics(run)["judge"]
    assert found["calibration"]["n"] + found["calibration_failures"] == 3


def test_a_file_of_prompts_gets_the_answers_that_an_evaluation_gets(run: Path) -> None:
    greedy = recipe.load(SMOKE, ["eval.judge=null", "eval.prompts=6", "eval.max_new_tokens=12", "eval.temperature=0"])
    evaluate(greedy, Run(run), quiet=True)
    samples, file = rows(run / "eval" / "samples.jsonl"), run.parent / "asked.json"
    file.write_text(json.dumps([{"prompt": row["prompt"]} for row in samples]), encoding="utf-8")
    answers = [json.loads(path.read_text(encoding="utf-8")) for path in answer_file(greedy, Run(run), file, quiet=True)]
    base, tuned = ([row[side]["text"] for row in samples] for side in ("base", "tuned"))
    assert [[one["output"] for one in some] for some in answers] == [base, tuned] and base != tuned


def test_without_a_judge_the_largest_margins_are_shown_and_what_prepare_warned_of_is_told_again(run: Path) -> None:
    report = run / "data" / "report.json"
    report.write_text(json.dumps({**json.loads(report.read_text("utf-8")), "warnings": ["half of it is one prompt"]}))
    settings = ["eval.judge=null", "eval.prompts=8", "eval.max_new_tokens=4"]
    found = evaluate(recipe.load(SMOKE, settings), Run(run), quiet=True)
    assert "data: half of it is one prompt" in found["warnings"]
    asked = {row["id"] for row in rows(run / "eval" / "samples.jsonl")}
    gains = {
        row["id"]: row["policy_chosen"] - row["reference_chosen"] - row["policy_rejected"] + row["reference_rejected"]
        for row in rows(run / "eval" / "pairs.jsonl")
        if row["id"] in asked
    }
    changed = [one["id"] for one in found["examples"] if one["kind"] == "changed"]
    assert changed == sorted(gains, key=lambda one: -abs(gains[one]))[:3]


@pytest.mark.slow  # tests/evaluate/test_compare.py has the figures
def test_runs_that_one_judge_saw_are_compared_by_it(run: Path, dpo_eval: Any) -> None:
    """A run may be named by its folder too; what sets it apart is said."""
    other = run.parent / "other [i] :x:"
    with JudgeServer("alphabetical") as server:
        asked = {"eval.judge": judge(server.url)}
        dpo_eval(*options(run, **asked))
        shutil.copytree(run, other)
        settings = options(run, **asked)
        done = dpo_eval(*settings, "--compare", other)
    assert "other [i] :x: differs in nothing" in done.stdout
    assert "No difference can be told. By win rate" in done.stdout
    page = (run / "compare.html").read_text(encoding="utf-8")
    assert "<script" not in page and str(run.parent) not in page and "No difference can be told" in page
    assert page.count('<section class="answer" aria-label="other [i] :x:">') == 2, "all alike: two prompts at random"
    twice = dpo_eval(*settings, "--compare", run, ok=False)
    assert twice.exit_code == 2 and "stands twice" in twice.stderr
    (run.parent / "other notes.txt").write_text("no run", encoding="utf-8")
    for named in (run.parent / "o*", run.parent):
        assert "other [i] :x: differs in nothing" in dpo_eval(*settings, "--compare", named).stdout
    assert dpo_eval(*settings, "--compare", run.parent / "none*", ok=False).exit_code == 2
