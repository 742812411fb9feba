"""Text as rows: JSON in its forms, and CSV. Nothing that stands in a file is passed over without a word."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from dpo_cli.prepare.encoding import ESCAPED
from dpo_cli.prepare.feed import Broken, Feed, Row, Rows, Unreadable

_BETWEEN = re.compile(r"[\s,]*")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice[:40]}' stands in it twice")
    return made


class _Json:
    """JSON as Python writes it: NaN is a missing value, which is noted; a repeated key is an error."""

    def __init__(self, feed: Feed, clean: bool) -> None:
        self.feed, self.clean = feed, clean
        self._decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=self._constant)

    def _constant(self, name: str) -> None:
        if name != "NaN":
            raise ValueError(f"{name} is no JSON number")
        self.feed.note("NaN is read as a missing value")

    def row(self, text: str) -> Any:
        bad = None if self.clean else ESCAPED.search(text)
        if bad:
            return Broken(f"not UTF-8: byte 0x{ord(bad[0]) - 0xDC00:02x} at column {bad.start() + 1}")
        try:
            return self._decoder.decode(text)
        except json.JSONDecodeError as error:
            if re.match(r"\{\s*'", text):
                return Broken("a dict as Python prints it, not JSON, which json.dumps writes")
            return Broken(f"not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # a key twice, a number of 5,000 digits, 10,000 brackets
            return Broken(str(error))

    def is_part(self, line: str) -> bool:
        """Whether a line is the start of something longer, or holds several values."""
        try:
            self._decoder.decode(line)
        except json.JSONDecodeError as error:
            return error.pos >= len(line) or error.msg == "Extra data"
        except (ValueError, RecursionError):
            pass
        return False

    def values(self, text: str) -> Iterator[Any]:
        """Values one after the other, with white space or commas between them."""
        end = _BETWEEN.match(text).end()  # type: ignore[union-attr]  # it matches everywhere
        while end < len(text):
            value, end = self._decoder.raw_decode(text, end)
            yield value
            end = _BETWEEN.match(text, end).end()  # type: ignore[union-attr]


AS_LINES = "write one JSON object a line, or one JSON array of them"


def json_rows(text: TextIO, feed: Feed, clean: bool) -> Rows:
    """Read JSON lines, an array, objects over several lines, or one object with the list of rows in a key of it.

    `clean`: every byte is known to fit the encoding. Raises Unreadable where it is no JSON as a whole.
    """
    reader = _Json(feed, clean)
    numbered = enumerate(text, 1)
    number, first = next(((number, line) for number, line in numbered if _bare(line)), (0, ""))
    if not first:
        return
    whole: str | None = None
    if _bare(first).startswith("[") or reader.is_part(_bare(first)):  # it has to be read whole
        whole = first.removeprefix("\ufeff") + text.read()
        try:
            values = list(reader.values(whole))
        except (ValueError, RecursionError) as error:
            lines = whole.split("\n")  # not where U+2028 stands in a text
            if whole.lstrip().startswith("[") or not any(isinstance(reader.row(one), dict) for one in lines[1:20]):
                why = str(error)
                if isinstance(error, json.JSONDecodeError):
                    why = f"{error.msg} at line {number + error.lineno - 1}, column {error.colno}"
                raise Unreadable(f"not JSON: {why}", AS_LINES) from error
        else:
            if not whole.lstrip().startswith("["):
                feed.note("JSON objects over several lines")
            yield from _document(values, feed)
            return
    rest = numbered if whole is None else enumerate(whole.split("\n")[1:], number + 1)  # JSON lines, the first broken
    row = reader.row(_bare(first))
    second = next(((number, line) for number, line in rest if _bare(line)), None)
    if second is None and isinstance(row, dict):
        yield from _document([row], feed)
        return
    yield number, row
    commas = False
    for number, line in itertools.chain([second] if second else [], rest):
        bare = _bare(line)
        if bare:
            yield number, reader.row(bare)
            commas = commas or line.rstrip().endswith("},")
    if commas:
        feed.note("its lines end in commas")


def _bare(line: str) -> str:
    """A line without white space, a byte-order mark in front, or the comma of an array behind it."""
    line = line.removeprefix("\ufeff").strip()
    return line[:-1] if line.endswith("},") else line


LISTS = ("data", "rows", "examples", "instances", "train", "items", "records", "samples", "dataset", "pairs")
A_ROW_HAS = {"prompt", "question", "instruction", "messages", "conversations", "context", "chosen", "completion"}
KNOWN_COLUMNS = A_ROW_HAS | {"rejected", "label"}


def _document(values: list[Any], feed: Feed) -> Rows:
    if len(values) == 1 and isinstance(values[0], dict):
        lists = dict(_lists(values[0], ""))
        if len(lists) > 1:
            counted = ", ".join(f"{key} ({len(one):,})" for key, one in lists.items())
            raise Unreadable(f"it is one JSON object with lists of rows under {counted}", "make a file of each")
        for key, one in lists.items():
            feed.note(f"one JSON object, whose key {key} holds the rows")
            served = all("row_idx" in row and isinstance(row.get("row"), dict) for row in one)  # by the Hub's viewer
            values = [row["row"] for row in one] if served else one
        inner = list(values[0].values()) if not lists else []
        if len(inner) > 1 and all(isinstance(one, dict) and A_ROW_HAS & one.keys() for one in inner):
            feed.note("one JSON object with a row a key")
            values = inner
        elif not lists and _by_column(values[0]):
            hint = "with pandas: to_json(…, orient='records', lines=True, force_ascii=False)"
            raise Unreadable("it is one JSON object with a list or map for each column", hint)
    rows = itertools.chain.from_iterable(one if isinstance(one, list) else [one] for one in values)
    yield from enumerate(rows, 1)


def _lists(value: dict[str, Any], path: str) -> Iterator[tuple[str, list[Any]]]:
    for key, one in value.items():
        if isinstance(one, list) and one and all(isinstance(row, dict) for row in one):
            if (key.lower() in LISTS and not A_ROW_HAS & value.keys()) or A_ROW_HAS & one[0].keys():
                yield path + key, one
        elif isinstance(one, dict) and not path.count("."):
            yield from _lists(one, f"{path}{key}.")


def _by_column(value: dict[str, Any]) -> bool:
    """Lists of one length, or maps of row numbers, under names of columns: what pandas writes unless told otherwise."""
    if not A_ROW_HAS & value.keys() or len(value) < 2:
        return False
    columns = list(value.values())
    if all(isinstance(one, dict) and one and all(key.isdigit() for key in one) for one in columns):
        return True
    texts = all(isinstance(one, list) and one and not isinstance(one[0], dict) for one in columns)
    return texts and len({len(one) for one in columns}) == 1


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_NUMBERS = re.compile("score|rating|reward|rank|margin", re.IGNORECASE)  # in the names of columns that hold numbers
_DECIMAL_COMMA = re.compile(r"\s*-?\d+,\d+\s*")
LONGEST_NAME = 80  # of a column; a longer one is a text in a file without a header row


def csv_rows(text: TextIO, feed: Feed, tabs: bool = False) -> Rows:
    """Read CSV whose first row names the columns; the separator is the one that the header has most of.

    Raises:
        Unreadable: a quote isn't closed, two columns have one name, or the first row looks like data.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    first, before = text.readline(), 0
    declared = re.fullmatch(r'"?sep=(.)"?\s*', first)  # Excel's own way of saying it
    if declared:
        first, before = text.readline(), 1
    bare = re.sub(r'"[^"]*"', "", first)
    separator = declared[1] if declared else max(SEPARATORS, key=lambda one: (bare.count(one), one == ","))
    if separator not in bare:  # some other sign between names that are known
        others = re.findall(r"(?<=\w)[^\w\s\"'-](?=\w)", bare)
        names = {part.strip().lower() for sign in set(others) for part in bare.split(sign)}
        separator = max(others, key=others.count) if len(names & KNOWN_COLUMNS) > 1 else separator
    separator = "\t" if tabs and not declared and "\t" in first else separator
    if separator != ("\t" if tabs else ",") and separator in first:
        feed.note(f"columns are separated by {SEPARATORS.get(separator, separator)}")
    reader = csv.reader(itertools.chain([first], text), delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + before + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _quote(start, f" ({error})") from error
        end = reader.line_num + before
        if not fields:
            continue
        if header is None:
            header = _header(fields)
            continue
        if len(fields) != len(header) and end > start:
            raise _quote(start, f": it would run to line {end}")
        if _swallowed(fields, separator, len(header)):
            raise _quote(start, f": whole rows stand inside a field up to line {end}")
        row = _csv_row(header, fields)
        if separator != "," and isinstance(row, dict):
            for name in filter(_NUMBERS.search, header):
                if _DECIMAL_COMMA.fullmatch(row.get(name, "")):
                    row[name] = row[name].replace(",", ".")
                    feed.note("decimal commas of scores are read as points")
        yield start, row


def _quote(line: int, more: str) -> Unreadable:
    hint = 'a text with a quote in it is written "like ""this"" one"; a program that writes CSV does so'
    return Unreadable(f"a quote in the row at line {line} is not closed, or stands where none may{more}", hint)


def _header(fields: list[str]) -> list[str]:
    header = [name.strip().removeprefix("\ufeff") for name in fields]
    if fields[0].lstrip().startswith(("{", "[{")):
        raise Unreadable("it is JSON under the name of CSV", "rename it to .jsonl")
    long = next((name for name in header if len(name) > LONGEST_NAME or "\n" in name), None)
    if long is not None:
        raise Unreadable(
            f"its first row names no columns ('{long[:40]}…'): no header row?",
            "put the names of the columns into the first line, such as prompt,chosen,rejected",
        )
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise Unreadable(f"two of its columns are called '{twice}'", "give each column a name of its own")
    return header


def _swallowed(fields: list[str], separator: str, columns: int) -> bool:
    """Whether a field holds rows: between two quotes too many, each line within has as many separators as a row."""
    inner = (value.split("\n")[1:-1] for value in fields)
    full = (len(lines) >= 3 and all(line.count(separator) == columns - 1 for line in lines) for lines in inner)
    return columns > 1 and any(full)


def _csv_row(header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        return Broken(f"{len(fields)} fields where the header has {len(header)}")
    row = dict(zip(header, fields, strict=True))
    for name, value in row.items():
        bad = None if value.isascii() else ESCAPED.search(value)
        if bad:
            return Broken(f"column {name} is not UTF-8: byte 0x{ord(bad[0]) - 0xDC00:02x}")
    if not row.get("", "-"):  # a separator at the end of each line
        del row[""]
    return row
