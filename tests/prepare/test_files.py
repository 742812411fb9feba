"""Files of every kind that people have: read exactly, or named for what they are; no row lost unseen."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pytest
from dpo_cli.errors import DpoError
from dpo_cli.prepare.feed import Broken
from dpo_cli.prepare.files import file_feed
from dpo_cli.prepare.sources import left_out, local_files
from tests.prepare import kit

Rows = list[dict[str, Any]]

CHINESE = "请问，怎么在春天种花草树木？先看看土壤的湿度，再一步一步地做，这样可以用很多年；“不知道”——随便吧。"
TRADITIONAL = "請問，怎麼在春天種花草樹木？先看看土壤的濕度，再一步一步地做，這樣可以用很多年。"
FRENCH = "Où est passé le garçon très âgé qui déjeunait à l'hôtel, près de la forêt, où il mangeait des œufs ?"
RUSSIAN = "Расскажите о двигателе в порту и о том, как он работает каждый день."
JAPANESE = "これは何ですか。港のエンジンについて教えてください。カタカナもあります。"
KOREAN = "이것은 무엇입니까? 항구의 엔진에 대해 알려주세요. 고맙습니다."


def rows_of(text: str, count: int = 30) -> Rows:
    return [
        {"prompt": f"{number}: {text[:20]}", "chosen": f"{text} {number}", "rejected": text[::-1]}
        for number in range(count)
    ]


def lines(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows: Rows, separator: str = ",") -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read(path: Path) -> tuple[list[Any], list[str]]:
    """The rows of a file, without their numbers, and what reading noted."""
    feed = file_feed(path.name, path)
    found = [row for _, row in feed.rows()]
    assert feed.count == len(found)
    return found, feed.notes


def reading(folder: Path, name: str, data: bytes | str) -> tuple[list[Any], list[str]]:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read(path)


ENCODED = [
    (CHINESE, "gbk", "gb18030"), (CHINESE, "utf-16", "utf-16"), (TRADITIONAL, "big5", "big5"),
    (TRADITIONAL, "gbk", "gb18030"), (FRENCH, "cp1252", "cp1252"),
    (RUSSIAN, "cp1251", "cp1251"), (JAPANESE, "shift_jis", "cp932"), (KOREAN, "euc_kr", "cp949"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "encoding", "said"), ENCODED)
def test_other_encodings_come_out_exact_and_are_said(tmp_path: Path, text: str, encoding: str, said: str) -> None:
    rows = rows_of(text)
    written = {"a.csv": as_csv(rows), "a.jsonl": lines(rows), "a.json": json.dumps(rows, ensure_ascii=False, indent=1)}
    for name, content in written.items():
        found, notes = reading(tmp_path, name, content.encode(encoding))
        assert found == rows, name
        assert any(f"read as {said}" in note for note in notes), name


def test_utf8_with_a_mark_is_plain_utf8(tmp_path: Path) -> None:
    rows = rows_of(CHINESE)
    assert reading(tmp_path, "a.csv", as_csv(rows).encode("utf-8-sig")) == (rows, [])
    marked = "".join("\ufeff" + line for line in lines(rows).splitlines(keepends=True))
    assert reading(tmp_path, "a.jsonl", marked) == (rows, [])


def test_an_encoding_far_down_is_seen(tmp_path: Path) -> None:
    """More than a megabyte of ASCII in front of the first Chinese character."""
    rows = rows_of("plain words and nothing else " * 20, 2000) + rows_of(CHINESE)
    text = lines(rows)
    assert text.index("请") > 2**20
    assert reading(tmp_path, "a.jsonl", text.encode("gbk"))[0] == rows
    assert reading(tmp_path, "b.jsonl", text)[0] == rows


def test_too_little_text_to_tell_an_encoding_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DpoError, match=r"it is not UTF-8 but looks like .*gb18030") as caught:
        reading(tmp_path, "a.jsonl", lines(rows_of("Say 你好 to the 港口")).encode("gbk"))
    assert "UTF-8" in str(caught.value.hint)


def test_one_bad_byte_costs_one_row(tmp_path: Path) -> None:
    rows = rows_of(CHINESE)
    bad = [line.encode() for line in lines(rows).splitlines(keepends=True)]
    bad[6] = bad[6].replace(b"6: ", b"6: \xe9 ")
    found, _ = reading(tmp_path, "a.jsonl", b"".join(bad))
    assert found[:6] + found[7:] == rows[:6] + rows[7:]
    assert found[6] == Broken("not UTF-8: byte 0xe9 at column 16")
    table = as_csv(rows).encode().replace(b"6: ", b"6: \xe9 ", 1)
    found, _ = reading(tmp_path, "a.csv", table)
    assert found[:6] + found[7:] == rows[:6] + rows[7:]
    assert found[6] == Broken("column prompt is not UTF-8: byte 0xe9")


def test_a_value_of_parquet_that_python_has_not_costs_one_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array([b"good", b"b\xe9d", b"fine", b"late"]).view(pa.string())
    dates = pa.array([0, 0, 0, 2**31 - 1], pa.date32())
    pq.write_table(pa.table({"prompt": ["a", "b", "c", "d"], "chosen": texts, "when": dates}), tmp_path / "a.parquet")
    numbers, found = zip(*file_feed("a", tmp_path / "a.parquet").rows(), strict=True)
    assert numbers == (1, 2, 3, 4)
    assert [isinstance(row, dict) and row["chosen"] for row in found] == ["good", False, "fine", False]
    assert isinstance(found[1], Broken) and "can't decode byte 0xe9" in found[1].detail


@pytest.mark.parametrize(("separator", "end"), [(",", "\n"), (";", "\r\n"), ("\t", "\r"), ("|", "\n")])
def test_separators_are_seen_in_the_header(tmp_path: Path, separator: str, end: str) -> None:
    """Quotes, separators and line breaks inside a text are the text's."""
    rows = rows_of('He said: "a; b, c | d\te"' + end + "and more")
    found, notes = reading(tmp_path, "a.csv", as_csv(rows, separator).replace("\r\n", end))
    assert found == [{name: value.replace("\r\n", end) for name, value in row.items()} for row in rows]
    assert bool(notes) == (separator != ",")


