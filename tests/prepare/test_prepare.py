"""`prepare` as a whole: nothing lost, nothing changed that isn't counted, and the same result for the same rows."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from dpo_cli.errors import DpoError
from dpo_cli.prepare.audit import shortcut_warnings
from dpo_cli.prepare.report import examples, summary
from dpo_cli.prepare.split import held_below
from dpo_cli.prepare.text import hash64, normalise
from dpo_cli.prepare.tokens import preview
from dpo_cli.records import Pair
from dpo_cli.terminal import print_markdown
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.prepare import kit

SLOW_PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


def planted() -> dict[str, list[Any]]:
    """Defects, each in rows that have no other; `kept` is what is clean."""
    two = ["5", "1"]
    text, uf = kit.sentence, cast(Any, kit.ultrafeedback)

    def one(n: Any, worst: str, language: str = "en") -> Any:
        return uf(text((n, "q"), language), [text((n, "a"), language, 25), worst], two)

    def rated(rating: str, following: str) -> dict[str, str]:
        return {"helpfulness": rating, "honesty": rating, "truthfulness": rating, "instruction_following": following}

    clean = [kit.plain(n) for n in range(40)] + [kit.plain(n, "zh") for n in range(20)]
    long = [{**kit.plain(("long", n)), "instruction": text(("long", n), words=45)} for n in range(4)]
    return {
        "kept": clean + long,
        "schema": [
            5, None, "text", [], {}, {"instruction": "x"}, uf(3, ["a"], ["1"]), {**kit.plain("s"), "completions": {}},
            uf("lone \ud800 surrogate", ["a", "b"], two), one("s", "half \udfff of it"),
            {**kit.plain("m"), "completions": [None, "x"]},
        ],
        "garbled": [uf(text("g") + "\x00", [text("g1"), text("g2")], two), one("g", "so it goes on " * 30)],
        "contaminated": [{**kit.plain("c"), "source": "truthful_qa"}],
        "language": [kit.plain("ja") | {"instruction": "これは何ですか。教えてください。"}],
        "duplicate": [{**row, "instruction": f" {row['instruction'].upper()}?!"} for row in clean[:3]],
        "near_duplicate": [{**row, "instruction": row["instruction"] + " Thanks!"} for row in long[:2]],
        "no_response": [uf(text(("none", n)), [], []) for n in range(2)],
        "single_response": [uf(text(("one", n)), [text(n)], ["5"]) for n in range(3)],
        "think": [one("t", "It is <think>never closed and goes on.")],
        "markers": [one("m", "Sure thing.\n\nHuman: what about the other harbour?")],
        "echo": [uf("Repeat " + text("e"), [text("e"), "Repeat " + text("e")], two)],
        "template": [
            one("r", "I'm sorry, but I can't assist with that."), one("z", "抱歉，我无法回答您的这个问题。", "zh"),
        ],
        "short": [one("y", "Yes."), one("empty", "")],
        "no_score": [kit.plain("n", ratings=("5", rated("N/A", "4")))],
        "identical": [uf(text("i"), [text("i2"), f"  {text('i2')} "], two)],
        "tie": [kit.plain(("tie", n), ratings=("3", "3", "3")) for n in range(4)],
        "margin": [kit.plain("w", ratings=("4", rated("4", "3")))],
        "too_long": [uf(text("x"), [text("x", words=2500), text("x2")], two)],
        "length_ratio": [uf(text("l"), [text("l", words=110), text("l2", words=11)], two)],
    }  # fmt: skip


def planted_run(rows: list[Any]) -> Any:
    model = {"id": "builtin:tiny-qwen3", "max_length": 4096}
    filters = {"too_long": True, "length_ratio": 5}
    mix = {"languages": {"en": 0.7, "zh": 0.3}, "pairs": {"min_margin": 0.2}}
    return kit.run_rows(rows, {"layout": "ultrafeedback"}, filters=filters, model=model, **mix)


def without_lines(report: Any) -> str:
    """A report, but for the line numbers of rows."""
    return re.sub(r"rows\.jsonl:\d+", "rows.jsonl", json.dumps({**report, "provenance": 0}))


def in_any_order(rows: list[Any], run: Any = kit.run_rows, **data: Any) -> Any:
    """`prepare` on rows, whose order changes nothing at all."""
    made = run(rows, **data)
    random.Random(3).shuffle(rows)
    again = run(rows, **data)
    assert (again.train, again.held) == (made.train, made.held)
    assert without_lines(again.report) == without_lines(made.report)
    assert made.funnel_holds()
    return made


def test_planted_defects_are_recovered_exactly(capsys: Any, monkeypatch: Any) -> None:
    """Every count, by reason; report.json, the result and the terminal hold the same; that fits 80 columns."""
    rows = planted()
    made = in_any_order([row for several in rows.values() for row in several], planted_run)
    expected = {reason: len(several) for reason, several in rows.items()}
    assert made.source()["kept"] == expected.pop("kept")
    assert made.dropped() == expected
    report = made.prepared.report
    assert report == made.report
    parts = {"sources", "pairs", "languages", "margin", "length", "tokens", "duplicates", "shortcuts", "provenance"}
    assert parts <= set(report)
    monkeypatch.setenv("COLUMNS", "80")
    print_markdown("\n\n".join([*summary(report, on_terminal=True), *examples(report)]))
    lines = capsys.readouterr().out.splitlines()
    for reason, count in expected.items():
        assert any(line.split()[:2] == [reason, f"-{count}"] for line in lines), reason
        assert 1 <= len(report["examples"]["dropped"][reason]) <= 2
    assert len(report["examples"]["kept"]["rows"]) == 3
    assert all(len(line) <= 80 for line in lines)


def test_spellings_of_one_prompt_in_any_order() -> None:
    """Which of them stays, and which is shown as an example, doesn't depend on which came first."""
    rows = [
        {**kit.pair(n), "prompt": asked + end}
        for n in range(6)
        for asked in (kit.sentence(n), kit.sentence(n).upper())
        for end in ("", "!", "??", " \x07")
    ]
    assert "\x07" not in json.dumps(in_any_order(rows).report, ensure_ascii=False)


