"""KTO's rows: an answer with a label, of unpaired data or of pairs split in two, in an order that suits its KL term.

TRL's KTOTrainer estimates that term from each row's prompt with its neighbour's answer, among the rows that are
computed at once, and so reads the rows in one fixed order. Given as they come they would be a bad one: TRL's own
split of pairs puts all chosen answers first, and a pair's two answers side by side share the prompt, which makes the
mismatched row a real one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

COLUMNS = ["id", "prompt", "completion", "label", "chat_template_kwargs"]


def rows(dataset: Dataset, seed: int) -> Dataset:
    """The rows of a `data/*.jsonl` for KTO: a pair becomes a desirable and an undesirable one with its id."""
    if "chosen" in dataset.column_names:
        dataset = dataset.map(_split, batched=True, remove_columns=dataset.column_names)
    dataset = dataset.select_columns(COLUMNS)
    return dataset.select(order(dataset["label"], seed))


def order(labels: Sequence[bool], seed: int) -> list[int]:
    """Indices of the rows, shuffled, with both labels spread evenly, so that few rows at once have their share of both.

    Where the labels are those of pairs, chosen and rejected in turn, a pair's two rows stand half the data apart.
    """
    placed: list[tuple[float, int]] = []
    for label in (True, False):
        some = [index for index, one in enumerate(labels) if bool(one) == label]
        random.Random(seed).shuffle(some)  # alike for both labels: the n-th of each are of one pair
        half = 0 if label else len(some) // 2
        some = some[half:] + some[:half]
        placed += [((number + 0.5) / len(some), index) for number, index in enumerate(some)]
    return [index for _, index in sorted(placed, key=lambda one: one[0])]


def imbalance(labels: Sequence[bool], desirable: float, undesirable: float) -> str | None:
    """What to say where one label outweighs the other, given the weights of the two.

    Eq. (8) of the KTO paper (Ethayarajh et al. 2024, arXiv 2402.01306) asks for weight x rows of the desirable answers
    to be 1 to 4/3 times that of the undesirable ones; as much below is no news either.
    """
    good = sum(map(bool, labels))
    bad = len(labels) - good
    if not good or not bad:
        return f"all {len(labels)} rows are {'desirable' if good else 'undesirable'}: KTO needs both"
    ratio = good * desirable / (bad * undesirable)
    if 3 / 4 <= round(ratio, 2) <= round(4 / 3, 2):
        return None
    name, weight = ("undesirable_weight", ratio * undesirable) if ratio > 1 else ("desirable_weight", desirable / ratio)
    return (
        f"{good} desirable and {bad} undesirable rows weigh {ratio:.2f} to 1, where KTO wants 1 to 1.33: "
        f"set train.{name}: {weight:.3g}"
    )


def _split(pairs: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Chosen and rejected in turn."""
    split: dict[str, list[Any]] = {
        name: [value for value in pairs[name] for _ in range(2)] for name in ("id", "prompt", "chat_template_kwargs")
    }
    sides = zip(pairs["chosen"], pairs["rejected"], strict=True)
    return split | {"completion": [side for both in sides for side in both], "label": [True, False] * len(pairs["id"])}
