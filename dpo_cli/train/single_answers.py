"""Rows of one answer each: KTO's, with a label, and SFT's, the best ones; and what SFT needs beside TRL's trainer.

TRL's KTOTrainer estimates its KL term from each row's prompt with its neighbour's answer, among the rows that are
computed at once, and so reads the rows in one fixed order. Given as they come they would be a bad one: TRL's own
split of pairs puts all chosen answers first, and a pair's two answers side by side share the prompt, which makes the
mismatched row a real one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from dpo_cli.records import best_pairs
from dpo_cli.train.lipo import tokenize

COLUMNS = ["id", "prompt", "completion", "chat_template_kwargs"]


def labelled_rows(dataset: Dataset, seed: int) -> Dataset:
    """The rows of a `data/*.jsonl` for KTO: a pair becomes a desirable and an undesirable one with its id."""
    if "chosen" in dataset.column_names:
        dataset = dataset.map(_split, batched=True, remove_columns=dataset.column_names)
    dataset = dataset.select_columns([*COLUMNS, "label"])
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


def _split(pairs: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Chosen and rejected in turn."""
    split: dict[str, list[Any]] = {
        name: [value for value in pairs[name] for _ in range(2)] for name in ("id", "prompt", "chat_template_kwargs")
    }
    sides = zip(pairs["chosen"], pairs["rejected"], strict=True)
    return split | {"completion": [side for both in sides for side in both], "label": [True, False] * len(pairs["id"])}


def best_rows(dataset: Dataset, seed: int) -> Dataset:
    """The rows of a `data/*.jsonl` for SFT: the best answers of pairs and lists, the good ones of unpaired rows."""
    if "chosen" in dataset.column_names:
        columns = (dataset[name] for name in ("prompt", "chosen", "rejected"))
        dataset = dataset.select(best_pairs(*columns)).rename_column("chosen", "completion")
    elif "candidates" in dataset.column_names:
        dataset = dataset.map(_best_of_list)
    else:
        dataset = dataset.select([index for index, good in enumerate(dataset["label"]) if good])
    return dataset.select_columns(COLUMNS)


def _best_of_list(row: dict[str, Any]) -> dict[str, Any]:
    return {"completion": [{"role": "assistant", "content": row["candidates"][0]["text"]}]}


Trainer: Any = object


class AnswersOnly(Trainer):
    """Stands before TRL's SFTTrainer: its labels are the answers, and its rows have them as `completion_ids` too.

    Unsloth's has a `_prepare_dataset` of its own, which renders without `chat_template_kwargs`.
    """

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: Any, formatting_func: Any, dataset_name: str
    ) -> Any:
        def labelled(row: dict[str, Any]) -> dict[str, Any]:
            prompt, answer = row["prompt_ids"], row["answer_ids"][0][: args.max_length - len(row["prompt_ids"])]
            labels = [-100] * len(prompt) + answer
            return {"completion_ids": answer, "input_ids": prompt + answer, "labels": labels}

        if "input_ids" in dataset.column_names:  # TRL's `evaluate` prepares what it is given, prepared or not
            return dataset
        return tokenize(dataset, processing_class, args, dataset_name).map(labelled, remove_columns="answer_ids")