def test_the_smoke_sets_planted_counts(tmp_path: Path) -> None:
    """The built-in sets say what is planted in them; a bad answer that leaves three others costs no prompt."""
    from tests.tools.smoke_data import PLANTED

    made = kit.run(kit.recipe([{"id": f"builtin:{name}"} for name in PLANTED]), tmp_path / "out")
    assert made.funnel_holds()
    for name, counts in PLANTED.items():
        found = {**made.dropped(name), **made.source(name)["edits"], **made.source(name)["answers_dropped"]}
        assert found == {kind: count for kind, count in counts.items() if count}
        assert ("template" in made.dropped(name)) == (name == "style-helpsteer2")


def test_shuffled_helpsteer2_rows_find_their_prompt() -> None:
    rows = [
        kit.helpsteer2(kit.sentence(n), kit.sentence((n, rating), words=20), rating)
        for n in range(80)
        for rating in (0, 4)
    ]
    rows += [kit.helpsteer2(kit.sentence(("lone", n)), kit.sentence(("l", n)), 3) for n in range(5)]
    made = in_any_order(rows)
    assert made.source()["kept"] == 80 and made.dropped() == {"single_response": 5}
    labelled = [{"prompt": kit.ASKED, "completion": text, "label": text == kit.GOOD} for text in (kit.GOOD, kit.BAD)]
    either, other = (kit.run_rows(some, format="unpaired", eval_fraction=1e-9) for some in (labelled, labelled[::-1]))
    assert either.train == other.train


def test_text_leaves_as_it_came() -> None:
    """Full-width punctuation, spaces, line ends, emoji and rare characters: byte for byte."""
    prompt = "　请写一段“测试”：（１）标点，（２）空格…… 以及𠮷野家—谢谢！\r\n\n"
    chosen = " 好的：\n\n\t「引号」，ｆｕｌｌ　ｗｉｄｔｈ；é vs é 👩‍👩‍👧 \u2028 end "
    row = {"prompt": prompt, "chosen": chosen, "rejected": "“不行”——，。！？；：（）【】《》\n\n"}
    [out] = kit.run_rows([row], eval_fraction=1e-9).train
    assert {name: out[name][0]["content"] for name in row} == row


