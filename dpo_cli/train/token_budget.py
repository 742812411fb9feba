"""`engine.token_budget`: an optimizer step's pairs in passes of about equal tokens, and the same gradients.

A DPO loss is a mean over pairs, so a step over n pairs may be cut into any groups g:

    gradient of the step = sum over g of |g| / n x gradient of the mean over g

Grouped by tokens, not by count, short pairs pay for no long one, and no pass takes more memory than planned. The
trainer gets a whole step's pairs at once (`use_micro_batch(trainer, effective)`: their order stays) and cuts them here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from dpo_cli.train.methods import cannot_be_cut
from dpo_cli.train.shared_prefix import pair_tokens

PER_ROW = ("input_ids", "attention_mask", "completion_mask")  # [2B, L], the chosen rows first
PER_PAIR = ("ref_chosen_logps", "ref_rejected_logps")  # [B]
# What TRL's means are taken over, by column of `_sizes`; all others are over pairs.
AVERAGED_OVER = {"entropy": 1, "logits/chosen": 2, "mean_token_accuracy": 2, "logits/rejected": 3}


def groups(tokens: Sequence[int], budget: int, padded: bool = False) -> list[list[int]]:
    """Pairs for passes of at most `budget` tokens: first-fit decreasing.

    Args:
        tokens: of each pair, as `pair_sizes` counts them.
        budget: tokens a pass, see `cost`; a pair longer than that goes alone.

    Returns:
        Indices into `tokens`, each once; the group of the longest pair first.
    """
    made: list[list[int]] = []
    for index in sorted(range(len(tokens)), key=lambda index: -tokens[index]):
        group = next((group for group in made if cost(tokens, [*group, index], padded) <= budget), None)
        if group is None:
            made.append(group := [])
        group.append(index)
    return made


def cost(tokens: Sequence[int], group: Sequence[int], padded: bool) -> int:
    """Tokens of a pass: all of its pairs', or, padded, two rows a pair as long as the longest."""
    taken = [tokens[index] for index in group]
    return 2 * len(taken) * max(taken) if padded else sum(taken)


def pair_sizes(trainer: Any, inputs: Any) -> Any:
    """[B]: a pair's tokens, its common opening counted once; without sharing its longer row's, padded."""
    if trainer.shared_prefix:
        return pair_tokens(inputs["input_ids"], inputs["attention_mask"])
    longer = inputs["attention_mask"].sum(1).view(2, -1).amax(0)
    return _round_up(longer, trainer.args.pad_to_multiple_of or 1)


def stays_whole(trainer: Any) -> str | None:
    """Why the steps of TRL's DPOTrainer can't be cut to the same numbers, or None.

    Ask before its micro-batch is made the step.
    """
    args = trainer.args
    if reason := cannot_be_cut(trainer.loss_types):
        return reason
    if trainer.aux_loss_enabled:
        return "the auxiliary loss of a mixture of experts is taken over the batch"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "DeepSpeed and FSDP keep the books of a step themselves"
    if any(name in str(args.optim).lower() for name in ("lomo", "layerwise")):
        return "the optimizer steps within the backward pass"
    # accelerate drops or fills up an epoch's last batch, so its size would show.
    uneven = args.gradient_accumulation_steps > 1 and (args.dataloader_drop_last or args.world_size > 1)
    if uneven and len(trainer.train_dataset) % trainer.get_total_train_batch_size(args):
        return "the pairs don't fill the last step, which would then be dropped or filled up with repeats"
    return None


Trainer: Any = object


class TokenBudget(Trainer):
    """Stands before TRL's trainer (1.15 or 1.16); its `training_step` cuts a batch into passes and reports it as one.

    A batch that fits one pass takes TRL's own step, and so does one that can't be cut (`stays_whole`). A step makes
    one entry in TRL's metrics, weighted by what each is a mean over: it equals that of the whole batch, to rounding.

    Several processes take as many passes, each with as many pairs as the others' (TRL gathers rows of equal count):
    their pairs are grouped by rank of length, at the longest of that rank. Gradients are exchanged once a step.
    """

    token_budget: int | None = None  # the most tokens a pass may take; None for TRL's own step
    shared_prefix: bool = True  # whether a pair's prompt is computed once, and nothing is padded
    _share = 1.0  # of the step's pairs in this pass

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if self._share == 1.0 else loss * self._share  # evaluation, with its tuples, is never cut

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        parts = self._parts(inputs)
        if len(parts) < 2:
            return super().training_step(model, inputs, *args, **kwargs)
        inputs = self._prepare_inputs(inputs)
        logged = self._metrics["train"]
        seen = {key: len(values) for key, values in logged.items()}
        pairs, sizes, total = sum(map(len, parts)), [], 0.0
        try:
            for number, chunk in enumerate(_cut(inputs, parts, self.args.pad_to_multiple_of or 1), 1):
                sizes.append(_sizes(chunk))
                self._share = len(parts[number - 1]) / pairs
                with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                    total = total + super().training_step(model, chunk, *args, **kwargs)
        finally:
            self._share = 1.0
        # As TRL gathers its own sums: that leaves out what fills up the last batch.
        weights = self.accelerator.gather_for_metrics(torch.stack(sizes)[None]).sum(0)
        for key, values in logged.items():
            new = values[seen.get(key, 0) :]
            if len(new) == len(parts):  # num_tokens is a running total, of which TRL keeps the last
                weight = weights[:, AVERAGED_OVER.get(key, 0)].tolist()
                mean = sum(w * value for w, value in zip(weight, new, strict=True)) / (sum(weight) or 1)
                values[seen.get(key, 0) :] = [mean]
        return total

    def _parts(self, inputs: Any) -> list[Any]:
        """The indices of each pass's pairs, on the device; nothing for a batch that is not to be cut."""
        if self.token_budget is None or not set(inputs) <= {*PER_ROW, *PER_PAIR} or stays_whole(self):
            return []
        inputs = self._prepare_inputs(inputs)  # on the device, where they mostly are already
        tokens = pair_sizes(self, inputs)
        order = tokens.argsort(descending=True, stable=True)
        most = self.accelerator.gather(tokens[order]).view(-1, len(tokens)).amax(0).tolist()
        return [order[group] for group in groups(most, self.token_budget, padded=not self.shared_prefix)]


def _sizes(inputs: Any) -> Any:
    """[4]: the pairs of a batch, its predicted completion tokens, and of these the chosen and the rejected."""
    chosen, rejected = inputs["completion_mask"][:, 1:].chunk(2)
    pairs = torch.tensor(len(chosen), device=chosen.device)
    return torch.stack([pairs, chosen.sum() + rejected.sum(), chosen.sum(), rejected.sum()])


def _cut(inputs: Any, parts: Sequence[Any], multiple: int) -> Iterator[dict[str, Any]]:
    """The batch's pairs by parts, without the columns that are padding in all of a part's rows."""
    pairs = len(inputs["input_ids"]) // 2
    for part in parts:
        rows = torch.cat([part, part + pairs])
        end = _round_up(int(inputs["attention_mask"][rows].any(0).nonzero()[-1]) + 1, multiple)
        yield {key: value[rows, :end] if key in PER_ROW else value[part] for key, value in inputs.items()}


def _round_up(number: Any, multiple: int) -> Any:
    return -(-number // multiple) * multiple
