"""TRL's trainer with our fixes: each is one override, and says what it is for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from dpo_cli import adapters
from dpo_cli.disk import writing
from dpo_cli.errors import DpoError
from dpo_cli.recipe import HELD_OUT
from dpo_cli.train.checkpoints import best_checkpoint, rotate, seal

FIX = "lower train.learning_rate; with float16, set model.dtype to bfloat16 or float32"
STILL = 3  # logged rows without any gradient are no accident
Trainer: Any = object  # what the fixes stand before; one class of its method, or Unsloth's of that


class Fixes(Trainer):
    """Stands before TRL's trainer, and

    - stops at a loss that is no number, with the ids of the pairs, and at such a gradient;
    - stops where no gradient ever moves a weight;
    - resumes, and at the end restores, the policy's adapter and no other;
    - says where the disk was full while a checkpoint was written;
    - calls a checkpoint whole when all of it is on disk, and only then removes older ones, by step and not by time;
    - goes on at the rate of the new schedule where there are more steps than before;
    - evaluates by language under names that tell the languages apart, and over all of them, weighted by pairs.
    """

    _language: str | None = None  # of the held-out pairs under evaluation
    remarks: Sequence[str] = ()  # on its rows, for the screen
    still = 0  # logged rows from the start on whose gradient was 0; -1: one was not
    checkpoint_limit: int | None = None  # in place of save_total_limit, which goes by the files' times

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            ids = _ids_of(inputs, self.train_dataset)
            named = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
            raise DpoError(
                f"the loss is {float(loss)}", where=f"data/train.jsonl, rows {named}", hint=f"look at these rows; {FIX}"
            )
        return loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # Where a checkpoint holds a copy of the reference, transformers (seen with 5.17) restores only that.
        adapters.load_adapter_weights(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        with writing(folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process saves a random state of its own
            if self.args.should_save:
                seal(folder / f"checkpoint-{self.state.global_step}")
                rotate(folder, self.checkpoint_limit, self.state.best_global_step)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        if checkpoint is not None and isinstance(scheduler, LambdaLR):
            # The optimizer has the last rate of the old schedule; of one that has not changed it is the same.
            shares = [share(scheduler.last_epoch) for share in scheduler.lr_lambdas]
            rates = [base * share for base, share in zip(scheduler.base_lrs, shares, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    def _load_best_model(self) -> None:
        best = best_checkpoint(Path(self.args.output_dir), self.state.best_global_step)
        adapters.load_adapter_weights(self.accelerator.unwrap_model(self.model), best)

    def evaluate(self, eval_dataset: Any = None, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(sets, dict):
            self._language = metric_key_prefix.removeprefix("eval_")
            return super().evaluate(eval_dataset, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = super().evaluate(eval_dataset, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        overall = {}
        for name in HELD_OUT:
            values = [metrics.get(f"eval_{language}_{name}") for language in sets]
            if None not in values:  # KTO has no accuracy
                counts = [len(rows) for rows in sets.values()]
                overall[f"eval_{name}"] = sum(map(mul, values, counts)) / sum(counts)
        self.log(overall)
        # Callbacks hear of each language on its own; those that wait for a figure over all hear it here.
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, overall)
        return metrics | overall

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self.model.training:  # TRL calls the figures of every held-out set eval_rewards/… and the like
            # CPO's and ORPO's trainers keep them under another name, with the prefix already.
            figures = self._metrics["eval"] if hasattr(self, "_metrics") else self._stored_metrics["eval"]
            for name in list(figures):
                first = "eval_" if name.startswith("eval_") else ""
                figures[f"{first}{self._language}_{name.removeprefix(first)}"] = figures.pop(name)
        norm = logs.get("grad_norm")
        if norm is not None and self.still >= 0:
            self.still = self.still + 1 if norm == 0.0 else -1
        super().log(logs, start_time)
        scaled = self.args.fp16 or self.is_deepspeed_enabled  # loss scalers pass such steps over
        if norm is not None and not math.isfinite(norm) and not scaled:
            raise DpoError(
                f"the gradient's norm is {norm} after {self.state.global_step} steps, and the weights with it",
                where=str(Path(self.args.output_dir).parent / "log.jsonl"),
                hint=f"start over with --fresh; {FIX}",
            )
        self.check_gradients(at_least=STILL)

    def check_gradients(self, at_least: int) -> None:
        """Raise where the gradient was 0 in all rows logged so far, if there are at least so many."""
        if self.still >= at_least:
            raise DpoError(
                f"nothing is learned: the gradient is 0 after {self.state.global_step} steps, and the loss stays",
                where=str(Path(self.args.output_dir).parent / "log.jsonl"),
                hint="look at the rows (`dpo-cli prepare --preview 3`), train.loss_type, and the model's weights",
            )


def _ids_of(inputs: Any, dataset: Any) -> list[str]:
    """The ids of the rows in a TRL batch: its own, or found by the tokens of chosen answers, or of labelled ones."""
    if "id" in inputs:
        return list(inputs["id"])
    answer = "completion_ids" if "completion_ids" in dataset.column_names else "chosen_ids"
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    wanted = {tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True)}
    found = []
    for row in dataset:
        tokens = tuple(row["prompt_ids"] + row[answer])
        if any(one and one == tokens[: len(one)] for one in wanted):
            found.append(row["id"])
    return found