BAD_LINES = {"cut": b"{", "UTF-16": b"\xff\xfe{}", "brackets": b"[" * 100_000, "digits": b"1" * 5000, "NaN": b"NaN"}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_broken_lines_are_schema(tmp_path: Path, line: bytes) -> None:
    good = json.dumps(kit.pair("good")).encode()
    (tmp_path / "rows.jsonl").write_bytes(good + b"\n\n" + line + b"\n")
    made = kit.run_file(tmp_path / "rows.jsonl", keep_dropped=True)
    assert made.dropped() == {"schema": 1} and made.source()["in"] == 2
    [row] = kit.read_jsonl(tmp_path / "out" / "dropped.jsonl")
    assert row["reason"] == "schema" and row["detail"]


row_choice = st.tuples(
    st.integers(0, 40), st.sampled_from(["en", "zh"]), st.lists(st.sampled_from([*"12345", "N/A"]), max_size=4),
    st.sampled_from(["", " Thanks!", "!!"]), st.sampled_from([None, "I'm sorry, but I can't help with that.", "No."]),
)  # fmt: skip


def row_of(choice: Any) -> Any:
    number, language, ratings, suffix, instead = choice
    row = kit.plain(number, language, ratings)
    row["instruction"] = kit.sentence(number, language, 30) + suffix
    if instead and row["completions"]:
        row["completions"][0]["response"] = instead
    return row


@SLOW_PROPERTY
@given(
    st.lists(row_choice, min_size=1, max_size=60),
    st.sampled_from(["best_worst", "best_random", "all"]),
    st.randoms(use_true_random=False),
)
def test_properties_of_any_data(choices: list[Any], pick: str, rng: Any) -> None:
    """Order of rows changes nothing; funnel identity; chosen above rejected; ids unique; no prompt on both sides."""
    rows = [row_of(choice) for choice in choices] + [kit.plain(("anchor", n)) for n in range(12)]
    data: Any = {"pairs": {"pick": pick}, "eval_fraction": 0.3, "total": 30, "languages": {"en": 0.6, "zh": 0.4}}
    made = kit.run_rows(rows, **data)
    rng.shuffle(rows)
    again = kit.run_rows(rows, **data)
    assert (again.train, again.held) == (made.train, made.held)
    assert again.report["sources"] == made.report["sources"] and made.funnel_holds()
    assert all(row["score_chosen"] > row["score_rejected"] for row in made.rows)
    assert len({row["id"] for row in made.rows}) == len(made.rows)
    prompts = [{normalise(row["prompt"][0]["content"]) for row in side} for side in (made.train, made.held)]
    assert not prompts[0] & prompts[1]
    assert made.report["duplicates"]["train_eval_overlap"] == 0


def held_prompts(made: Any) -> set[str]:
    return {row["prompt"][0]["content"] for row in made.held}


def test_split_is_stable_under_growth_and_seed() -> None:
    """What is held out stays so, what trains stays so, when as many rows are added; and the seed plays no part."""
    rows = [kit.plain(n) for n in range(150)]
    more = [kit.plain(n) for n in range(150, 300)]
    small = kit.run_rows(rows, eval_fraction=0.2)
    grown = kit.run_rows(more + rows, eval_fraction=0.2, seed=7)
    assert held_prompts(small) == held_prompts(grown) & {row["instruction"] for row in rows}
    assert 15 <= len(small.held) <= 45
    ids = {row["prompt"][0]["content"]: row["id"] for row in grown.rows}
    assert all(ids[row["prompt"][0]["content"]] == row["id"] for row in small.rows)


