"""Text as rows: JSON in its forms, and CSV. Nothing that stands in a file is passed over without a word."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from typing import Any, TextIO

from dpo_cli.prepare.feed import Broken, Feed, Row, Rows, Unreadable

ESCAPED = re.compile("[\udc80-\udcff]")  # a byte that is not of the encoding, as "surrogateescape" leaves it


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice[:40]}' stands in it twice")
    return made


def _constant(name: str) -> None:
    """NaN is a missing value, as pandas writes it."""
    if name != "NaN":
        raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _row(text: str, clean: bool) -> Any:
    bad = None if clean else ESCAPED.search(text)
    if bad:
        return Broken(f"not UTF-8: byte 0x{ord(bad[0]) - 0xDC00:02x} at column {bad.start() + 1}")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if re.match(r"\{\s*'", text):
            return Broken("a dict as Python prints it, not JSON, which json.dumps writes")
        return Broken(f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a key twice, a number of 5,000 digits, 10,000 brackets
        return Broken(str(error))


def _goes_on(line: str) -> bool:
    """Whether a line is the start of something longer."""
    try:
        _DECODER.decode(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line)
    except (ValueError, RecursionError):
        pass
    return False


AS_LINES = "write one JSON object a line, or one JSON array of them"


def json_rows(text: TextIO, feed: Feed, clean: bool) -> Rows:
    """Read JSON lines, an array, or one object with the list of rows in a key of it.

    `clean`: every byte is known to fit the encoding. Raises Unreadable where it is no JSON as a whole.
    """
    lines = ((number, line) for number, line in enumerate(text, 1) if _bare(line))
    number, first = next(lines, (0, ""))
    if not first:
        return
    if _bare(first).startswith("[") or _goes_on(_bare(first)):  # it has to be read whole
        whole = first.removeprefix("\ufeff") + text.read()
        try:
            value = _DECODER.decode(whole)
        except json.JSONDecodeError as error:
            place = f"line {number + error.lineno - 1}, column {error.colno}"
            raise Unreadable(f"not JSON: {error.msg} at {place}", AS_LINES) from error
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"not JSON: {error}", AS_LINES) from error
        yield from enumerate(_listed(value, feed), 1)
        return
    row, ahead = _row(_bare(first), clean), list(itertools.islice(lines, 1))
    if not ahead and isinstance(row, dict):
        yield from enumerate(_listed(row, feed), 1)
        return
    yield number, row
    for number, line in itertools.chain(ahead, lines):
        yield number, _row(_bare(line), clean)


def _bare(line: str) -> str:
    """A line without white space, a byte-order mark in front, or the comma of an array behind it."""
    line = line.removeprefix("\ufeff").strip()
    return line[:-1] if line.endswith("},") else line


A_ROW_HAS = {"prompt", "question", "query", "instruction", "messages", "conversations", "context", "chosen", "winner"}


def _listed(value: Any, feed: Feed) -> list[Any]:
    """The rows of a JSON value: its elements, or the list of objects in a key of it, or it alone."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    if A_ROW_HAS & value.keys():
        if _by_column(list(value.values())):
            hint = "with pandas: to_json(…, orient='records', lines=True, force_ascii=False)"
            raise Unreadable("it is one JSON object with a list or map for each column", hint)
        return [value]
    lists = {key: one for key, one in value.items() if isinstance(one, list) and one and _may_be_row(one[0])}
    if len(lists) > 1:
        counted = ", ".join(f"{key} ({len(one):,})" for key, one in lists.items())
        raise Unreadable(f"it is one JSON object with lists of rows under {counted}", "make a file of each")
    for key, rows in lists.items():
        feed.note(f"one JSON object, whose key {key} holds the rows")
        return rows
    return [value]


def _may_be_row(value: Any) -> bool:
    return isinstance(value, dict) and "role" not in value and "from" not in value


def _by_column(columns: list[Any]) -> bool:
    """Whether these are columns of texts or maps of row numbers: what pandas writes unless told otherwise."""
    maps = all(isinstance(one, dict) and "0" in one for one in columns)
    return maps or all(isinstance(one, list) and one and not isinstance(one[0], dict) for one in columns)


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def csv_rows(text: TextIO, feed: Feed) -> Rows:
    """Read CSV whose first row names the columns; the separator is the one that the header has most of.

    Raises:
        Unreadable: a quote isn't closed, or two columns have one name.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    first = text.readline()
    bare = re.sub(r'"[^"]*"', "", first)
    separator = max(SEPARATORS, key=bare.count)  # of none at all, the comma
    if separator != ",":
        feed.note(f"columns are separated by {SEPARATORS[separator]}")
    reader = csv.reader(itertools.chain([first], text), delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _quote(start, f" ({error})") from error
        if not fields:
            continue
        if header is None:
            header = _header(fields)
            continue
        if len(fields) != len(header) and reader.line_num > start:
            raise _quote(start, f": it would run to line {reader.line_num}")
        if _swallowed(fields, separator, len(header)):
            raise _quote(start, f": whole rows stand inside a field up to line {reader.line_num}")
        yield start, _csv_row(header, fields)


def _quote(line: int, more: str) -> Unreadable:
    hint = 'a text with a quote in it is written "like ""this"" one"; a program that writes CSV does so'
    return Unreadable(f"a quote in the row at line {line} is not closed, or stands where none may{more}", hint)


def _header(fields: list[str]) -> list[str]:
    header = [name.strip().removeprefix("\ufeff") for name in fields]
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
