"""How a run's step is cut so that it fits the memory: what `train --plan` shows (planned.py), and training takes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpo_cli import gpu, machine
from dpo_cli.families import with_targets
from dpo_cli.recipe import Recipe
from dpo_cli.train.memory import CUDA_CONTEXT, Device, Memory, Precision, memory_limit, predict
from dpo_cli.train.methods import METHODS
from dpo_cli.train.shape import LINEARS, Shape

Lengths = tuple[int, ...]  # tokens of a row's prompt and of its answers: chosen and rejected, KTO's one, LiPO's list

# From this max_length on, Unsloth's checkpointing offloads; below, it is the usual one (2026.10.9, models/_utils.py).
UNSLOTH_OFFLOADS = 512
# Where a larger pass gains no more. On a GPU its launches are hidden by then (a guess until one has run). On a CPU
# 1,024 took 10.7 CPU seconds, 2,048 took 13.4 and 4,096 15.4 (tests/benchmarks, 512 wide): more leaves the caches.
LARGEST_PASS: dict[str, int] = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a step is cut, by tokens or by rows, and whether layers are computed twice."""

    micro_batch: int  # rows; with a token budget, a whole step's
    accumulation: int
    checkpointing: bool
    token_budget: int | None = None  # tokens of a pass

    def at_once(self, unit: str) -> str:
        """For the screen: `1024 tokens`, `2 pairs`, `one pair`."""
        if self.token_budget:
            return f"{self.token_budget} tokens"
        return f"one {unit.removesuffix('s')}" if self.micro_batch == 1 else f"{self.micro_batch} {unit}"


@dataclass(frozen=True)
class Plan:
    """What to take of the memory that there is.

    Attributes:
        tries: what training may take: first what is predicted to fit, and then all that takes less.
        memory: the predicted peak of the first.
        available: bytes.
        longest: tokens of the longest row.
    """

    tries: Sequence[Cut]
    memory: Memory
    available: int
    longest: int

    @property
    def cut(self) -> Cut:
        return self.tries[0]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.available

    @property
    def verdict(self) -> str:
        if self.fits:
            return "It fits."
        fix = "lower model.max_length, or take a smaller model"
        if self.cut.micro_batch > 1 and not self.cut.token_budget:
            fix = f"lower train.per_device_train_batch_size and raise train.gradient_accumulation_steps, {fix}"
        return f"It does not fit: {'' if self.cut.checkpointing else 'set train.gradient_checkpointing: true, '}{fix}."


def plan(
    recipe: Recipe,
    pairs: Sequence[Lengths],
    config: Any,
    available_bytes: int,
    *,
    device: Device = "cuda",
    unsloth: bool = False,
    shared: bool = False,
    budgeted: bool = False,
) -> Plan:
    """Choose how to cut a recipe's steps, by the predicted peak of its longest pairs.

    Looked at are `cuts`, first without gradient checkpointing, and with it only where one pair at a time does not fit
    without. (Checkpointing costs a third forward, while more at once gains little.) What the recipe sets itself, it
    keeps. The effective batch stays as it is.

    Args:
        pairs: token counts of the pairs, KTO's rows or LiPO's lists.
        config: the model's transformers config.
        available_bytes: the card's memory, or `engine.memory_limit`.
        unsloth: the layers and their checkpointing are Unsloth's, which keep less on the card.
        shared: the prompt is computed once a pair, and nothing is padded.
        budgeted: a step is cut by tokens: `engine.token_budget`.

    Raises:
        DpoError: the formulas don't know this architecture.
    """
    data, asked = _Batches(pairs, recipe.model.max_length, shared), recipe.train.gradient_checkpointing
    modes = (False, True) if asked is None else (asked,)
    allowed = list(cuts(recipe, modes, data.tokens(1) if budgeted else None, device))
    size = allowed[0].micro_batch, allowed[0].token_budget  # what the recipe says
    same_size = [one for one in allowed if (one.micro_batch, one.token_budget) == size]
    planned = allowed if budgeted and recipe.engine.token_budget == "auto" else same_size
    for cut in planned:
        memory = _peak(recipe, config, data, device, unsloth, cut)
        if memory.total <= available_bytes:
            break
    return Plan(allowed[allowed.index(cut) :], memory, available_bytes, data.longest)


def available_memory(recipe: Recipe) -> int:
    """Return the bytes that a run may take: free on the card, else this machine's, or `engine.memory_limit` if less."""
    if torch.cuda.is_available():
        there = gpu.free_gpu_memory() + CUDA_CONTEXT  # the plan counts our context, which the card calls taken
    else:
        there = machine.total_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes beside this one
    return min(there, memory_limit(recipe) or there)