@pytest.mark.parametrize(("prompts", "held"), [(4, 0), (100, 20), (1000, 50)])
def test_fifty_prompts_are_held_out_at_least_or_a_fifth_where_that_is_fewer(prompts: int, held: int) -> None:
    hashes = [hash64(number) for number in range(prompts)]
    assert sum(one < held_below(hashes, 0.001) for one in hashes) == held
    assert held_below(hashes, 0.2) == int(0.2 * 2.0**64)


def test_what_is_held_out_never_trains() -> None:
    """eval_size takes the lowest hashes by language, the rest of the held-out prompts goes nowhere."""
    rows = [kit.plain(n, language) for n in range(100) for language in ("en", "zh")]
    shares = {"en": 0.5, "zh": 0.5}
    wide = kit.run_rows(rows, eval_fraction=0.3, eval_size=1000, languages=shares)
    narrow = kit.run_rows(rows, eval_fraction=0.3, eval_size=10, languages=shares)
    assert not held_prompts(wide) & {row["prompt"][0]["content"] for row in narrow.train}
    assert [row["language"] for row in narrow.held].count("zh") == 5 == len(narrow.held) // 2
    for language in shares:
        ordered = [row["id"] for row in wide.held if row["language"] == language]
        assert [row["id"] for row in narrow.held if row["language"] == language] == ordered[:5]
    pairs = narrow.report["pairs"]
    assert sum(pairs.values()) == narrow.source()["kept"] and pairs["eval"] == 10


def test_mix_quotas_and_shortfall(prepared: Any) -> None:
    """Quotas per language and source hold; who falls short is said with its causes; nobody fills in."""
    rows = {
        "one": [kit.plain(("one", n)) for n in range(80)],
        "two": [kit.plain(("two", n)) for n in range(80)],
        "three": [kit.plain(n, "zh") for n in range(10)] + [kit.plain(("t", n), "zh", ("3", "3")) for n in range(7)],
    }
    made = prepared(rows, {"two": {"quota": 20}}, total=101, languages={"en": 0.7, "zh": 0.3})
    tongues = made.report["languages"]
    assert (tongues["en"]["wanted"], tongues["en"]["got"], tongues["zh"]["wanted"]) == (71, 71, 30)
    assert tongues["zh"]["got"] == 10 - tongues["zh"]["eval"]
    assert sum(row["source"] == "two" for row in made.train) <= 20
    [warning] = [text for text in made.report["warnings"] if text.startswith("zh:")]
    assert "30 training pairs wanted" in warning and "7 tie" in warning
    capped = prepared(rows, total=None, languages={"en": 0.7, "zh": 0.3})
    tongues = capped.report["languages"]
    assert tongues["en"]["got"] == pytest.approx(tongues["zh"]["got"] * 7 / 3, abs=1)
    alone = prepared({"one": rows["one"]}, total=None, languages={"en": 0.7, "zh": 0.3})
    assert alone.report["languages"]["en"]["got"] == len(alone.train) == 80 - len(alone.held)
    assert prepared(rows, total=40, languages=None).report["pairs"]["train"] == 40
    other = prepared(rows, total=40, languages=None, seed=1)
    assert other.train != prepared(rows, total=40, languages=None).train


def test_a_shortfall_names_the_quota_and_all_that_was_held_out() -> None:
    rows = [kit.plain(n) for n in range(60)]
    made = kit.run_rows(rows, {"quota": 5}, total=50, languages={"en": 1.0}, eval_fraction=0.3, eval_size=2)
    held = sum(hash64(normalise(row["instruction"])) < 0.3 * 2.0**64 for row in rows)
    lost = f"{held} held out, {60 - held - 5} over a source's quota"
    assert made.warnings("wanted") == [f"en: 50 training pairs wanted, 5 got; lost were {lost}"]


def test_nothing_left_names_the_biggest_reasons() -> None:
    with pytest.raises(DpoError, match=r"3 tie, 1 single_response; such as: rows\.jsonl:\d ") as caught:
        kit.run_rows([kit.plain(n, ratings=("3", "3")) for n in range(3)] + [kit.plain(9, ratings=("3",))])
    assert caught.value.exit_code == 1 and caught.value.hint
    assert kit.run_rows([kit.plain(0)], eval_fraction=1e-9).report["pairs"] == {"train": 1, "eval": 0, "quota": 0}