BAD_QUOTES = {
    "never closed": (2, lambda row: ['"' + row[0], *row[1:]]),
    "text behind a quote": (2, lambda row: ['"' + row[0] + '" more', *row[1:]]),
    "escaped with a backslash": (2, lambda row: ['"' + row[0] + '\\" a", b"', *row[1:]]),
}


@pytest.mark.parametrize("kind", BAD_QUOTES)
def test_a_stray_quote_is_an_error_with_its_line(tmp_path: Path, kind: str) -> None:
    """Read loosely, it swallows the rows up to the next quote."""
    table = [["prompt", "chosen", "rejected"], *([f"p{n}", f"c{n}", f"r{n}"] for n in range(200))]
    table[100] = BAD_QUOTES[kind][1](table[100])
    text = "\n".join(map(",".join, table)) + "\n"
    with pytest.raises(DpoError, match="a quote in the row at line 101 is not closed") as caught:
        reading(tmp_path, "a.csv", text)
    assert caught.value.hint and '""' in caught.value.hint


@pytest.mark.parametrize("closing", [0, 1, 2])
def test_two_stray_quotes_do_not_swallow_the_rows_between(tmp_path: Path, closing: int) -> None:
    table = [["prompt", "chosen", "rejected"], *([f"p{n}", f"c{n}", f"r{n}"] for n in range(200))]
    table[100][2 - closing] = '"' + table[100][2 - closing]
    table[150][closing] += '"'
    with pytest.raises(DpoError, match="a quote in the row at line 101 is not closed"):
        reading(tmp_path, "a.csv", "\n".join(map(",".join, table)) + "\n")


def test_quotes_in_the_middle_of_a_text_are_text(tmp_path: Path) -> None:
    found, _ = reading(tmp_path, "a.csv", 'prompt,chosen,rejected\nA 5" disk,"say ""hi""",it\'s\n')
    assert found == [{"prompt": 'A 5" disk', "chosen": 'say "hi"', "rejected": "it's"}]


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DpoError, match="two of its columns are called 'chosen'"):
        reading(tmp_path, "a.csv", "prompt,chosen,chosen\na,b,c\n")


def test_rows_of_another_width_are_broken_and_counted(tmp_path: Path) -> None:
    found, _ = reading(tmp_path, "a.csv", "prompt,chosen,rejected,\na,b,c,\na,b\n\na,b,c,d,e\n")
    assert found == [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        Broken("2 fields where the header has 4"),
        Broken("5 fields where the header has 4"),
    ]


