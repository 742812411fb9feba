"""What prepare says: of every bad share of rows the cause, a row and the fix; of every file what was read of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import DpoError
from dpo_cli.prepare import remarks
from dpo_cli.prepare.filters import REASONS
from dpo_cli.prepare.report import examples, summary
from dpo_cli.recipe.sections import FILTERS
from dpo_cli.show import escaped
from dpo_cli.terminal import print_markdown
from tests.prepare import kit

TINY = {"id": "builtin:tiny-qwen3", "max_length": 64}


def said(made: Any, start: str) -> str:
    """The one warning that begins so, which also stands in report.md and on the terminal."""
    [found] = [one for one in made.report["warnings"] if one.startswith(start)]
    return str(found)


def test_rows_that_can_not_be_read_are_said_with_cause_line_and_fix(prepared: Any) -> None:
    """39 of 40 went as schema with exit 0 and no word; a single one is said too."""
    rows = [kit.pair(n) for n in range(40)]
    bad = [{"prompt": row["prompt"], "chosen": None, "bad": row["rejected"]} for row in rows[:6]]
    made = prepared({"rows": [*bad, *rows[6:]]})
    assert made.dropped() == {"schema": 6}
    warning = said(made, "rows: 6 of 40 dropped as schema")
    assert "such as rows.jsonl:" in warning and "chosen is" in warning and "columns:" in warning
    text = (made.folder / "report.md").read_text(encoding="utf-8")
    assert f"> {escaped(warning)}" in text
    assert re.search(r"\*\*schema\*\*, rows rows\.jsonl:\d+, chosen is", text)


def test_of_several_causes_the_commonest_is_said(prepared: Any) -> None:
    rows = [kit.pair(n) for n in range(40)]
    seldom = [{"prompt": row["prompt"], "chosen": row["chosen"], "rejected": n} for n, row in enumerate(rows[:8])]
    often = [{"prompt": row["prompt"], "chosen": None, "rejected": row["rejected"]} for row in rows[8:20]]
    warning = said(prepared({"rows": [*seldom, *often, *rows[20:]]}), "rows: 20 of 40 dropped as schema")
    assert re.search(r"such as rows\.jsonl:(9|1\d|20): chosen is", warning)


def test_one_broken_line_is_named_on_the_terminal_and_in_the_report(prepared: Any, tmp_path: Path) -> None:
    rows = [kit.pair(n) for n in range(100)]
    path = kit.write_rows(tmp_path / "a.jsonl", rows)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:41], '{"prompt": "cut of\n', *lines[42:]]))
    made = kit.run(kit.recipe([{"id": str(path)}]), tmp_path / "out")
    [example] = made.report["examples"]["dropped"]["schema"]
    assert (example["where"], example["source"]) == ("a.jsonl:42", "a")
    assert "not JSON" in example["detail"]
    assert "such as a.jsonl:42: not JSON" in said(made, "a: 1 of 100 dropped as schema")


def test_too_long_names_the_length_that_keeps_nearly_all() -> None:
    rows = [kit.pair(n) for n in range(40)]
    made = kit.run_rows(rows, filters={"too_long": True}, model={**TINY, "max_length": 128})
    if "too_long" not in made.dropped():
        pytest.fail("the rows fit: they have to be longer")
    warning = said(made, f"rows: {made.dropped()['too_long']} of 40 dropped as too_long")
    needed = int(warning.split("model.max_length: ")[1].split()[0])
    longer = kit.run_rows(rows, filters={"too_long": True}, model={**TINY, "max_length": needed})
    assert 38 <= longer.source()["kept"] <= 40
    shorter = kit.run_rows(rows, filters={"too_long": True}, model={**TINY, "max_length": needed - 64})
    assert shorter.source()["kept"] < 38


def test_another_language_asks_for_its_name() -> None:
    rows = [kit.pair(n, "zh") for n in range(20)] + [kit.pair(n) for n in range(20)]
    made = kit.run_rows(rows, languages={"en": 1.0})
    warning = said(made, "rows: 20 of 40 dropped as language")
    assert "in zh" in warning and "language:" in warning and "rows.jsonl:" in warning


def test_a_reason_that_took_a_third_says_what_tunes_it() -> None:
    rows = [kit.pair(n) for n in range(20)] + [{**kit.pair(n), "chosen": "No."} for n in range(20, 31)]
    assert "data.filters.short" in said(kit.run_rows(rows), "rows: 11 of 31 dropped as short")


@pytest.mark.parametrize("reason", REASONS)
def test_a_fix_names_only_keys_that_there_are(reason: str) -> None:
    assert all(name in FILTERS for name in re.findall(r"data\.filters\.(\w+)", remarks.hint(reason)))


@pytest.mark.parametrize(
    ("count", "fraction", "fix"),
    [
        (3, 0.05, "data.eval_fraction: 0.5 would hold out half of the 3"),
        (200, 0.05, "data.eval_fraction: 0.25 would hold out about 50 of 200"),
        (200, 0.4, None),
    ],
)
def test_too_few_held_out_pairs_say_what_they_can_not_tell(count: int, fraction: float, fix: str | None) -> None:
    made = kit.run_rows([kit.pair(n) for n in range(count)], eval_fraction=fraction)
    found = [one for one in made.report["warnings"] if "held out" in one]
    if fix is None:
        assert found == []
        return
    assert fix in found[0]
    held = made.report["pairs"]["eval"]
    assert found[0].startswith("only " if held else "no pair is held out, so eval can measure nothing")
    more = f"{held} of {count} prompts are held out, not 5%: fewer would measure next to nothing"
    assert [one.startswith(more) for one in found[1:]] == [True] * (count == 200)


def test_a_source_whose_answers_all_repeat_short_prompts_loses_them() -> None:
    """Where only some do, it may be chance, and they stay; the report says which it was."""

    def rows(echoing: int) -> list[Any]:
        made = [kit.pair(n) | {"prompt": f"Why {kit.sentence(n, words=2)[:-1].lower()}?"} for n in range(40)]
        for row in made[:echoing]:
            row |= {side: f"{row['prompt']} {row[side]}" for side in ("chosen", "rejected")}
        return made

    loose = {"near_duplicate": False, "duplicate": False, "identical": False}
    for echoing, cut in ((40, True), (37, True), (30, False)):
        made = kit.run_rows(rows(echoing), filters=loose)
        assert made.source()["kept"] == 40
        repeated = [row for row in made.rows if row["chosen"][0]["content"].startswith(row["prompt"][0]["content"])]
        assert len(repeated) == (0 if cut else echoing)
        assert made.source()["edits"] == ({"echo_stripped": 2 * echoing} if cut else {})
        assert made.report["provenance"]["sources"]["rows"].get("short_prompts_cut_from_answers", False) == cut
    off = kit.run_rows(rows(40), filters={**loose, "echo": False})
    assert off.source()["edits"] == {}
    words = [
        kit.pair(n) | {"prompt": "Art", "chosen": f"Artists {n} paint.", "rejected": f"Artful {n}."} for n in range(9)
    ]
    kept = kit.run_rows(words, filters={**loose, "short": False})
    assert {row["chosen"][0]["content"][:7] for row in kept.rows} == {"Artists"}


def test_columns_that_nothing_reads_are_listed() -> None:
    rows = [
        kit.pair(n, language="en", topic="x", judge_note="y", score_chosen=0.9, score_rejected=0.2) for n in range(9)
    ]
    source = kit.run_rows(rows).report["provenance"]["sources"]["rows"]
    assert source["columns_not_read"] == ["topic", "judge_note"]
    mapped = [{"q": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"], "n": 1} for row in rows]
    source = kit.run_rows(mapped, {"columns": {"prompt": "q"}}).report["provenance"]["sources"]["rows"]
    assert source["columns_not_read"] == ["n"]


def test_a_folder_says_what_was_read_of_it(tmp_path: Path) -> None:
    """Rows by file, encodings and separators that were detected, empty files, and files that were passed over."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    rows = [kit.pair(n, "zh") for n in range(30)]
    kit.write_rows(folder / "a.jsonl", rows[:20])
    lines = [";".join(("prompt", "chosen", "rejected")), *(";".join(row.values()) for row in rows[20:])]
    (folder / "b.csv").write_bytes("\n".join(lines).encode("gbk"))
    (folder / "c.jsonl").write_bytes(b"\n")
    for name in ("validation.jsonl", "notes.txt", "old.xlsx"):
        (folder / name).write_text("x")
    made = kit.run(kit.recipe([{"id": str(folder)}]), tmp_path / "out")
    assert made.source("mixed")["kept"] == 30
    assert {row["chosen"][0]["content"] for row in made.rows} == {row["chosen"] for row in rows}
    read = made.report["provenance"]["sources"]["mixed"]
    assert read["files"]["a.jsonl"] == {"rows": 20}
    assert read["files"]["b.csv"]["rows"] == 10
    assert "columns are separated by semicolons" in read["files"]["b.csv"]["notes"]
    assert read["files_not_read"] == ["notes.txt", "old.xlsx"]
    assert "b.csv: read as gb18030" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert said(made, "mixed: no rows in") == "mixed: no rows in c.jsonl"
    assert said(made, "mixed: not read").startswith("mixed: not read: notes.txt, old.xlsx;")


