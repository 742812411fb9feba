"""A source whose prompts the model answers itself: what is read of it, sampled, rated, and made into pairs."""

from __future__ import annotations

import gzip
import itertools
import json
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
from dpo_cli import adapters, smoke
from dpo_cli.cli import app
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.judging.ratings import ratings_in
from dpo_cli.prepare.read import look
from tests.prepare import kit
from tests.prepare.answer_server import GOOD, NO_QUOTA, AnswerServer, answer, is_rating, lines
from typer.testing import CliRunner

RATER = {"kind": "reward_model", "id": "nobody/none"}
ASKED = "把开水倒进杯子里要注意什么？"
TURN = {"role": "user", "content": ASKED}
ANSWER = {"role": "assistant", "content": "Slowly."}


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"prompt": [TURN], "topic": "kitchen"}, "prompts"),
        ({"messages": [TURN, ANSWER]}, "prompts"),
        ({"conversations": [{"from": "human", "value": ASKED}]}, "prompts"),
        ({"instruction": ASKED, "input": ""}, "prompts"),
        ({"question": ASKED}, "prompts"),
        ({"frage": ASKED}, "prompts"),
        ({"prompt": f"\n\nHuman: {ASKED}\n\nAssistant:"}, "prompts"),
        ({"prompt": ASKED, "chosen": "Slowly.", "rejected": "Fast."}, "pairs"),
    ],
)
def test_a_prompt_is_read_from_any_layout(tmp_path: Path, row: dict[str, Any], layout: str) -> None:
    path = kit.write_rows(tmp_path / "rows.jsonl", [row])
    columns = {"prompt": "frage"} if "frage" in row else None
    read = look(kit.recipe([{"id": str(path), "sample": {}, "columns": columns}], rater=RATER), 0)
    items: list[Any] = list(read.sets())
    assert (read.layout, [item.prompt for item in items]) == (layout, [[TURN]])


def test_prompts_without_sample_are_refused_with_the_line_to_write(tmp_path: Path) -> None:
    path = kit.write_rows(tmp_path / "rows.jsonl", [{"prompt": ASKED, "topic": "kitchen"}])
    with pytest.raises(DpoError, match="can't tell the layout") as caught:
        look(kit.recipe([{"id": str(path)}]), 0)
    assert "if they are prompts without answers, sample: {answers: 4} on the source" in str(caught.value)
    assert caught.value.exit_code == USAGE


def prompts(count: int) -> list[dict[str, Any]]:
    """Prompts unlike each other, every third one Chinese."""
    ends = (("en", "number"), ("en", "number"), ("zh", "第"))
    return [
        {"prompt": f"{kit.sentence(number, language)} {end} {number}"}
        for number, (language, end) in zip(range(count), itertools.cycle(ends), strict=False)
    ]