ROWS = rows_of(CHINESE, 5)
JSON_FORMS = {
    "lines": lines(ROWS),
    "an array": json.dumps(ROWS),
    "a pretty array": json.dumps(ROWS, indent=2),
    "lines that end in commas": "".join(json.dumps(row) + ",\n" for row in ROWS[:-1]) + json.dumps(ROWS[-1]),
    "an array with a row a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "old line ends": "\r".join(map(json.dumps, ROWS)),
    "Windows line ends": lines(ROWS).replace("\n", "\r\n"),
    "in a key": json.dumps({"version": 1, "data": ROWS}),
    "in a key of one's own": json.dumps({"preferences": ROWS}, indent=1),
}


@pytest.mark.parametrize("form", JSON_FORMS)
def test_forms_of_json(tmp_path: Path, form: str) -> None:
    """Whatever the file is called."""
    for name in ("a.json", "a.jsonl", "a.csv"):
        assert reading(tmp_path, name, JSON_FORMS[form])[0] == ROWS


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": True},
        {"instruction": "q", "completions": [{"response": "a"}, {"response": "b"}]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"value": "a"}, "rejected": {"value": "b"}},
    ],
)
def test_a_lone_row_with_a_list_in_it_is_a_row(tmp_path: Path, row: dict[str, Any]) -> None:
    for indent in (None, 2):
        assert reading(tmp_path, "a.json", json.dumps(row, indent=indent))[0] == [row]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({"train": ROWS, "test": ROWS, "data": ROWS}), r"lists of rows under train \(5\)"),
        (json.dumps({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]}), "each column"),
        (json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}), "each column"),
        (json.dumps(ROWS, indent=1)[:-20], "not JSON: .* at line 2"),
        ("[{]", "not JSON: .* at line 1"),
    ],
)
def test_json_without_rows_says_why(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DpoError, match=said):
        reading(tmp_path, "a.json", text)


@pytest.mark.parametrize(
    ("line", "said", "at"),
    [
        ('{"prompt": "q", "chosen": "a", "chosen": "b", "rejected": "c"}', "'chosen' stands in it twice", 0),
        ('{"prompt": "q", "turn": {"role": 1, "role": 1}}', "'role' stands in it twice", 3),
        ("{'prompt': 'q', 'chosen': None}", "a dict as Python prints it, not JSON", 0),
        ('{"prompt": "q", "score_chosen": Infinity}', "Infinity is no JSON number", 3),
        ('{"prompt": "q", "chosen": "a"', "not JSON: Expecting ',' delimiter at column 30", 3),
    ],
)
def test_a_broken_line_is_one_broken_row(tmp_path: Path, line: str, said: str, at: int) -> None:
    rows = [{**row, "rejected": row["rejected"] + "\u2028 a line of its own, to some"} for row in ROWS]
    written = lines(rows).split("\n")
    written.insert(at, line)
    found, _ = reading(tmp_path, "a.jsonl", "\n".join(written))
    assert found[:at] + found[at + 1 :] == rows
    assert isinstance(found[at], Broken) and said in found[at].detail


def test_nan_is_a_missing_value(tmp_path: Path) -> None:
    found, _ = reading(tmp_path, "a.jsonl", '{"prompt": "q", "system": NaN}\n{"prompt": "r"}\n')
    assert found == [{"prompt": "q", "system": None}, {"prompt": "r"}]


def test_numbers_of_rows_are_those_of_an_editor(tmp_path: Path) -> None:
    def numbers(name: str, text: str) -> list[int]:
        (tmp_path / name).write_text(text)
        return [number for number, _ in file_feed(name, tmp_path / name).rows()]

    assert numbers("a.jsonl", '\n{"a": 1}\n\n{"a": 2}\n') == [2, 4]
    assert numbers("a.csv", 'a,b\n1,"x\ny"\n\n2,z\n') == [2, 5]
    assert numbers("a.json", '[{"a": 1},\n\n{"a": 2}]') == [1, 2]


def test_rows_of_tables_are_numbered_through(tmp_path: Path) -> None:
    from datasets import Dataset

    table = Dataset.from_list([{"a": 1}] * 600)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "a.parquet", batch_size=250)
    for path in (*tmp_path.glob("saved/*.arrow"), tmp_path / "a.parquet"):
        assert [number for number, _ in file_feed("a", path).rows()] == list(range(1, 601))


def test_a_hub_set_is_read_at_the_commit_of_its_revision(hub: list[Any], tmp_path: Path) -> None:
    made = kit.run(kit.recipe([{"id": "me/pairs", "revision": "v1", "split": "train_prefs"}]), tmp_path / "out")
    assert made.source("pairs")["in"] == 20
    assert hub == [("me/pairs", {"data_files": None, "split": "train_prefs", "revision": "commit-v1"})]
    assert made.prepared.revisions == {"me/pairs": "commit-v1"}


