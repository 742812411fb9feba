"""Preference pairs of real lengths and no content: token counts from `lengths.json`, and random tokens to them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Lengths(NamedTuple):
    """Tokens of a pair; `opening` of them are the same at the start of both answers."""

    prompt: int
    chosen: int
    rejected: int
    opening: int

    @property
    def row(self) -> int:
        """Of the longer text, prompt and answer."""
        return self.prompt + max(self.chosen, self.rejected)

    @property
    def shared(self) -> int:
        """Of both texts, what they share counted once."""
        return self.prompt + self.chosen + self.rejected - self.opening


class Tokens(NamedTuple):
    """Token ids of a pair."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def load(language: str, max_length: int = 1024) -> list[Lengths]:
    """Every pair of a language (`en`, `zh`) as TRL trains on it.

    TRL leaves out a pair whose prompt alone fills `max_length`, and cuts what is longer at the end.
    """
    with open(Path(__file__).with_name("lengths.json"), encoding="utf-8") as file:
        rows = [Lengths(*row) for row in json.load(file)[language]]
    return [cut(row, max_length) for row in rows if row.prompt < max_length]


def cut(row: Lengths, max_length: int) -> Lengths:
    room = max_length - row.prompt
    chosen, rejected = min(row.chosen, room), min(row.rejected, room)
    return Lengths(row.prompt, chosen, rejected, min(row.opening, chosen, rejected))


def padded_tokens(rows: Sequence[Lengths], micro_batch: int) -> int:
    """What a padded forward computes: both texts of each pair, padded to the longest of their micro-batch."""
    groups = [rows[start : start + micro_batch] for start in range(0, len(rows), micro_batch)]
    return sum(2 * len(group) * max(row.row for row in group) for group in groups)


def shared_tokens(rows: Sequence[Lengths]) -> int:
    return sum(row.shared for row in rows)


def sample(rows: Sequence[Lengths], count: int, micro_batch: int = 4) -> list[Lengths]:
    """`count` pairs that stand for all of them: of 5,000 draws the one whose token counts are nearest to the whole's.

    Compared are the shared tokens of a pair and the padded ones at micro-batch 1 and `micro_batch`, so that a short
    benchmark keeps the ratios of the whole distribution. The same arguments give the same pairs.
    """
    rng = random.Random(0)
    whole = rows[: len(rows) // micro_batch * micro_batch]

    def counts(some: Sequence[Lengths]) -> list[float]:
        totals = shared_tokens(some), padded_tokens(some, 1), padded_tokens(some, min(micro_batch, len(some)))
        return [total / len(some) for total in totals]

    wanted = counts(whole)

    def distance(some: Sequence[Lengths]) -> float:
        return max(abs(mine / its - 1) for mine, its in zip(counts(some), wanted, strict=True))

    return min((rng.sample(list(rows), count) for _ in range(5000)), key=distance)


def tokens(rows: Sequence[Lengths], vocabulary: int, first: int = 8, seed: int = 0) -> list[Tokens]:
    """Random ids in [first, vocabulary) of these lengths; after the shared opening the answers differ at once."""
    rng = random.Random(seed)
    made = []
    for row in rows:
        draw = [rng.randrange(first, vocabulary) for _ in range(row.prompt + row.chosen + row.rejected)]
        prompt, rest = draw[: row.prompt], draw[row.prompt :]
        chosen, rejected = rest[: row.chosen], rest[row.chosen :]
        rejected[: row.opening] = chosen[: row.opening]
        if row.opening < min(row.chosen, row.rejected) and rejected[row.opening] == chosen[row.opening]:
            rejected[row.opening] = first + (chosen[row.opening] + 1 - first) % (vocabulary - first)
        made.append(Tokens(prompt, chosen, rejected))
    return made
