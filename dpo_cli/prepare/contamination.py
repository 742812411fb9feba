"""The prompts that must not be trained on: `data.contamination`, read into hashes of whole prompts and of phrases."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_cli.errors import DpoError
from dpo_cli.language import HAN
from dpo_cli.prepare.files import file_feed, text_lines
from dpo_cli.prepare.sources import contamination_files
from dpo_cli.prepare.text import hash64, normalise, words
from dpo_cli.recipe import Contaminated, Recipe
from dpo_cli.records import Message

PROMPT_COLUMNS = ("prompt", "question", "instruction", "input", "text", "problem", "query", "messages", "turns")
HOW = f"one prompt a line (.txt), or rows with one of the columns {', '.join(PROMPT_COLUMNS)}"


@dataclass
class Contamination:
    """Hashes of prompts, and of every run of `ngram_words` words or `ngram_han` Han characters in them."""

    ngram_words: int
    ngram_han: int
    _whole: set[int] = field(default_factory=set)
    _phrases: set[int] = field(default_factory=set)

    def add(self, text: str) -> None:
        self._whole.add(hash64(normalise(text)))
        self._phrases.update(self._ngrams(text))

    def matches(self, prompt: list[Message]) -> str | None:
        asked = [turn["content"] for turn in prompt if turn["role"] == "user"]
        if any(hash64(normalise(text)) in self._whole for text in asked):
            return "a listed prompt"
        if any(not self._phrases.isdisjoint(self._ngrams(text)) for text in asked):
            return "a phrase of a listed prompt"
        return None

    def _ngrams(self, text: str) -> Iterator[int]:
        every = words(unicodedata.normalize("NFKC", text).lower())
        han, latin = ([word for word in every if bool(HAN.match(word)) == is_han] for is_han in (True, False))
        for run, size in ((latin, self.ngram_words), (han, self.ngram_han)):
            for start in range(len(run) - size + 1):
                yield hash(tuple(run[start : start + size]))


def read_contamination(recipe: Recipe) -> Contamination | None:
    """Read all prompts of `data.contamination`; None where there is none, or the filter is off.

    Raises:
        DpoError: a file is missing, or holds no prompts.
    """
    files = contamination_files(recipe)
    if not files or not recipe.data.filters.contaminated:
        return None
    options: Contaminated = recipe.data.filters.contaminated
    contamination = Contamination(options.ngram_words, options.ngram_han)
    for index, path in enumerate(files.values()):
        where = recipe.where("data", "contamination", index)
        prompts = list(_prompts(path, where))
        if not prompts:
            raise DpoError(f"no prompts in {path.name}", where=where, hint=HOW)
        for prompt in prompts:
            contamination.add(prompt)
    return contamination


def _prompts(path: Path, where: str) -> Iterator[str]:
    """Every row's prompt; a row without one is an error, for what it names could be trained on unseen."""
    if path.suffix.lower() == ".txt":
        yield from filter(str.strip, text_lines(path))
        return
    for number, row in file_feed(path.name, path).rows():
        value: Any = row
        if isinstance(row, dict):
            value = next((row[name] for name in PROMPT_COLUMNS if row.get(name)), None)
        asked = list(_asked(value))
        if not asked:
            raise DpoError(f"row {number} of {path.name} has no prompt", where=where, hint=HOW)
        yield from asked


def _asked(value: Any) -> Iterator[str]:
    """The user's texts in a prompt column: text, or turns as text or as messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for turn in value:
            if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human"):
                yield from _asked(turn.get("content", turn.get("value")))
            elif isinstance(turn, str):
                yield turn
