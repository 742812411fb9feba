"""SFT in TRL's SFTTrainer on the data of the other methods: of each prompt the best answer, and its tokens alone.

Prompt and answer are split as TRL's DPOTrainer does it, so that an SFT and the DPO after it see the same tokens.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from dpo_cli.records import best_pairs
from dpo_cli.train.lipo import tokenize

COLUMNS = ["id", "prompt", "completion", "chat_template_kwargs"]


def rows(dataset: Dataset, seed: int) -> Dataset:
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
