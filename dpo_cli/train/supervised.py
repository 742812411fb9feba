"""SFT in TRL's SFTTrainer on the data of the other methods: of each prompt the best answer, and its tokens alone.

Prompt and answer are rendered apart and together and split where the two part, as TRL's DPOTrainer does it, so that an
SFT and the DPO after it see the same tokens.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl.trainer import dpo_trainer

from dpo_cli.records import best_pairs

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
trl_dpo: Any = dpo_trainer


class AnswersOnly(Trainer):  # type: ignore[misc]
    """Stands before TRL's SFTTrainer: its labels are the answers, and its rows have them as `completion_ids` too.

    Unsloth's has a `_prepare_dataset` of its own, which renders without `chat_template_kwargs`.
    """

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: Any, formatting_func: Any, dataset_name: str
    ) -> Any:
        def ids_of(messages: Any, **options: Any) -> Any:
            return trl_dpo._tokenize(processing_class, messages, **options)["input_ids"]

        def tokenised(row: dict[str, Any]) -> dict[str, Any]:
            kwargs = row["chat_template_kwargs"]
            prompt = ids_of(row["prompt"], add_generation_prompt=True, **kwargs)
            text = ids_of(row["prompt"] + row["completion"], **kwargs)
            start = trl_dpo.common_prefix_length(prompt, text)
            text = text[: args.max_length]
            answer = text[start:]
            return {
                "prompt_ids": text[:start],
                "completion_ids": answer,
                "input_ids": text,
                "labels": [-100] * (len(text) - len(answer)) + answer,
            }

        if "input_ids" in dataset.column_names:  # TRL's `evaluate` prepares what it is given, prepared or not
            return dataset
        with trl_dpo.global_then_local_main_first():
            options = {"num_proc": args.dataset_num_proc}
            dataset = dataset.map(tokenised, desc=f"Tokenizing {dataset_name} dataset", **options)
            return dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length, **options)