class Served:
    """`prepare` on prompts that a server answers and rates, in one folder, so that what was said is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = prompts(12)

    def __call__(self, url: str, sample: dict[str, Any] | None = None, **data: Any) -> Any:
        source = {"sample": {"server": self.server(url), **(sample or {})}, **data.pop("source", {})}
        path = kit.write_rows(self.folder / "rows.jsonl", self.rows)
        out = self.folder / f"out{len(list(self.folder.glob('out*')))}"
        rater = {"kind": "openai", **self.server(url), **data.pop("rater", {})}
        return kit.run(kit.recipe([{"id": str(path), **source}], rater=rater, **data), out)

    @staticmethod
    def server(url: str) -> dict[str, Any]:
        return {"base_url": url, "model": "m", "retries": 2, "timeout": 20.0, "concurrency": 4}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return Served(tmp_path)


def good(turns: list[dict[str, str]]) -> int:
    return turns[-1]["content"].count(GOOD)


def test_prompts_become_pairs_of_the_best_and_the_worst_answer(served: Served) -> None:
    with AnswerServer() as server:
        made = served(server.url)
    assert made.funnel_holds()
    assert len(made.rows) == made.source()["kept"] > 8
    assert all(good(row["chosen"]) > good(row["rejected"]) for row in made.rows)
    by_prompt: dict[str, list[int]] = {row["prompt"]: [] for row in served.rows}
    for body in server.answers:
        by_prompt[body["messages"][-1]["content"]].append(answer(body).count(GOOD))
    for row in made.rows:
        found = by_prompt[row["prompt"][-1]["content"]]
        assert (good(row["chosen"]), good(row["rejected"])) == (max(found), min(found))
        assert row["score_chosen"] == pytest.approx(max(found) / 4)  # 1 + found of 1..5, on all aspects
    seeds = [body["seed"] for body in server.answers]
    assert len(set(seeds)) == len(seeds) == 48
    sampled, rated = made.report["sampled"], made.report["rated"]
    assert (sampled["by"], sampled["prompts"], sampled["answers"]) == (["m on a server"], 12, 48)
    assert sampled["tokens"] == 48 * 12
    assert (rated["by"], rated["failures"]) == ({"kind": "openai", "model": "m"}, 0)
    assert rated["aspects"]["honesty"] == rated["aspects"]["helpfulness"]
    assert 1 < rated["aspects"]["honesty"]["mean"] < 4 and rated["answers"] == 48 - sampled["identical"]
    assert "m rates its own answers" in " ".join(made.report["warnings"])
    written = kit.read_jsonl(made.folder / "answers.jsonl")
    assert [len(row["answers"]) for row in written] == [4] * 12
    assert written[0]["answers"][0]["honesty"] == 1 + written[0]["answers"][0]["text"].count(GOOD)


def test_the_report_says_who_answered_and_who_rated(served: Served) -> None:
    """In report.md, for the terminal shows its part: prompts, ends, twins, tokens, failures, and each aspect.

    A server may call its model by a path, of which report.html keeps the last part.
    """

    def trouble(body: dict[str, Any], number: int) -> str | None:
        return "The weather is fine." if is_rating(body) and number % 9 == 0 else None

    with AnswerServer(trouble, cut=lambda body: not is_rating(body) and body["seed"] % 4 == 3) as server:
        made = served(
            server.url,
            {"server": {**served.server(server.url), "model": "/srv/alice/m"}},
            rater={"model": "/srv/alice/m"},
        )
    sampled, rated = made.report["sampled"], made.report["rated"]
    assert made.warnings("m rates its own answers") and "alice" not in (made.folder / "report.html").read_text("utf-8")
    assert sampled["cut_off"] > 0
    assert rated["failures"] > 0
    wanted = [
        f"48 answers to 12 prompts by m on a server; {sampled['cut_off']} found no end",
        f"{sampled['identical']} were given before; {48 * 12} tokens",
        f"{rated['answers']} answers by m, {rated['failures']} without a score; the longer one preferred",
        *(f"{name.replace('_', ' ')} {one['mean']:.2f}" for name, one in rated["aspects"].items()),
        f"{rated['tokens']:,} tokens",
    ]
    shown = (made.folder / "report.md").read_text(encoding="utf-8")
    assert [part for part in wanted if part not in shown] == []


def test_nothing_is_asked_twice(served: Served) -> None:
    """Neither for other filters, weights or mixes, nor where more answers are wanted, but for those."""
    with AnswerServer() as server:
        first = served(server.url)
        asked = len(server.answers), len(server.ratings)
        again = served(server.url)
        assert (again.train, again.held) == (first.train, first.held)
        assert again.report["sampled"] == first.report["sampled"]
        assert again.report["rated"] == first.report["rated"]
        other = served(
            server.url, filters={"short": False}, score_weights={"verbosity": 0.2}, pairs={"min_margin": 0.3}
        )
        assert len(other.rows) < len(first.rows)
        assert (len(server.answers), len(server.ratings)) == asked
        served(server.url, {"answers": 5})
        assert len(server.answers) == asked[0] + 12
        for seed, times in ((42, 1), (42, 1), (7, 2)):
            served(server.url, {"temperature": 0.5}, seed=seed)
            assert len(server.answers) == asked[0] + 12 + times * 48


def test_a_sources_own_answers_are_kept_where_asked_and_rated_alike(served: Served) -> None:
    best = f"{GOOD} {GOOD} {GOOD} and a {GOOD} answer of one's own"
    served.rows = [{**row, "chosen": "An answer that is no good at all.", "rejected": best} for row in prompts(9)]
    with AnswerServer() as server:
        made = served(server.url, {"keep": True}, source={"layout": "pairs"})
        left_out = served(server.url, source={"layout": "pairs"})
    assert {row["chosen"][-1]["content"] for row in made.rows} == {best}
    assert best not in json.dumps(left_out.rows)


def test_rows_are_rated_again(served: Served, tmp_path: Path) -> None:
    """Whatever the source says of them: its worst answer may be the best, and what it lacked gets scores."""
    bad, best = "It is plain, plain and plain, one must say.", f"It is {GOOD}, {GOOD} and {GOOD}, one must say."
    scored = [kit.ultrafeedback(row["prompt"], [bad, best], ["5", "1"]) for row in prompts(9)]
    bare = [{**row, "chosen": bad, "rejected": best} for row in prompts(18)[9:]]
    with AnswerServer() as server:
        sources = [
            {"id": str(kit.write_rows(tmp_path / f"{name}.jsonl", rows)), "rate": True}
            for name, rows in (("scored", scored), ("bare", bare))
        ]
        rater = {"kind": "openai", **served.server(server.url)}
        made = kit.run(kit.recipe(sources, rater=rater), tmp_path / "out")
    assert {row["chosen"][-1]["content"] for row in made.rows} == {best}
    assert {(row["score_chosen"], row["score_rejected"]) for row in made.rows} == {(0.75, 0.0)}
    assert {row["source"] for row in made.rows} == {"scored", "bare"}
    assert "sampled" not in made.report


def test_slices_share_out_the_prompts(served: Served) -> None:
    asked = []
    with AnswerServer() as server:
        for part in range(3):
            before = len(server.answers)
            made = served(server.url, {"slice": [part, 3]}, eval_fraction=0.01)
            asked.append({body["messages"][-1]["content"] for body in server.answers[before:]})
            assert made.source()["in"] == len(asked[-1]) == 12 - made.report["sampled"]["outside_slice"]
    assert sum(map(len, asked)) == 12
    assert set().union(*asked) == {row["prompt"] for row in served.rows}
    assert all(asked)


def test_answers_that_are_all_alike_make_no_pair(served: Served) -> None:
    alike = "The splendid amber basket and the candle. It stands here."
    with AnswerServer(lambda body, number: None if is_rating(body) or "number 0" not in str(body) else alike) as server:
        made = served(server.url)
    assert made.dropped()["identical"] == 1
    assert made.report["sampled"]["identical"] >= 3
    assert made.funnel_holds()


def test_answers_without_an_end_are_dropped_and_counted(served: Served) -> None:
    with AnswerServer(
        cut=lambda body: not is_rating(body) and ("number 0" in str(body) or body["seed"] % 4 == 3)
    ) as server:
        made = served(server.url)
    assert made.dropped()["cut_off"] >= 1
    assert made.report["sampled"]["cut_off"] == made.source()["answers_dropped"]["cut_off"] >= 4
    assert all(good(row["chosen"]) < 3 for row in made.rows)
    assert made.funnel_holds()


def test_prompts_that_would_be_dropped_anyway_cost_nothing(served: Served) -> None:
    served.rows = [
        *prompts(9),
        {"prompt": "Repeat: <|im_end|> and go on with it, please, number 100"},
        {"prompt": "What is a broken \ufffd\ufffd\ufffd character, number 101"},
        {"prompt": f"Sum up: {'a rather long story of a candle and a kettle ' * 90} number 102"},
    ]
    with AnswerServer() as server:
        made = served(server.url, filters={"too_long": {"max_prompt": 0.5}})
    assert made.report["sampled"]["not_asked"] == 3
    assert not [body for body in server.answers if "number 10" in str(body)]
    assert {"markers": 1, "garbled": 1, "too_long": 1}.items() <= made.dropped().items()
    assert made.funnel_holds()


def test_ratings_without_a_number_or_off_the_scale_are_missing_and_never_0(served: Served) -> None:
    def trouble(body: dict[str, Any], number: int) -> str | None:
        others = ["The weather is fine.", lines(9), lines("N/A"), lines(0)]
        return others[number // 3 % 4] if is_rating(body) and number % 3 == 0 else None

    with AnswerServer(trouble) as server:
        made = served(server.url)
        rated = made.report["rated"]
        assert rated["failures"] == sum(aspect["missing"] for aspect in rated["aspects"].values()) / 4 > 10
        assert all(row["score_rejected"] is not None for row in made.rows)
        assert made.source()["answers_dropped"]["no_score"] > 5
        assert made.funnel_holds()
        assert "gave no score to" in " ".join(made.report["warnings"])
        server.trouble = lambda body, number: None
        assert served(server.url).report["rated"]["failures"] == 0  # asked again: the server may be mended


def test_an_aspect_that_is_missing_leaves_the_others(served: Served) -> None:
    replies = {"helpfulness: 5\nhonesty: 9\ntruthfulness: 3": {"helpfulness": 5.0, "truthfulness": 3.0}}
    replies['**Helpfulness**: 4/5, {"instruction_following": 2.5}'] = {"helpfulness": 4.0, "instruction_following": 2.5}
    replies["<think>honesty: 1</think>honesty：2\nhonesty: 3"] = {"honesty": 3.0}
    replies["helpfulness: -3, truthfulness: five"] = {}
    assert {text: ratings_in(text) for text in replies} == replies


def test_all_garbage_is_an_error_that_says_so(served: Served) -> None:
    def trouble(body: dict[str, Any], number: int) -> str | None:
        return "The weather is fine." if is_rating(body) else None

    with AnswerServer(trouble) as server, pytest.raises(DpoError, match="no_score") as caught:
        served(server.url)
    assert "its replies hold no rating from 1 to 5" in str(caught.value)


def test_a_server_that_is_down_costs_nothing_that_was_paid(served: Served) -> None:
    with AnswerServer() as server:
        port = server.port
        server.trouble = lambda body, number: NO_QUOTA if is_rating(body) else None
        with pytest.raises(DpoError, match=r"the rater answers HTTP 429: .*insufficient_quota") as caught:
            served(server.url)
        assert "lower data.rater.concurrency or raise data.rater.retries; run again to go on" in str(caught.value)
        assert len(server.answers) == 48
    with pytest.raises(DpoError, match="the rater can't be reached") as caught:
        served(server.url)
    assert "data.rater.base_url" in str(caught.value)
    with AnswerServer(port=port) as server:
        assert served(server.url).rows
        assert (len(server.answers), len(server.ratings)) == (0, 48)
    with pytest.raises(DpoError, match="the server can't be reached"):
        served("http://127.0.0.1:9/v1")


def test_a_slow_rating_is_waited_for_and_holds_up_no_other(served: Served) -> None:
    others = threading.Event()

    def trouble(body: dict[str, Any], number: int) -> None:
        if is_rating(body) and number == 1:
            assert others.wait(120)
        elif is_rating(body) and number == 20:
            others.set()

    with AnswerServer(trouble) as server:
        made = served(server.url, rater={"timeout": 120.0})
        assert len(server.ratings) == made.report["rated"]["answers"] > 20  # each was asked for once
    assert made.report["rated"]["failures"] == 0


def test_a_quota_over_the_prompts_is_refused_before_anything_is_asked(served: Served) -> None:
    with AnswerServer() as server:
        with pytest.raises(DpoError, match="quota 13 is over the 12 prompts of rows") as caught:
            served(server.url, source={"quota": 13})
        assert not server.answers
    assert "write quota: 12, or remove it" in str(caught.value)
    assert caught.value.exit_code == USAGE


@pytest.mark.parametrize(("settings", "quota"), [([], 12), (["--set", "data.pairs.pick=all"], 72)])
def test_check_refuses_a_quota_over_the_prompts(tmp_path: Path, settings: list[str], quota: int) -> None:
    recipe = project_of(tmp_path, "http://127.0.0.1:9/v1")
    for value, code in ((quota, 0), (quota + 1, USAGE)):
        done = CliRunner().invoke(app, ["check", str(recipe), "--set", f"data.sources.0.quota={value}", *settings])
        assert done.exit_code == code, done.output
    assert f"write quota: {quota}, or remove it" in done.stderr
    assert "data.sources[0].quota" in done.stderr


def project_of(folder: Path, url: str) -> Path:
    """A recipe of its own for the program, that needs no tokenizer."""
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in prompts(12))
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    server = f"base_url: {url}, model: m, concurrency: 2"
    path = folder / "own.yaml"
    path.write_text(
        "model: {id: nobody/none}\ndata:\n"
        f"  sources: [{{id: ./rows.jsonl, sample: {{server: {{{server}}}}}}}]\n"
        f"  rater: {{kind: openai, {server}}}\n"
        "  total: null\n  languages: null\n  eval_fraction: 0.2\n  filters: {too_long: false}\n",
        encoding="utf-8",
    )
    return path


def bodies(requests: list[dict[str, Any]]) -> set[str]:
    return {json.dumps(body, sort_keys=True) for body in requests}


def test_a_killed_prepare_goes_on(tmp_path: Path, spawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    killed = threading.Event()

    def trouble(body: dict[str, Any], number: int) -> None:
        if is_rating(body) and number == 20 and not killed.is_set():
            process.kill()
            process.wait()
            killed.set()

    with AnswerServer(trouble) as server:
        recipe = project_of(tmp_path, server.url)
        process = spawn("-m", "dpo_cli", "prepare", recipe, "--quiet")
        assert killed.wait(120)
        assert not (tmp_path / "runs" / "own" / "data").exists()
        done = CliRunner().invoke(app, ["prepare", str(recipe), "--quiet"])
        assert done.exit_code == 0, done.output
        asked, rated = len(server.answers), len(server.ratings)
        assert asked - len(bodies(server.answers)) + rated - len(bodies(server.ratings)) <= 4  # what was under way
        again = CliRunner().invoke(app, ["prepare", str(recipe), "--quiet", "--runs-dir", "others"])
        assert again.exit_code == 0, again.output
    for name in ("train.jsonl", "eval.jsonl", "answers.jsonl"):
        assert (tmp_path / "runs/own/data" / name).read_bytes() == (tmp_path / "others/own/data" / name).read_bytes()


@pytest.mark.slow  # tests/test_store.py shares a store between processes
def test_two_prepares_at_once_share_what_they_pay(tmp_path: Path, spawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    both = threading.Barrier(2, timeout=120)
    monkeypatch.chdir(tmp_path)

    def trouble(body: dict[str, Any], number: int) -> None:
        if number <= 2 and not is_rating(body):  # the first of either waits for the other's
            both.wait()

    with AnswerServer(trouble) as server:
        recipe = project_of(tmp_path, server.url)
        alone = ["--set", "data.sources.0.sample.server.concurrency=1"]
        running = [
            spawn("-m", "dpo_cli", "prepare", recipe, "--quiet", *alone, "--set", f"name={name}") for name in "ab"
        ]
        said = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    made = [(tmp_path / "runs" / name / "data" / "train.jsonl").read_bytes() for name in "ab"]
    assert made[0] == made[1]


def test_a_full_disk_is_said_and_what_was_paid_stays(served: Served) -> None:
    """Of both files: the one of answers, and the one of ratings."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswerServer() as server:
        for _ in range(2):
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (14_000, limits[1]))
                with pytest.raises(DpoError, match="can't keep results") as caught:
                    served(server.url)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert "free some disk space" in str(caught.value)
        assert served(server.url).rows


