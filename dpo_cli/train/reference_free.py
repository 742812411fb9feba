"""What TRL's CPOTrainer and ORPOTrainer (SimPO, CPO, ORPO) lack beside its DPOTrainer.

They are of an older make, the same in TRL 1.15 and 1.16: they know nothing of `chat_template_kwargs` but in the
template, end an answer with a second end-of-turn token where the template puts a newline after the first, and keep
no count of tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from datasets import DatasetDict
from trl.trainer.dpo_trainer import DPOTrainer

TOKENS = ["prompt_ids", "chosen_ids", "rejected_ids"]
Trainer: Any = object


class ReferenceFree(Trainer):
    """Stands before TRL's CPOTrainer or ORPOTrainer: it learns from the very tokens that DPO would."""

    def __init__(
        self, *, args: Any, train_dataset: Any, eval_dataset: Any, processing_class: Any, **options: Any
    ) -> None:
        args.remove_unused_columns = False  # TRL's collator takes all of them, and says so in a warning
        self._total_train_tokens = 0
        as_dpo: Any = SimpleNamespace(
            max_length=args.max_length, truncation_mode="keep_start", dataset_num_proc=args.dataset_num_proc
        )

        def tokenised(dataset: Any, name: str) -> Any:
            tokens = DPOTrainer._prepare_dataset(self, dataset, processing_class, as_dpo, name)
            return tokens.select_columns(["id", *TOKENS])

        options["train_dataset"] = tokenised(train_dataset, "train")
        sets = eval_dataset and DatasetDict({name: tokenised(one, name) for name, one in eval_dataset.items()})
        super().__init__(args=args, eval_dataset=sets, processing_class=processing_class, **options)

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """The columns of these trainers from those of DPO; truncated at the end, as there."""
        row = {}
        for side in ("chosen", "rejected"):
            prompt, answer = feature["prompt_ids"], feature[f"{side}_ids"]
            ids = (prompt + answer)[: self.max_length]
            row[f"{side}_input_ids"] = ids
            row[f"{side}_attention_mask"] = [1] * len(ids)
            row[f"{side}_labels"] = ([-100] * len(prompt) + answer)[: self.max_length]
        return row

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = sum(inputs[f"{side}_attention_mask"].sum() for side in ("chosen", "rejected"))
        self._total_train_tokens += int(self.accelerator.gather_for_metrics(torch.as_tensor(tokens)).sum())
        return super().compute_loss(model, inputs, *args, **kwargs)
