"""Raw values as text and chat turns: what every layout reads its rows with."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from dpo_cli.prepare.text import listed
from dpo_cli.records import Message

ROLES = {
    theirs: ours
    for ours, several in {
        "user": "user human prompter customer question instruction 用户 人类 提问者 问 客户",
        "assistant": "assistant gpt chatgpt bot chatbot ai model llm agent answer response 助手 ai助手 机器人 模型 答",
        "system": "system developer sys system_prompt 系统 系统提示",
    }.items()
    for theirs in several.split()
}
TOOL_ROLES = {
    "tool", "tools", "tool_call", "tool_calls", "tool_response", "function", "function_call", "function_response",
    "observation", "ipython",
}  # fmt: skip
TEXT_PARTS, THOUGHT_PARTS = (None, "text", "input_text", "output_text"), ("thinking", "reasoning")
THOUGHTS = (
    "reasoning_content", "reasoning", "thinking", "thought", "thoughts", "thinking_content", "reasoning_text",
    "reasoning_details",
)  # fmt: skip  # keys that hold what was thought before the content
CALLS = ("tool_calls", "function_call")


class Malformed(Exception):
    """A row that is not what its layout promises, and in what way."""

    reason = "schema"


class Unsupported(Malformed):
    """A row of tools or images, which a text model can't be trained on."""

    reason = "unsupported"


def text_of(value: Any, name: str) -> str:
    """`value` if it is text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise Malformed(f"{name} is {kind_of(value)}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Malformed(f"{name} holds half a character (a lone surrogate)") from error
    return value


def kind_of(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


def map_of(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"{name} is {kind_of(value)}, not a map")
    return value


def list_of(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise Malformed(f"{name} is {kind_of(value)}, not a list")
    return value


def text_if_any(value: Any, name: str) -> str | None:
    return text_of(value, name) if isinstance(value, str) else None


def has_content(value: Any) -> bool:
    """Whether a value says anything: not null, not empty, and no text that writes out an empty one (as in CSV)."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "[]", "{}", "null", "none", "nan")
    if isinstance(value, list | tuple):
        return any(one not in (None, "") for one in value)
    return value is not None and value is not False and value != {} and value == value  # NaN is not itself


def is_given(value: Any) -> bool:
    """Whether a value says anything: not null, not NaN, no blank text."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value == value


def first(row: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these keys that holds something; else of the first that is not null; else None.

    Arrow gives every row all keys, and null for those that it hasn't got.
    """
    if row.get(names[0]):  # and the others are not asked for: see `_Watched` in read.py
        return row[names[0]]
    there = [row[name] for name in names if row.get(name) is not None]
    return next((value for value in there if value not in ("", [], {})), there[0] if there else None)


def literal(text: str) -> Any:
    """The value written as JSON or, as pandas and CSV leave it, as a Python literal; None where it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def asked_by(value: Any, name: str) -> list[Message]:
    """Return a prompt of one user turn."""
    text = text_of(value, name)
    if not text.strip():
        raise Malformed(f"{name} is empty")
    return [{"role": "user", "content": text}]


def messages(value: Any, name: str) -> list[Message]:
    """Turns from `{role, content}` or ShareGPT's `{from, value}`; a thought in a key of its own opens the content."""
    turns: list[Message] = []
    for turn in list_of(value, name):
        turn = map_of(turn, f"a turn of {name}")
        spoken_by, written = first(turn, "role", "from"), first(turn, "content", "value", "text")
        if spoken_by is None or (written is None and not any(turn.get(call) for call in CALLS)):
            keys = listed([str(key) for key in turn])
            raise Malformed(f"turn {len(turns)} of {name} has {keys}; a turn is role and content, or from and value")
        role = _role(spoken_by, name, len(turns))
        if role == "system" and turns:
            raise Malformed(f"{name} has a system turn at {len(turns)}; only the first turn may be one")
        if any(call in turn and has_content(turn[call]) for call in CALLS):
            raise Unsupported(f"{name} calls a tool, which is not supported")
        content, thought = _content(written, f"a turn of {name}")
        beside = first(turn, *THOUGHTS)
        thought = _content(beside, f"a thought of {name}")[0] if is_given(beside) else thought
        if role == "assistant" and thought.strip() and "</think>" not in content:
            content = f"<think>\n{thought.strip()}\n</think>\n\n{content}"
        turns.append({"role": role, "content": content})
    return turns