def test_compressed_files(tmp_path: Path) -> None:
    import pyarrow as pa

    data = lines(ROWS).encode()
    packed = {"gz": gzip.compress(data), "bz2": bz2.compress(data), "xz": lzma.compress(data)}
    packed["zst"] = pa.compress(data, "zstd", asbytes=True)
    for suffix, content in packed.items():
        assert reading(tmp_path, f"a.jsonl.{suffix}", content)[0] == ROWS, suffix
    assert reading(tmp_path, "a.csv.gz", gzip.compress(as_csv(ROWS, ";").encode()))[0] == ROWS
    assert reading(tmp_path, "a.jsonl", gzip.compress(data))[0] == ROWS  # whatever it is called


def zipped(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "said", "hint"),
    [
        ("a.csv", zipped("[Content_Types].xml", "xl/workbook.xml"), "an Excel workbook", "CSV UTF-8"),
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "an Excel or Word file", "CSV UTF-8"),
        ("a.zip", zipped("train.jsonl", "test.jsonl"), "a ZIP file", "unpack it"),
        ("a.jsonl.gz", gzip.compress(bytes(257) + b"ustar" + bytes(99), mtime=0), "a tar archive", "unpack it"),
        ("a.jsonl", "Hello, world.".encode("utf-16-le"), "neither text .*UTF-16 without its mark", "save it as UTF-8"),
        ("a.pkl", b"\x80\x04\x95", "a Python pickle", "JSON lines"),
        ("a.pdf", b"%PDF-1.7", "a PDF", "data themselves"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer", "git lfs pull"),
        ("a.parquet", b"<!DOCTYPE html>\n<html>", "a web page", "resolve"),
    ],
)
def test_what_holds_no_rows_is_named_with_the_way_on(
    tmp_path: Path, name: str, data: bytes, said: str, hint: str
) -> None:
    with pytest.raises(DpoError, match=f"can't read {name}: it is {said}") as caught:
        reading(tmp_path, name, data)
    assert hint in str(caught.value.hint)


def files(folder: Path, **source: Any) -> list[str]:
    return sorted(local_files(kit.recipe([{"id": str(folder), **source}]), 0))


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = rows_of(CHINESE, 700)
    Dataset.from_list(rows).save_to_disk(tmp_path / "one", num_shards=3)
    Dataset.from_list(rows[:3]).to_parquet(tmp_path / "one" / "cache-0123.parquet")
    sets = {"train": Dataset.from_list(rows), "test_prefs": Dataset.from_list(rows[:50]).shuffle(seed=1)}
    DatasetDict(sets).save_to_disk(tmp_path / "two")
    for folder, source, count in (("one", {}, 700), ("two", {}, 700), ("two", {"split": "test_prefs"}, 50)):
        made = kit.recipe([{"id": str(tmp_path / folder), **source}])
        found = [row for path in local_files(made, 0).values() for row in read(path)[0]]
        assert len(found) == count and all(row in rows for row in found[:5]), folder
    assert found != rows[:50], "in the order of the shuffle"
    with pytest.raises(DpoError, match="written by save_to_disk and has no split dev") as caught:
        files(tmp_path / "two", split="dev")
    assert "test_prefs, train" in str(caught.value.hint)


def test_a_folder_says_what_of_it_is_not_read(tmp_path: Path) -> None:
    """Hidden files are none of it, such as those that a Mac puts beside each file of a stick."""
    for name in ("train.jsonl", "._train.jsonl", "more.csv", "test.jsonl", "sheet.xlsx", "README.md", "state.json"):
        (tmp_path / name).write_text("x")
    made = kit.recipe([{"id": str(tmp_path)}])
    assert files(tmp_path) == ["train.jsonl"]
    assert left_out(made, 0) == ["more.csv", "sheet.xlsx"]


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "sheet.xlsx").write_text("x")
    with pytest.raises(DpoError, match="no data files") as caught:
        files(tmp_path)
    assert "sheet.xlsx" in str(caught.value.hint)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    import os

    odd = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    rows = [kit.pair(n) for n in range(9)]
    with open(odd, "w", encoding="utf-8") as file:
        file.write(lines(rows))
    made = kit.run(kit.recipe([{"id": str(tmp_path)}]), tmp_path / "out")
    assert list(made.prepared.inputs) == [f"{tmp_path.name}/caf\\xe9.jsonl"]