def test_a_csv_file_without_a_header_row_is_asked_for_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Two and two?,Four.,Five.\nThree?,Yes.,No.\n")
    with pytest.raises(DpoError, match="can't tell the layout") as caught:
        kit.run_file(tmp_path / "a.csv")
    assert "has this file no header?" in str(caught.value.hint)


def test_names_are_shown_as_they_are(prepared: Any, capsys: Any, monkeypatch: Any) -> None:
    """Brackets are no markup, neither on the terminal nor in the keys of the report."""
    name = "[bold]a/b[/bold] [red]中文 :smile:"
    made = prepared({"rows": [kit.pair(n) for n in range(9)]}, {"rows": {"name": name}})
    assert list(made.report["sources"]) == [name] and {row["source"] for row in made.rows} == {name}
    monkeypatch.setenv("COLUMNS", "200")
    print_markdown("\n\n".join([*summary(made.report, on_terminal=True), *examples(made.report)]))
    assert capsys.readouterr().out.count("[/bold] [red]中文 :smile:") >= 2
    assert name in json.loads((made.folder / "report.json").read_text(encoding="utf-8"))["sources"]
    assert escaped(name) in (made.folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["context", "margin", "chosen_reasoning", "lang"])
def test_a_telling_column_that_nothing_reads_is_said(name: str) -> None:
    made = kit.run_rows([{**kit.pair(n), name: "en", "id": n, "source": "web"} for n in range(9)])
    assert said(made, "rows: nothing reads").startswith(f"rows: nothing reads {name} (read as pairs)")
