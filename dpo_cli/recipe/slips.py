"""What a slip of the hand was meant to be: a line that is no YAML, or a value where a section or a number belongs."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import yaml

Slip = tuple[str, str, int]  # what is wrong, how to fix it, and the line to show, counted from 0


def yaml_slip(lines: Sequence[str], error: yaml.MarkedYAMLError) -> Slip | None:
    """What is usually wrong where the YAML reader gives up; None where it says that itself."""
    mark, what = error.problem_mark or error.context_mark, error.problem or ""
    if mark is None:
        return None
    if "end of stream" in what or "<stream end>" in what:
        opened = error.context_mark.line if error.context_mark else mark.line
        return "a quote or a bracket is not closed", "close it", opened
    if what.startswith("expected ',' or") and error.context_mark:
        return "a bracket is not closed, or a comma is missing", "close it", error.context_mark.line
    if what == "could not find expected ':'" and error.context_mark:
        return "no colon follows the key", "write : and a space", error.context_mark.line
    number = min(mark.line, len(lines) - 1)
    indent = _indent(lines[number])
    before = next((one for one in range(number - 1, -1, -1) if lines[one].split("#")[0].strip()), number)
    above = lines[before]
    if "\t" in indent:
        return "the line is indented by a tab", "indent by spaces: YAML takes no tabs there", number
    if "no plain space" in what:
        return what, "indent by plain spaces", number
    if "'\\t' that cannot start" in what:
        return "there is a tab where a space belongs", "replace it by a space", number
    if what.startswith("expected <block end>"):
        return "the line is indented otherwise than those above it", "check the indentation of both", number
    if what != "mapping values are not allowed here":
        return None
    wide = next((one for one in (number, before) if "：" in lines[one]), None)
    if wide is not None:
        return "：is a Chinese colon, which YAML takes for text", "write : and a space", wide
    if before < number and re.fullmatch(r"[\s-]*[\w.]+:[^\s/].*", above):
        return "no space follows the colon", "write : and a space", before
    if before < number and ":" not in above:
        return "no colon follows the key", "write : and a space", before
    if before < number and len(indent) > len(_indent(above)):
        return "the line is indented further than the one above it", "indent the keys of a section alike", number
    return "a text has a colon in it", "put the text in quotes", number


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


# What stands where a section belongs is taken for this: by the section's name, the kind of value, and what to write.
_SECTIONS: tuple[tuple[str, type | tuple[type, ...], str], ...] = (
    ("model", str, "model: {{id: {}}}"),
    ("data", (str, list), "data: {{sources: {}}}"),
    ("train", str, "train: {{method: {}}}"),
    ("lora", int, "lora: {{r: {}}}"),
    ("export", (str, list), "export: {{formats: {}}}"),
    ("judge", str, "judge: {{kind: reward_model, id: {0}}}, or {{kind: openai, base_url: …, model: {0}}}"),
    ("rater", str, "rater: {{kind: reward_model, id: {0}}}, or {{kind: openai, base_url: …, model: {0}}}"),
    ("sample", int, "sample: {{answers: {}}}"),
    ("early_stopping", bool, "early_stopping: {{patience: 3}}"),
    ("early_stopping", int, "early_stopping: {{patience: {}}}"),
    ("filters", list, "a reason and what is to become of it, such as {{short: false}}"),
)


def instead(name: str, given: Any, shown: str, known: Collection[str]) -> str:
    """`: write …` for a value of the wrong kind, or nothing.

    Args:
        name: the last part of the key.
        shown: the value as JSON.
        known: the keys of the section that belongs there, if one does.
    """
    glued = re.match(r"([A-Za-z_]\w*)\s*[:=：]\s*(.*)", given) if isinstance(given, str) else None
    if glued and glued[1] in known:
        return f": write {glued[1]}: {glued[2][:60]}, with a space behind the colon"
    for section, kind, text in _SECTIONS if known else ():
        if name == section and isinstance(given, kind):
            return f": write {text.format(shown)}"
    number = _number(given) if isinstance(given, str) and not known else None
    return f": write {number:g}" if number is not None else ""


def _number(text: str) -> float | None:
    """What `70%`, `7.5k` and `0,5` mean."""
    match = re.fullmatch(r"\s*(\d+(?:[.,]\d+)?)\s*([%kKmM]?)\s*", text)
    factor = {"%": 0.01, "k": 1e3, "m": 1e6, "": 1.0}
    return float(match[1].replace(",", ".")) * factor[match[2].lower()] if match and not text.isdigit() else None


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


def shares_of_one(shares: Any) -> str | None:
    """What is wrong with shares written as a list, as percent or as a ratio, and the shares that are meant."""
    if isinstance(shares, str):
        shares = [shares]
    if isinstance(shares, list) and shares and all(isinstance(one, str) for one in shares):
        return f"must give each language its share: {_shares(dict.fromkeys(shares, 1.0))}"
    if not isinstance(shares, dict) or not shares:
        return None
    numbers = {name: _percent(share) for name, share in shares.items()}
    whole = sum(numbers.values())
    if any(not 0 < one < 1e9 for one in numbers.values()):
        return None
    if whole < 1.5 and set(numbers.values()) == set(shares.values()):  # no percent sign, and no ratio
        return None
    percent = " percent" if 99 <= whole <= 101 else " a ratio"
    return f"must be shares of 1, not{percent}: {_shares(numbers)}"


def _percent(share: Any) -> float:
    """A share as a number, that of `70%` being 70; -1 where it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", share) if isinstance(share, str) else None
    return float(match[1] if match else share if type(share) in (int, float) else -1)


def _shares(numbers: dict[str, float]) -> str:
    whole, first = sum(numbers.values()), next(iter(numbers))
    rest = {name: round(number / whole, 2) for name, number in numbers.items() if name != first}
    even = {first: round(1 - sum(rest.values()), 2)} | rest
    text = ", ".join(f"{name}: {share:g}" for name, share in even.items())
    return "{" + text[:100] + "}"