def _role(value: Any, name: str, place: int) -> str:
    written = text_of(value, f"the role of turn {place} of {name}").strip()
    if written.lower() in TOOL_ROLES:
        raise Unsupported(f"{name} has a turn by {written!r}: tools are not supported")
    if written.lower() not in ROLES:
        raise Malformed(f"{name} has a turn by {written[:40]!r} at {place}; known are {', '.join(ROLES)}")
    return ROLES[written.lower()]


def _content(value: Any, name: str) -> tuple[str, str]:
    """Text and thought of a turn's content: a text, or parts that are joined as chat templates join them."""
    if not isinstance(value, list | tuple | dict):
        return text_of(value, name), ""
    texts, thoughts = [], []
    for part in [value] if isinstance(value, dict) else value:
        if isinstance(part, str):
            texts.append(text_of(part, name))
            continue
        kind = map_of(part, f"a part of {name}").get("type")
        if kind in THOUGHT_PARTS:
            thoughts.append(text_of(first(part, kind, "text", "content"), f"a thought of {name}"))
        elif kind not in TEXT_PARTS or (kind is None and part.get("text") is None):
            shown = kind or ", ".join(str(key) for key in part if part[key] is not None) or "nothing"
            raise Malformed(f"{name} has a part of {str(shown)[:40]!r}, and only text can be trained on")
        else:
            texts.append(text_of(first(part, "text", "content"), f"a part of {name}"))
    return "".join(texts), "\n".join(thoughts)


_OPENS_LIST, _MESSAGE_KEYS = re.compile(r"\s*(?:\[\s*)?\{"), ({"role", "content"}, {"from", "value"})


def conversation(value: Any, name: str, asks: bool = False) -> list[Message] | str:
    """Messages where `value` is a list of them, one, the text of such (as in CSV) or a transcript; else its text.

    `asks`: it is a prompt, whose transcript ends where the answer goes.
    """
    if isinstance(value, str) and _OPENS_LIST.match(value):
        parsed = literal(value)
        several = [parsed] if isinstance(parsed, dict) else parsed if isinstance(parsed, list) else [None]
        if all(isinstance(one, dict) and any(keys <= one.keys() for keys in _MESSAGE_KEYS) for one in several):
            value = several
    if isinstance(value, dict):  # one turn, or as OpenAI's preference format wraps them
        value = value["messages"] if isinstance(value.get("messages"), list) else [value]
    if not isinstance(value, str | list | tuple):
        raise Malformed(f"{name} is {kind_of(value)}, neither text nor a list of turns")
    if not isinstance(value, str):
        return messages(value, name)
    return transcript(value, name) if is_transcript(value, asks) else text_of(value, name)


def is_transcript(value: Any, asks: bool = False) -> bool:
    """Whether a text is Anthropic's `\\n\\nHuman: …\\n\\nAssistant: …`; with `asks`, one that opens the last turn."""
    if not isinstance(value, str) or not value.lstrip().startswith("Human:"):
        return False
    return value.rstrip().endswith("\nAssistant:") if asks else "\n\nAssistant:" in value