@pytest.fixture
def own(tmp_path: Path) -> Any:
    """`own("a")`: `prepare` on prompts of the built-in data, answered by the built-in model and rated by its judge."""

    def go(name: str, sample: dict[str, Any] | None = None, **data: Any) -> Any:
        asked: dict[str, None] = {}
        for language in ("en", "zh"):
            rows = gzip.decompress(smoke.resolve(f"builtin:style-ultrafeedback-{language}").read_bytes()).splitlines()
            asked |= dict.fromkeys(json.loads(line)["instruction"] for line in rows[40:46])
        path = kit.write_rows(tmp_path / "rows.jsonl", [{"prompt": text} for text in asked])
        source = {"id": str(path), "sample": {"max_new_tokens": 96, **(sample or {})}}
        model = {"id": "builtin:tiny-qwen3", "load_in_4bit": False, "max_length": 512, **data.pop("model", {})}
        rater = {"kind": "reward_model", "id": "builtin:style-reward"}
        return kit.run(kit.recipe([source], model=model, rater=rater, **data), tmp_path / name)

    return go


def test_the_model_answers_and_a_reward_model_rates(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = own("a", eval_fraction=0.1)
    rewards = {
        one["text"]: one["reward"] for row in kit.read_jsonl(made.folder / "answers.jsonl") for one in row["answers"]
    }
    assert len(made.rows) >= 8
    for row in made.rows:
        chosen, rejected = (rewards[row[side][-1]["content"]] for side in ("chosen", "rejected"))
        assert chosen > rejected
        assert 0 <= row["score_rejected"] < row["score_chosen"] <= 1
    order = sorted((rewards[row[f"{side}"][-1]["content"]], row[f"score_{side}"]) for row in made.rows
                   for side in ("chosen", "rejected"))  # fmt: skip
    assert [score for _, score in order] == sorted(score for _, score in order)  # a rank keeps the order of rewards
    assert made.report["sampled"]["by"] == ["builtin:tiny-qwen3"]
    assert made.report["rated"]["by"] == {"kind": "reward_model", "model": "builtin:style-reward"}

    from dpo_cli import models
    from dpo_cli.judging import reward_model

    def loaded(*arguments: Any) -> None:
        raise AssertionError("everything is kept")

    monkeypatch.setattr(models, "load_base", loaded)
    monkeypatch.setattr(reward_model, "_load", loaded)
    assert own("b", eval_fraction=0.1, pairs={"min_margin": 0.0}).report["sampled"] == made.report["sampled"]


def test_answers_do_not_hang_on_the_batch_nor_on_what_is_asked_beside(own: Any, tmp_path: Path) -> None:
    many = {row["prompt"][0]["content"]: row["answers"] for row in kit.read_jsonl(own("a").folder / "answers.jsonl")}
    for store in tmp_path.glob(".*.sqlite*"):
        store.unlink()
    few = kit.read_jsonl(own("b", {"slice": [0, 3]}).folder / "answers.jsonl")
    assert 0 < len(few) < len(many)
    for row in few:
        assert [one["text"] for one in row["answers"]] == [one["text"] for one in many[row["prompt"][0]["content"]]]


def test_a_changed_adapter_makes_the_pairs_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says which file; the answers are drawn anew, from the adapter that is there."""
    monkeypatch.chdir(tmp_path)
    answers, said = [], []
    rows = [{"prompt": f"Give me three short tips so that I can {what}."} for what in ("mow a lawn", "fry an egg")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "own.yaml").write_text(
        "model: {id: builtin:tiny-qwen3, load_in_4bit: false, max_length: 512, adapter: ./adapter}\ndata:\n"
        "  sources: [{id: ./rows.jsonl, sample: {answers: 3, max_new_tokens: 96}}]\n"
        "  rater: {kind: reward_model, id: builtin:style-reward}\n  total: null\n  languages: null\n",
        encoding="utf-8",
    )
    for seed in (1, 1, 2):
        random_adapter(tmp_path / "adapter", seed)
        done = CliRunner().invoke(app, ["prepare", "own.yaml"])
        assert done.exit_code == 0, done.output
        said.append(done.output)
        answers.append((tmp_path / "runs" / "own" / "data" / "answers.jsonl").read_text(encoding="utf-8"))
    assert "nothing has changed" in said[1]
    assert answers[0] == answers[1] != answers[2]
    assert "nothing has changed" not in said[2]


def test_another_commit_of_an_adapter_gives_other_answers(own: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Though all that was drawn lies in one store."""
    snapshots, drawn = tmp_path / "snapshots", []
    monkeypatch.setattr(adapters, "snapshot_download", lambda name, revision, **more: str(snapshots / revision))
    for seed, commit in enumerate(("a1", "b2")):
        random_adapter(snapshots / commit, seed)
        made = own(
            commit, {"slice": [0, 3]}, model={"adapter": "me/sft", "adapter_revision": commit}, eval_fraction=0.01
        )
        drawn.append((made.folder / "answers.jsonl").read_text(encoding="utf-8"))
    assert drawn[0] != drawn[1]


def random_adapter(folder: Path, seed: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(smoke.resolve("builtin:tiny-qwen3"))
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(str(folder))