def cuts(recipe: Recipe, modes: Sequence[bool], alone: int | None, device: Device) -> Iterator[Cut]:
    """Cuts of a step to try, in each mode of checkpointing the largest first.

    They are by tokens where `alone` says how many the longest row has, else by rows. Passes are of 2**n and 3 * 2**n
    tokens: 8192, 6144, 4096, 3072, … Micro-batches are halved, down, where that is odd, to what divides the step's.
    """
    micro, effective = recipe.train.per_device_train_batch_size, recipe.train.gradient_accumulation_steps
    effective *= micro
    # A KL term over the rows at once would be another one over fewer.
    fixed = bool(set(recipe.train.losses) & set(METHODS[recipe.train.method].neighbours))
    for checkpointing in modes:
        if alone is not None:
            asked = recipe.engine.token_budget
            for budget in _budgets(asked if isinstance(asked, int) else LARGEST_PASS[device], alone):
                yield Cut(micro_batch=effective, accumulation=1, checkpointing=checkpointing, token_budget=budget)
            continue
        for size in [micro] if fixed else _micro_batches(micro, effective):
            yield Cut(micro_batch=size, accumulation=effective // size, checkpointing=checkpointing)


# ------------------------------------------------------------------------------------------------------------ pieces


def _budgets(largest: int, alone: int) -> list[int]:
    steps = {largest, *(part << times for part in (2, 3) for times in range(largest.bit_length()))}
    tried = sorted((step for step in steps if alone < step <= largest), reverse=True)
    return [*tried, alone] if tried else [largest]


def _micro_batches(micro: int, effective: int) -> Iterator[int]:
    while micro:
        yield micro
        micro //= 2
        while micro and effective % micro:
            micro -= 1


def _peak(recipe: Recipe, config: Any, data: _Batches, device: Device, unsloth: bool, cut: Cut) -> Memory:
    method = METHODS[recipe.train.method]
    named = with_targets(recipe, config.to_dict()).lora.target_modules
    rows = None if cut.token_budget else cut.micro_batch
    tokens = max(cut.token_budget, data.tokens(1)) if cut.token_budget else data.tokens(cut.micro_batch)
    return predict(
        Shape.of(config),
        precision=_precision(recipe, device),
        rank=recipe.lora.r,
        targets=LINEARS if named == "auto" else named,
        optimizer=recipe.train.optim,
        checkpointing=cut.checkpointing,
        tokens=tokens,
        scored=min(data.scored(rows), tokens),
        row=0 if data.shared else data.longest,
        again=data.again,
        unsloth=unsloth,
        offloading=recipe.model.max_length >= UNSLOTH_OFFLOADS,
        fused_head=not method.whole_logits,
        reference_copy=method.reference and recipe.model.adapter is not None,
    )


class _Batches:
    """What the longest rows of a data set take, as many of them at once as are asked for."""

    def __init__(self, pairs: Sequence[Lengths], limit: int, shared: bool) -> None:
        cut = [(prompt, *(min(answer, limit - prompt) for answer in answers)) for prompt, *answers in pairs]
        self.rows, self.shared = sorted(cut, key=sum, reverse=True), shared
        self.longest = max((prompt + max(answers) for prompt, *answers in cut), default=0)  # tokens of a text

    @property
    def again(self) -> float:
        """Tokens of the texts after the first, per token of a stream; for `Shape.kept`."""

        def share(rows: list[Lengths]) -> float:
            further = sum(prompt + answer for prompt, _, *answers in rows for answer in answers)
            return further / max(sum(map(sum, rows)), 1)

        return max(share(self.rows), share(self.rows[:1])) if self.shared else 0.0

    def tokens(self, count: int) -> int:
        """Positions of a forward of so many rows, padding included."""
        if self.shared:
            return sum(map(sum, self.rows[:count]))
        return count * self.longest * max((len(row) - 1 for row in self.rows), default=2)

    def scored(self, count: int | None) -> int:
        """Answer tokens of as many rows at most."""
        answers = sorted((sum(max(answer, 0) for answer in some) for _, *some in self.rows), reverse=True)
        return sum(answers[:count])


def _precision(recipe: Recipe, device: Device) -> Precision:
    if recipe.model.load_in_4bit:
        return "nf4"
    names: dict[str, Precision] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return names.get(recipe.model.dtype, "bf16" if device == "cuda" else "fp32")