def transcript(value: Any, name: str) -> list[Message]:
    """A Human/Assistant transcript as turns, without the blanks that only set its lines apart."""
    text = text_of(value, name).lstrip()
    gap = r"\n\n" if "\n\nAssistant:" in text else r"\n+"
    before, *parts = re.split(rf"(?:^|{gap})(Human|Assistant): ?", text)
    if before.strip() or not parts:
        raise Malformed(f"{name} is not a Human/Assistant transcript")
    return [
        {"role": ROLES[speaker.lower()], "content": content.rstrip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


_EARLIER_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


def prompt_and_answers(
    prompt: Any, answers: Sequence[tuple[Any, str]], row: Mapping[str, Any] = MappingProxyType({})
) -> tuple[list[Message], list[str], list[str]]:
    """Return a prompt, the last turns of its answers, and notes on what was left out.

    Whatever of prompt and answers repeats the conversation, it is asked once, the system turn first.

    Args:
        answers: (value, its column): text, or messages that may hold the prompt again.
        row: for its columns of a system turn, and of earlier turns (`history`).

    Raises:
        Malformed: they ask different things, or what comes out is no conversation that ends in a question.
    """
    systems: dict[str, str] = {}  # by the column that has it
    asked = conversation(prompt, "prompt", asks=True) if prompt is not None else []
    opened = is_transcript(prompt, asks=True)  # by an empty turn, where the answer goes
    turns = asked_by(asked, "prompt") if isinstance(asked, str) else asked[:-1] if opened else asked
    turns = [*_history(row.get("history"), systems), *_without_system(turns, "prompt", systems)]
    texts, wholes = [], []
    for value, name in answers:
        talk = conversation(value, name)
        if isinstance(talk, str):
            texts.append(talk.lstrip(" ") if opened else talk)
            continue
        if not talk or talk[-1]["role"] != "assistant":
            raise Malformed(f"{name} does not end in an answer")
        texts.append(talk[-1]["content"])
        if talk[:-1]:
            head = _without_system(talk[:-1], name, systems)
            wholes.append(_asked_once(turns, head, name, text=isinstance(asked, str)))
    if len({text.strip() for text in systems.values()}) > 1:
        raise Malformed(f"{' and '.join(systems)} have different system turns")
    whole, *others = wholes or [turns]
    if any(_bare(other) != _bare(whole) for other in others):
        raise Malformed(f"{' and '.join(name for _, name in answers)} differ before their last turn")
    if not whole or whole[-1]["role"] != "user" or not whole[-1]["content"].strip():
        raise Malformed("the prompt does not end in a question")
    if any(one["role"] == "user" == other["role"] for one, other in pairwise(whole)):
        raise Malformed("the prompt has two user turns in a row")
    cut = [_without_thought(turn) for turn in whole]
    system, notes = _system(row, next(iter(systems.values()), None))
    if cut != whole:
        notes.append("thoughts in earlier turns")
    return [*system, *cut], texts, notes


def _history(value: Any, systems: dict[str, str]) -> list[Message]:
    """Earlier turns, from LLaMA-Factory's and ms-swift's `[[question, answer], …]` or from messages."""
    if isinstance(value, str):
        value = literal(value)  # as CSV leaves it; any other text is another column of that name
    if not has_content(value):
        return []
    if all(isinstance(one, dict) for one in list_of(value, "history")):
        return _without_system(messages(value, "history"), "history", systems)
    turns: list[Message] = []
    for one in value:
        if len(list_of(one, "a turn of history")) != 2:
            raise Malformed("a turn of history is no question with its answer")
        question, answer = (text_of(text, "a turn of history") for text in one)
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def _without_system(turns: list[Message], name: str, systems: dict[str, str]) -> list[Message]:
    """The turns behind the system turn, which goes into `systems`."""
    if not turns or turns[0]["role"] != "system":
        return turns
    systems[name] = turns[0]["content"]
    return turns[1:]


def _system(row: Mapping[str, Any], text: str | None) -> tuple[list[Message], list[str]]:
    """The system turn, from its column where no other text says otherwise; and a note where one does."""
    column, notes = first(row, "system", "system_prompt", "system_message"), []
    if is_given(column):
        column = text_of(column, "system")
        if text is not None and text.strip() != column.strip():
            notes.append("the system column, where the system turn of the prompt says otherwise")
        text = column if text is None else text
    return [] if text is None else [{"role": "system", "content": text}], notes


def _bare(turns: Sequence[Message]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"].strip()) for turn in turns]


def _asked_once(turns: list[Message], head: list[Message], name: str, text: bool) -> list[Message]:
    """The prompt's turns and those in front of an answer as one conversation."""
    asked, again = _bare(turns), _bare(head)
    if not again or asked[-len(again) :] == again:
        return turns
    if again[: len(asked)] == asked or again[-len(asked) :] == asked or (text and asked[-1] in again):
        return head
    if text:
        raise Malformed(f"the text of prompt is not asked in {name}")
    if asked[-1][0] == again[0][0]:
        raise Malformed(f"prompt and {name} ask different things")
    return [*turns, *head]


def _without_thought(turn: Message) -> Message:
    if turn["role"] != "assistant" or "</think>" not in turn["content"]:
        return turn
    return {"role": turn["role"], "content": _EARLIER_THOUGHT.sub("", turn["content"], count=1)}