def test_nothing_for_training_says_what_was_dropped() -> None:
    row = {"prompt": "Why is it so?", "chosen": "Because of this."}
    error = kit.refused([{**row, "rejected": f"Because of it, {n}."} for n in range(4)], eval_fraction=0.99)
    assert "none of the 1 pairs" in error.message and "of 4 prompts went 3 duplicate" in error.message


def test_dropped_rows_are_written_on_request(prepared: Any) -> None:
    rows = [kit.plain(0), kit.plain(1), kit.plain(1), kit.plain(2, ratings=("3", "3"))]
    assert not (prepared({"rows": rows}).folder / "dropped.jsonl").exists()
    made = prepared({"rows": rows}, keep_dropped=True)
    found = kit.read_jsonl(made.folder / "dropped.jsonl")
    assert sorted(row["reason"] for row in found) == ["duplicate", "tie"]
    assert all(row["prompt"] and row["detail"] and row["source"] == "rows" for row in found)
    names = {"train.jsonl", "eval.jsonl", "report.json", "report.md", "report.html", "dropped.jsonl"}
    assert {path.name for path in made.folder.iterdir()} == names


def test_reports_for_people_hold_the_funnel_and_the_page_no_paths(prepared: Any) -> None:
    tie = kit.plain("tie", ratings=("3", "3"))
    made = prepared({name: [*(kit.plain((name, n)) for n in range(5)), tie] for name in "abcde"})
    text = (made.folder / "report.md").read_text(encoding="utf-8")
    assert "| tie | -1 | · | · | · | · | -1 | █ |" in text and "| kept | 5 | 5 | 5 | 5 | 5 | 25 | █" in text
    page = (made.folder / "report.html").read_text(encoding="utf-8")
    for heading in ("Funnel", "Shortcuts", "Where it comes from"):
        assert f"<h2>{heading}</h2>" in page
    assert page.startswith("<!doctype html>") and "<script" not in page and 'scope="col"' in page
    assert str(made.folder.parent) not in page
    digest = hashlib.sha256((made.folder.parent / "a.jsonl").read_bytes()).hexdigest()
    assert made.prepared.inputs["a/a.jsonl"] == digest == made.report["provenance"]["inputs"]["a/a.jsonl"]


def test_ranked_keeps_the_whole_list() -> None:
    rows = [kit.plain(n, ratings=("2", "5", "1", "4")) for n in range(5)]
    for row in kit.run_rows(rows, format="ranked", eval_fraction=1e-9).train:
        assert [one["score"] for one in row["candidates"]] == [1.0, 0.75, 0.25, 0.0]
        assert {*row} == {"id", "prompt", "candidates", "chat_template_kwargs", "language", "source"}
        assert row["candidates"][0]["model"] == "model-1"


def test_unpaired_rows_carry_their_label() -> None:
    labelled = [
        {"prompt": kit.sentence(n), "completion": kit.sentence((n, label)), "label": label}
        for n, labels in enumerate(([True, False], [True], [False]))
        for label in labels
    ]
    made = kit.run_rows(labelled, format="unpaired", eval_fraction=1e-9)
    found = {(row["prompt"][0]["content"], row["completion"][0]["content"], row["label"]) for row in made.train}
    assert found == {(row["prompt"], row["completion"], row["label"]) for row in labelled}
    assert kit.run_rows(labelled, eval_fraction=1e-9).dropped() == {"single_response": 2}  # pairs need both
    scored = kit.run_rows([kit.plain(0)], format="unpaired", eval_fraction=1e-9, pairs={"pick": "all"})
    assert [row["label"] for row in scored.train] == [True, False]


