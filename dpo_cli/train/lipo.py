"""LiPO in TRL's DPOTrainer: prompts with all their answers (`data.format: ranked`) in the place of pairs.

Config, model, reference (the adapter off), optimiser and log are DPO's own; a row is a prompt with K answers, K free
from row to row, and so `per_device_train_batch_size` counts prompts. Of `train.loss_type` are those of `listwise.py`,
each also as `..._norm` with rewards per token, as TRL's sigmoid_norm has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer import dpo_trainer

from dpo_cli.train import listwise, shared_prefix

# Arguments of TRL's DPOConfig that belong to losses over pairs.
OVER_PAIRS = (
    "discopop_tau", "f_alpha_divergence_coef", "f_divergence_type", "label_smoothing", "ld_alpha",
    "router_aux_loss_coef", "use_weighting",
)  # fmt: skip
TEXTS = ("input_ids", "attention_mask", "completion_mask")


def rows(dataset: Dataset, seed: int) -> Dataset:
    """The rows of a ranked `data/*.jsonl` for the trainer: `answers` as messages, best first, and `relevance`."""

    def listed(row: dict[str, Any]) -> dict[str, Any]:
        answers = [[{"role": "assistant", "content": one["text"]}] for one in row["candidates"]]
        return {"answers": answers, "relevance": relevance([one["score"] for one in row["candidates"]])}

    return dataset.map(listed).select_columns(["id", "prompt", "answers", "relevance", "chat_template_kwargs"])


def relevance(scores: Sequence[float | None]) -> list[float]:
    """The labels psi of a list, in 0..1: its scores, best first, or of an order without them (K - rank) / (K - 1)."""
    if None not in scores:
        return [float(score) for score in scores if score is not None]
    last = len(scores) - 1
    return [(last - place) / max(last, 1) for place in range(last + 1)]


def tokenize(dataset: Dataset, tokenizer: Any, args: Any, name: str) -> Dataset:
    """Add the tokens of prompts and answers, `prompt_ids` and `answer_ids`, split where TRL's DPOTrainer splits them.

    Rows have `answers`, or one `completion`. Those whose prompt fills `max_length` are left out, as there.
    """

    def ids_of(messages: Any, **options: Any) -> Any:
        return trl_dpo._tokenize(tokenizer, messages, **options)["input_ids"]

    def tokenised(row: dict[str, Any]) -> dict[str, Any]:
        kwargs = row["chat_template_kwargs"]
        prompt = ids_of(row["prompt"], add_generation_prompt=True, **kwargs)
        answers = row["answers"] if "answers" in row else [row["completion"]]
        texts = [ids_of(row["prompt"] + answer, **kwargs) for answer in answers]
        start = min(trl_dpo.common_prefix_length(prompt, text) for text in texts)
        return {"prompt_ids": prompt[:start], "answer_ids": [text[start:] for text in texts]}

    with trl_dpo.global_then_local_main_first():
        options = {"num_proc": args.dataset_num_proc}
        dataset = dataset.map(tokenised, desc=f"Tokenizing {name} dataset", **options)
        if args.max_length is None or getattr(args, "truncation_mode", "keep_start") != "keep_start":
            return dataset
        return dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length, **options)


@dataclass
class Collator:
    """Prompts with their lists as one batch: B prompts, N answers in all, the longest list of K.

    Returns `relevance` (0 where there is no answer) and `present`, each [B, K]; the N texts, prompt by prompt and best
    first, as TRL's collator has them, each of its columns [N, L]; and `id`, the prompts' ids.
    """

    of_pairs: Any  # TRL's DataCollatorForPreference

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        longest = max(len(one["relevance"]) for one in examples)
        padding = [longest - len(one["relevance"]) for one in examples]
        relevance = [[*one["relevance"], *[0.0] * more] for one, more in zip(examples, padding, strict=True)]
        present = [[True] * (longest - more) + [False] * more for more in padding]
        # TRL's collator wants a second side, which comes after the first.
        sides = [
            {"prompt_ids": one["prompt_ids"], "chosen_ids": answer, "rejected_ids": []}
            for one in examples
            for answer in one["answer_ids"]
        ]
        texts = self.of_pairs(sides)
        # The lists come first: transformers takes the first tensor's length for how much a batch counts in a mean.
        return {"relevance": torch.tensor(relevance), "present": torch.tensor(present)} | {
            "id": [one["id"] for one in examples],
            **{name: texts[name][: len(sides)] for name in TEXTS},
        }


Trainer: Any = object
trl_dpo: Any = dpo_trainer


class Listwise(Trainer):
    """Stands before TRL's DPOTrainer (1.15 or 1.16): learns from lists, and logs them under DPO's names.

    What is logged of chosen is of the best answers, of rejected of the worst ones, as of DPO on best-and-worst pairs.
    `rewards/accuracies` is the share of a list's pairs that the rewards order rightly, equal labels left out. Rewards
    are sums, for the `_norm` losses too.
    """

    _name = "LiPO"
    _tag_names = ["trl", "lipo"]  # noqa: RUF012
    _paper = {  # noqa: RUF012
        "title": "LiPO: Listwise Preference Optimization through Learning-to-Rank",
        "id": "2402.01878",
        "citation": "",
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.data_collator: Any = Collator(vars(self)["data_collator"])

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if "answer_ids" in dataset.column_names:  # TRL's `evaluate` prepares what it is given, prepared or not
            return dataset
        return tokenize(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["id", "prompt_ids", "answer_ids", "relevance"]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        shared = shared_prefix.of(self.accelerator.unwrap_model(self.model))
        with shared.lists(inputs["present"]) if shared else nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        texts = {name: inputs[name] for name in TEXTS}
        labels, present = inputs["relevance"], inputs["present"]
        output = model(
            input_ids=texts["input_ids"],
            attention_mask=texts["attention_mask"],
            labels=texts["input_ids"].masked_fill(texts["completion_mask"] == 0, -100),
            use_cache=False,
            fused_lm_head=True,
        )
        logps = output.log_probs[:, 1 - texts["input_ids"].shape[1] :].sum(1)
        drift = logps - torch.cat(self.compute_ref_log_probs(self.model, texts))
        rewards = self.beta * _lists(drift, present)
        lengths = _lists(texts["completion_mask"].sum(1).to(drift.dtype), present).clamp(min=1)
        loss = torch.zeros((), device=drift.device)
        for name, weight in zip(self.loss_types, self.loss_weights, strict=True):
            scores = rewards / lengths if name.endswith("_norm") else rewards
            loss = loss + weight * listwise.LOSSES[name.removesuffix("_norm")](scores, labels, present).mean()
        with torch.no_grad():
            ends = present.sum(1).cumsum(0)
            best, worst = ends - present.sum(1), ends - 1  # their rows
            for side, rows_of_side in (("chosen", best), ("rejected", worst)):
                self._log_mean(f"logps/{side}", logps[rows_of_side])
                self._log_mean(f"rewards/{side}", self.beta * drift[rows_of_side])
            self._log_mean("rewards/margins", self.beta * (drift[best] - drift[worst]))
            self._log_mean("rewards/accuracies", ordered_rightly(rewards, labels, present))
            if self.model.training:
                tokens = self.accelerator.gather(texts["attention_mask"].sum())
                self._total_train_tokens += int(tokens.sum())
            self._figures["num_tokens"] = [self._total_train_tokens]
        return (loss, output) if return_outputs else loss

    @property
    def _figures(self) -> Any:
        return self._metrics["train" if self.model.training else "eval"]

    def _log_mean(self, name: str, values: Any) -> None:
        self._figures[name].append(self.accelerator.gather(values).mean().item())


def ordered_rightly(rewards: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """[B] from [B, K]: of a list's pairs with unequal labels, the share whose better answer has the higher reward."""
    above = listwise.better(labels, present)
    right = above & (rewards[..., :, None] > rewards[..., None, :])
    return right.sum((-1, -2)) / above.sum((-1, -2)).clamp(min=1)


def _lists(values: Tensor, present: Tensor) -> Tensor:
    """[N] values, list by list, as [B, K], 0 where there is no answer."""
    return values.new_zeros(present.shape).masked_scatter(present, values)
