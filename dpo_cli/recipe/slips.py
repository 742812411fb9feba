"""What a slip of the hand was meant to be: a line that is no YAML, or a word where a list or a number belongs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

Slip = tuple[str, str, int]  # what is wrong, how to fix it, and the line to show, counted from 0


def yaml_slip(lines: Sequence[str], error: yaml.MarkedYAMLError) -> Slip | None:
    """What is usually wrong where the YAML reader gives up; None where it says that itself."""
    mark, what = error.problem_mark or error.context_mark, error.problem or ""
    if mark is None:
        return None
    opened = error.context_mark.line if error.context_mark else mark.line
    if "end of stream" in what or "<stream end>" in what or what.startswith("expected ',' or"):
        return "a quote or a bracket is not closed, or a comma is missing", "close it", opened
    if what == "could not find expected ':'":
        return "no colon follows the key", "write : and a space", opened
    if "no plain space" in what:
        return what, "indent by plain spaces", mark.line
    number = min(mark.line, len(lines) - 1)
    before = next((one for one in range(number - 1, -1, -1) if lines[one].split("#")[0].strip()), number)
    if "\t" in lines[number][: mark.column + 1]:
        return "there is a tab where spaces belong", "replace it by spaces", number
    indented = "the line is indented otherwise than those above it", "indent the keys of a section alike", number
    if what.startswith("expected <block end>"):
        return indented
    if what != "mapping values are not allowed here":
        return None
    for one in (number, before):
        if "：" in lines[one]:
            return "：is a Chinese colon, which YAML takes for text", "write : and a space", one
    if before < number and re.fullmatch(r"[\s-]*[\w.]+:[^\s/].*", lines[before]):
        return "no space follows the colon", "write : and a space", before
    if before < number and ":" not in lines[before]:
        return "no colon follows the key", "write : and a space", before
    if before < number and _indent(lines[number]) > _indent(lines[before]):
        return indented
    return "a text has a colon in it", "put the text in quotes", number


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def number_meant(text: Any) -> str | None:
    """The number that `70%`, `7.5k` and `0,5` mean."""
    match = re.fullmatch(r"\s*(\d+(?:[.,]\d+)?)\s*([%kKmM]?)\s*", text) if isinstance(text, str) else None
    if match is None or text.isdigit():
        return None
    factor = {"%": 0.01, "k": 1e3, "m": 1e6, "": 1.0}[match[2].lower()]
    return f"{float(match[1].replace(',', '.')) * factor:g}"


def one_as_list(value: Any) -> Any:
    """So that a list of one may be written as that one."""
    return [value] if isinstance(value, str | int | float) else value


def words(value: Any) -> Any:
    """So that a list of words may be written with commas, as on a command line."""
    return [one.strip() for one in value.split(",")] if isinstance(value, str) else value


def layers(value: Any) -> Any:
    """The same of LoRA's layers, and all of them as PEFT and LLaMA-Factory call them."""
    named = words(value)
    return "auto" if named in (["auto"], ["all-linear"], ["all"]) else named


def language_problem(code: Any) -> str | None:
    """What is wrong with the name of a language that is no code, as `English`."""
    if not isinstance(code, str) or re.fullmatch("[a-z]{2,3}([-_][A-Za-z]+)?", code):
        return None
    return f"must be the code of a language, such as en or zh, not {code[:40]}"