def test_shortcuts_are_measured_and_warned_of() -> None:
    """Where the longer answer, or one model, always wins, the report says so; where nothing tells, it keeps quiet."""
    answers = [["**Bold** " + kit.sentence((n, 1), words=40), kit.sentence((n, 2), words=20)] for n in range(200)]
    made = kit.run_rows([kit.ultrafeedback(kit.sentence(n), both, ["5", "1"]) for n, both in enumerate(answers)])
    shortcuts = made.report["shortcuts"]
    for name in ("length", "markdown", "model"):
        assert shortcuts[name]["value"] == 1.0 and shortcuts[name]["low"] > 0.9
    assert shortcuts["refusal"]["value"] == shortcuts["language_match"]["value"] == 0.5
    assert len(made.warnings("may learn just that")) == 3
    assert made.report["length"]["longer_wins"]["value"] == 1.0
    few = {"value": 0.3, "low": 0.1, "high": 0.6}
    assert not shortcut_warnings({"length": few})  # by chance
    assert "rejected in 70% of pairs (55% to 80%)" in shortcut_warnings({"length": few | {"low": 0.2, "high": 0.45}})[0]
    strangers = [kit.plain(n, ratings=("5", "1")) for n in range(20)]
    for one in (one for row in strangers for one in row["completions"]):
        one["model"] = one["response"]  # each answer by a model that gave no other: nothing is known of it
    assert kit.run_rows(strangers).report["shortcuts"]["model"]["value"] == 0.5
    rng = random.Random(0)
    fair = kit.run_rows([kit.plain(n, ratings=rng.sample(("5", "4", "2", "1"), 4)) for n in range(200)])
    assert not fair.warnings("may learn")
    assert fair.report["shortcuts"]["length"]["low"] < 0.5 < fair.report["shortcuts"]["length"]["high"]


def test_shares_count_prompts_where_all_their_pairs_are_taken() -> None:
    """Six pairs of a prompt are no six witnesses: n is the prompts, and the interval is as wide as of those."""
    rows = [kit.plain(n, ratings=("5", "4", "2", "1")) for n in range(60)]
    made = kit.run_rows(rows, pairs={"pick": "all"})
    report = made.report
    prompts = len({json.dumps(row["prompt"]) for row in made.train})
    assert report["pairs"]["train"] > 3 * prompts
    figures = [report["length"]["longer_wins"], report["length"]["languages"]["en"], *report["shortcuts"].values()]
    assert {figure["n"] for figure in figures} <= {prompts, 0}
    length = report["length"]["longer_wins"]
    assert length["differs"] > prompts  # pairs, in which the rule says something
    assert length["high"] - length["low"] > 0.1


def test_preview_shows_what_the_model_sees(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The template's text, and the tokens on both sides of where the loss starts."""
    monkeypatch.setenv("COLUMNS", "80")
    chosen, rejected = "Behind the copper bridge.", "港口在铜桥的后面，你看。"
    row = {"prompt": "Where is the harbour?", "chosen": chosen, "rejected": rejected}
    pairs = [Pair(**one) for one in kit.run_rows([row], eval_fraction=1e-9).train]
    capsys.readouterr()
    preview(kit.recipe([{"id": "x.jsonl"}]), pairs[:3])
    text = capsys.readouterr().out
    assert "<|im_start|>user\nWhere is the harbour?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n" in text
    assert "Behind the copper bridge.<|im_end|>" in text and "港口在铜桥的后面，你看。" in text
    assert text.count("in the loss") == 2


def test_no_torch_without_a_token_filter(tmp_path: Path) -> None:
    """Seconds of imports that preparing without a token filter has no use for."""
    kit.write_rows(tmp_path / "rows.jsonl", [kit.plain(n) for n in range(5)])
    (tmp_path / "out").mkdir()
    code = """if True:
        import sys
        from pathlib import Path
        from dpo_cli.prepare.pipeline import prepare
        from dpo_cli.recipe import Recipe

        data = {"sources": [{"id": "rows.jsonl"}], "languages": None, "filters": {"too_long": False}}
        prepare(Recipe.model_validate({"name": "n", "model": {"id": "m"}, "data": data}), Path("out"), quiet=True)
        heavy = {"torch", "transformers", "datasets"} & set(sys.modules)
        assert not heavy, heavy
    """
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
