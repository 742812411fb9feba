"""Raw values as text and chat turns: what every layout reads its rows with."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from dpo_cli.records import Message

MAX_CHARS = 1_000_000  # a longer text is a broken row, not an answer: ten times the longest context a Qwen3 reads
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


class Malformed(Exception):
    """A row that is not what its layout promises, and in what way."""


def text_of(value: Any, name: str) -> str:
    """`value` if it is text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise Malformed(f"{name} is {type(value).__name__}, not text")
    if len(value) > MAX_CHARS:
        raise Malformed(f"{name} has {len(value):,} characters")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Malformed(f"{name} holds half a character (a lone surrogate)") from error
    return value


def map_of(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"{name} is {type(value).__name__}, not a map")
    return value


def list_of(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise Malformed(f"{name} is {type(value).__name__}, not a list")
    return value


def model_of(value: Any) -> str | None:
    return text_of(value, "model") if isinstance(value, str) else None


def label_of(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def asked_by(value: Any, name: str) -> list[Message]:
    """A prompt of one user turn."""
    text = text_of(value, name)
    if not text.strip():
        raise Malformed(f"{name} is empty")
    return [{"role": "user", "content": text}]


def messages(value: Any, name: str) -> list[Message]:
    """Turns from `{role, content}` or ShareGPT's `{from, value}`; text that holds such a list (CSV) is parsed."""
    turns: list[Message] = []
    for turn in list_of(value, name):
        turn = map_of(turn, f"a turn of {name}")
        role = ROLES.get(str(turn.get("role", turn.get("from"))).lower())
        if role is None or (role == "system" and turns):
            raise Malformed(f"{name} has a turn by {str(turn.get('role', turn.get('from')))[:40]!r} at {len(turns)}")
        turns.append({"role": role, "content": text_of(turn.get("content", turn.get("value")), f"a turn of {name}")})
    return turns


def conversation(value: Any, name: str) -> list[Message] | str:
    """Messages where `value` is a list of them (or text of one, as in CSV), else its text."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        parsed = literal(value)
        turns = isinstance(parsed, list) and all(
            isinstance(one, dict) and {"role", "from"} & one.keys() for one in parsed
        )
        value = parsed if turns else value
    if isinstance(value, dict):
        value = [value]
    return text_of(value, name) if isinstance(value, str) else messages(value, name)


def literal(text: str) -> Any:
    """The value written as JSON or, as pandas and CSV leave it, as a Python literal; None where it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text) if len(text) <= MAX_CHARS else None
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def prompt_and_answers(
    prompt: Any, answers: Sequence[tuple[Any, str]], system: Any = None
) -> tuple[list[Message], list[str]]:
    """A prompt and the last turns of its answers, whatever of the three repeats the conversation.

    Answers are text, or messages that may hold the prompt again. Raises Malformed where they answer different prompts.
    """
    asked = conversation(prompt, "prompt") if prompt is not None else []
    texts, heads = [], []
    for value, name in answers:
        said = conversation(value, name)
        if isinstance(said, str):
            texts.append(said)
            continue
        if not said or said[-1]["role"] != "assistant":
            raise Malformed(f"{name} does not end in an answer")
        texts.append(said[-1]["content"])
        heads.append(said[:-1])
    if any(head != heads[0] for head in heads):
        raise Malformed(f"{' and '.join(name for _, name in answers)} differ before their last turn")
    turns = asked_by(asked, "prompt") if isinstance(asked, str) else asked
    if heads and heads[0]:
        repeated = isinstance(asked, str) or heads[0][: len(turns)] == turns
        turns = heads[0] if repeated else turns + heads[0]
    if isinstance(system, str) and system.strip() and not (turns and turns[0]["role"] == "system"):
        turns = [{"role": "system", "content": text_of(system, "system")}, *turns]
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise Malformed("the prompt does not end in a question")
    return turns, texts


_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


def transcript(value: Any, name: str) -> list[Message]:
    """Anthropic's `\\n\\nHuman: …\\n\\nAssistant: …` as turns; a trailing empty answer is left out."""
    before, *parts = _SPEAKER.split(text_of(value, name))
    if before.strip() or not parts:
        raise Malformed(f"{name} is not a Human/Assistant transcript")
    turns: list[Message] = [
        {"role": ROLES["human" if speaker == "Human" else "assistant"], "content": content}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns
