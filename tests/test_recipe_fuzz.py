"""Broken recipes by the hundred: the shipped ones with a key, a value, the structure or bytes changed.

Each loads, and then survives the way out and in, or ends in one usage error that names a line.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dpo_cli.errors import USAGE, DpoError
from dpo_cli.recipe import check, dump, load
from dpo_cli.recipe.train import trl_arguments

RECIPES = [path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))]
WHOLE = [text for text in RECIPES if "extends:" not in text]
ARGUMENTS = trl_arguments()["dpo"]["arguments"]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 2.5, 1e-6, 1e400, -1e400, float("nan"), 10**40, "", " ", "auto", "no", "偏好",
    "steps", "epoch", "all-linear", "lm_head", "./nowhere", "/dev/null", "~nobody/x", "a b", "a\0b",
    "q4_0", "Q4_K_M", "nan", "lots", "\u202e", "x" * 3000, [], [None], [[]], ["a", 1], {}, {"a": 1}, {"": {}},
    {"kind": "openai"}, {"kind": "reward_model", "id": "."}, [{"id": "x/y"}] * 2, {"min_lr": 1}, "rank=8",
    "sk-abcdefgh12345678",
]  # fmt: skip


def by_value(random: random.Random, tree: Any) -> Any:
    """Another value in the place of one, or an argument of TRL's that was not set."""
    parent, key = random.choice(list(spots(tree)))
    parent[key] = random.choice(VALUES)
    if random.random() < 0.6:
        train = tree.setdefault("train", {})
        if isinstance(train, dict):
            name = random.choice(list(ARGUMENTS))
            train[name] = random.choice([*VALUES, *ARGUMENTS[name].get("choices", []), ARGUMENTS[name]["default"]])
    return tree


def by_key(random: random.Random, tree: Any) -> Any:
    """A key misspelt, gone, or in another place."""
    maps = [(parent, key) for parent, key in spots(tree) if isinstance(parent, dict)]
    parent, key = random.choice(maps)
    value, other = parent.pop(key), random.choice(maps)[0]
    cut = random.randrange(len(key))
    name = random.choice(
        [key[:cut] + key[cut + 1 :], key.upper(), f"{key}s", key[:cut] + "x" + key[cut:], key, "extends"]
    )
    random.choice([parent, other])[name] = value
    return tree


def by_structure(random: random.Random, tree: Any) -> Any:
    """A branch copied into another place, put into a list, or made a list of itself."""
    (parent, key), (other, there) = random.choice(list(spots(tree))), random.choice(list(spots(tree)))
    branch = yaml.safe_load(yaml.safe_dump(parent[key]))
    other[there] = random.choice([branch, [branch], {str(there): branch}, [branch] * 3])
    return tree


def spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a tree, as what holds it and by which key."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from spots(value)


def by_bytes(random: random.Random, text: bytes) -> bytes:
    """Pieces cut out, doubled, exchanged, and odd bytes put in."""
    for _ in range(random.randint(1, 3)):
        start = random.randrange(len(text))
        end = min(len(text), start + random.randrange(40))
        odd = random.choice(
            [b"", b"\t", b"\0", b"\xff", b"\n", b": ", b"- ", b"{", b"*a ", b"&a ", b"<<: ", b"!!int ", b"'", b'"',
             b"|", b"%", b"\r", b"---\n", "\u2028\u202e\ufeff".encode(), b"? ", text[start:end] * 2]
        )  # fmt: skip
        text = text[:start] + odd + text[end:]
    return text


def mutant(seed: int) -> tuple[bytes, list[str]]:
    """The file, and the settings beside it."""
    draw = random.Random(seed)
    kind: Callable[[random.Random, Any], Any] = draw.choice([by_value, by_value, by_key, by_structure, by_bytes])
    text = draw.choice(WHOLE)
    if kind is by_bytes:
        return by_bytes(draw, text.encode()), []
    tree = kind(draw, yaml.safe_load(text))
    overrides = []
    if draw.random() < 0.2:
        name = draw.choice(list(ARGUMENTS))
        overrides = [f"{draw.choice(['train.', 'lora.', 'engine.', 'eval.judge.', ''])}{name}={draw.choice(VALUES)}"]
    return yaml.dump(tree, Dumper=yaml.SafeDumper, allow_unicode=True).encode("utf-8", "replace"), overrides


def outcome(folder: Path, seed: int) -> str:
    """`loads`, or `refused`, both as they should be."""
    text, overrides = mutant(seed)
    path, again = folder / "r.yaml", folder / "again.yaml"
    path.write_bytes(text)
    start = time.process_time()
    try:
        recipe = load(path, overrides)
        check(recipe, path)
    except DpoError as error:
        assert error.exit_code == USAGE, seed
        assert re.search(r"r\.yaml(:\d+|  \w+|\b)|--set ", str(error)), (seed, str(error))
        assert len(str(error)) < 20_000, seed
        assert "sk-abcdefgh" not in str(error), seed
        said = "refused"
    else:
        again.write_text(dump(recipe), encoding="utf-8")
        assert dump(load(again)) == dump(recipe), seed
        said = "loads"
    assert time.process_time() - start < 3, seed
    return said


@pytest.mark.parametrize("start", range(0, 300, 100))
def test_a_broken_recipe_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int) -> None:
    monkeypatch.chdir(tmp_path)
    outcomes = [outcome(tmp_path, seed) for seed in range(start, start + 100)]
    assert outcomes.count("refused") > 50, "they are broken"
