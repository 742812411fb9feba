"""Rows broken at random in every layout and format: none ends in a traceback, and every prompt is kept or counted.

`DPO_CLI_FUZZ=100000 pytest tests/prepare/test_fuzz.py` breaks so many; DPO_CLI_FUZZ_SEED takes other ones.
"""

from __future__ import annotations

import copy
import json
import os
import random
import runpy
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from dpo_cli.errors import DpoError
from tests.prepare import kit

ROWS: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("test_layouts.py")))["ROWS"]
COUNT, SEED = int(os.environ.get("DPO_CLI_FUZZ", "4000")), int(os.environ.get("DPO_CLI_FUZZ_SEED", "0"))
BATCH = 100  # rows of one `prepare`
GROUPED = ("helpsteer2", "kto")
KEYS = sorted({key for rows, *_ in ROWS.values() for row in rows for key in row} | {
    "role", "from", "content", "value", "text", "type", "tool_calls", "function_call", "reasoning_content", "thinking",
    "system", "history", "tools", "images", "audios", "input", "label", "language", "score_chosen", "score_rejected",
    "chosen_rating", "rejected_rating", "model_chosen", "turn",
})  # fmt: skip
CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
SCRAPS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, 7.5, -3, 10**300, 10**4000, float("nan"), float("inf"),
    "", " ", "\n", "x", "0.7", "1", "-1", "N/A", "null", "[]", "{}", "true", "no", "good", "坏", "tie", "model_b",
    "\ud800", "\x00", "\ufffd", "好" * 40, "word " * 30, "𠮷野家—谢谢！", "<image>", "<|im_end|>", "<think>not closed",
    "<think>\nHm.\n</think>\n\nSo it is, and so it was.", "\n\nHuman: Why?\n\nAssistant:", "\n\nAssistant: Human:",
    "Human: Why?\nAssistant: So.\nHuman: And?\nAssistant:", '[{"role": "user", "content": "Why?"}]', "[[[[", "{{",
    "[{'from': 'gpt', 'value': 'Because.'}]", '{"role": "assistant"}',
    [], {}, [None], [[]], [{}], [""], {"": ""}, CALL, [["Why?", "So."]], [["Why?"]],
    {"role": "tool", "content": "7"}, {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."}, {"role": "assistant", "content": None, "tool_calls": CALL},
    {"from": "bot", "value": "So."}, {"from": "narrator", "value": "So."}, [{"type": "text", "text": "Why?"}],
    [{"type": "image"}], [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "So."}],
]  # fmt: skip


def deep(rng: random.Random) -> Any:
    """Lists or maps in one another, up to what JSON can be read at."""
    value: Any = rng.choice(SCRAPS)
    for _ in range(rng.choice((3, 60, 450, 900))):
        value = [value] if rng.random() < 0.9 else {rng.choice(KEYS): value}
    return value


def scrap(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(SCRAPS))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (map or list, key or index) within a row."""
    found: list[tuple[Any, Any]] = []
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


def mutate(row: Any, rng: random.Random) -> Any:
    """A copy of `row` with one to three things wrong, odd or only rare."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spots = places(row)
        if not spots:
            return row
        holder, key = rng.choice(spots)
        value = holder[key]
        kind = rng.randrange(12)
        if kind <= 2:
            holder[key] = scrap(rng)
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            holder[key] = [value] if rng.random() < 0.5 else {rng.choice(KEYS): value}
        elif kind == 5:
            holder[key] = json.dumps(value, ensure_ascii=False) if rng.random() < 0.5 else str(value)
        elif kind == 6 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(value) if rng.random() < 0.5 else scrap(rng))
        elif kind == 7 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = holder.pop(key)
        elif kind == 8 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = scrap(rng)
        elif kind == 9 and isinstance(value, str):
            holder[key] = rng.choice(
                (" " + value, value + "\n", value.upper(), value[:3], value * 3, str(scrap(rng)) + value)
            )
        elif kind == 10:
            other, name = rng.choice(spots)
            if other in (holder, None) or not isinstance(other[name], dict | list):
                holder[key], other[name] = other[name], value
        else:
            row[rng.choice(KEYS)] = scrap(rng)
        if len(json.dumps(row, default=str)) > 60_000:
            return row
    if rng.random() < 0.05 and places(row):
        holder, key = rng.choice(places(row))
        holder[key] = deep(rng)
    return row


def good_rows(name: str, rng: random.Random) -> list[Any]:
    """A layout's rows with texts of their own, so that few are duplicates."""
    rows = json.loads(json.dumps(ROWS[name][0]))
    language = rng.choice(("en", "zh"))
    words: dict[str, str] = {}

    def fresh(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fresh(one) for key, one in value.items()}
        if isinstance(value, list):
            return [fresh(one) for one in value]
        if isinstance(value, str) and len(value) > 9 and value[0] not in "\n[{" and "_" not in value:
            return words.setdefault(value, kit.sentence((rng.random(), value), language, 20))
        return value

    return list(fresh(rows))


def readable(row: Any) -> bool:
    try:
        json.loads(json.dumps(row))
    except (RecursionError, ValueError):
        return False
    return True


def check_rows(made: Any) -> None:
    """Whatever came in, what goes out is a conversation that asks once and ends in a question."""
    for row in made.rows:
        roles = [turn["role"] for turn in row["prompt"]]
        assert roles[-1] == "user" and "system" not in roles[1:] and set(roles) <= {"system", "user", "assistant"}
        assert ("user", "user") not in pairwise(roles)
        answers = [row[side] for side in ("chosen", "rejected", "completion") if side in row]
        texts = [turn["content"] for turns in answers for turn in turns] or [one["text"] for one in row["candidates"]]
        assert all(isinstance(text, str) and text.strip() for text in texts)
        if row.get("margin") is not None:
            assert 0 < row["margin"] <= 1


def test_rows_broken_at_random(record_property: Any) -> None:
    rng = random.Random(SEED)
    names, seen = sorted(ROWS), Counter[str]()
    while seen["rows"] < COUNT:
        name = rng.choice(names)
        layout = name.split()[0]
        rows: list[Any] = []
        while len(rows) < BATCH:
            good = good_rows(name, rng)
            rows += good if rng.random() < 0.3 else [mutate(row, rng) for row in good]
            rows += [scrap(rng)] if rng.random() < 0.02 else []
        rows = [row for row in rows if readable(row)]
        data: dict[str, Any] = {
            "format": rng.choice(("pairs", "ranked", "unpaired")),
            "pairs": {"pick": rng.choice(("best_worst", "best_random", "all")), "min_margin": rng.choice((0.0, 0.1))},
            "model": {"id": "builtin:tiny-qwen3", "thinking": rng.random() < 0.5},
            "filters": {
                key: False for key in ("duplicate", "near_duplicate", "contradicts_scores") if rng.random() < 0.5
            },
            "keep_dropped": True,
        }
        seen["rows"] += len(rows)
        try:
            made = kit.run_rows(rows, {"layout": rng.choice((layout, layout, "auto"))}, **data)
        except DpoError as error:
            seen["errors"] += 1
            assert error.hint and "Traceback" not in str(error)
            continue
        source = made.source()
        assert made.funnel_holds()
        assert source["in"] <= len(rows) if layout in GROUPED else source["in"] == len(rows)
        seen["in"] += source["in"]
        seen["kept"] += source["kept"]
        seen.update(source["dropped"])
        check_rows(made)
    record_property("fuzz", dict(seen))
    print(dict(seen))
    assert seen["kept"] > 0.1 * seen["in"] and {"schema", "unsupported"} <= seen.keys()
