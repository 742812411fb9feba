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
from dpo_cli.train.memory import CUDA_CONTEXT, Device, Memory, Precision, offloaded, parse_memory_limit, predict
from dpo_cli.train.methods import METHODS
from dpo_cli.train.shape import LINEARS, Shape

Lengths = tuple[int, ...]  # tokens of a row's prompt and of its answers: chosen and rejected, KTO's one, LiPO's list

# From this max_length on, Unsloth's checkpointing offloads; below, it is the usual one (2026.10.9, models/_utils.py).
UNSLOTH_OFFLOADS = 512
# Where a larger pass gains no more. On a GPU its launches are hidden by then (a guess until one has run). On a CPU
# 1,024 took 10.7 CPU seconds, 2,048 took 13.4 and 4,096 15.4 (tests/benchmarks, 512 wide): more leaves the caches.
LARGEST_PASS: dict[str, int] = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Setting:
    """How a step is cut, by tokens or by pairs, and whether layers are computed twice; with the peak."""

    micro_batch: int
    accumulation: int
    checkpointing: bool
    memory: Memory
    token_budget: int | None = None  # tokens of a pass; the whole step is then one micro-batch
    host: int = 0  # bytes that Unsloth's checkpointing keeps in the host's memory

    @property
    def as_settings(self) -> str:
        checkpointing = f"gradient_checkpointing: {str(self.checkpointing).lower()}"
        if self.token_budget:
            return f"engine: {{token_budget: {self.token_budget}}}, train: {{{checkpointing}}}"
        return (
            f"train: {{per_device_train_batch_size: {self.micro_batch}, "
            f"gradient_accumulation_steps: {self.accumulation}, {checkpointing}}}"
        )

    @property
    def at_once(self) -> str:
        return f"{self.token_budget} tokens" if self.token_budget else f"{self.micro_batch} x {self.accumulation}"


@dataclass(frozen=True)
class Plan:
    """What the recipe comes to, what there is, and the setting to take: None where none fits."""

    recipe: Setting
    available: int | None
    card: str
    longest: int  # tokens of the longest row
    proposal: Setting | None
    notes: tuple[str, ...] = ()
    rows_are: str = "pairs"

    @property
    def fits(self) -> bool:
        return self.available is None or self.recipe.memory.total <= self.available

    @property
    def verdict(self) -> str:
        if self.available is None:
            return "How much memory there is, is not known."
        if self.proposal is None:
            return "It does not fit, not even one pair at a time: lower model.max_length, or take a smaller model."
        if not self.fits:
            return f"It does not fit. This does, with the same effective batch: {self.proposal.as_settings}"
        if self.proposal == self.recipe:
            return "It fits."
        return f"It fits. So does this, without computing layers twice: {self.proposal.as_settings}"


def plan(
    recipe: Recipe,
    pairs: Sequence[Lengths],
    config: Any,
    available_bytes: int | None,
    *,
    device: Device = "cuda",
    unsloth: bool = False,
    card: str | None = None,
    shared: bool = False,
    budgeted: bool = False,
) -> Plan:
    """Predict the peak of a recipe at its longest pairs, and choose the setting to take.

    Tried are passes by `budgets`, or micro-batches by `cuts`; first without gradient checkpointing, and with it only
    where one pair at a time does not fit without. (Checkpointing costs a third forward, while more at once gains
    little.) What the recipe sets itself, it keeps; where it then does not fit, a proposal says what would. The
    effective batch stays as it is.

    Args:
        pairs: token counts of the pairs, KTO's rows or LiPO's lists.
        config: the model's transformers config.
        available_bytes: the card's memory, or `engine.memory_limit`; None where nobody knows.
        unsloth: the layers and their checkpointing are Unsloth's, which keep less on the card.
        shared: the prompt is computed once a pair, and nothing is padded.
        budgeted: a step is cut by tokens: `engine.token_budget`.
    """
    train, method, data = recipe.train, METHODS[recipe.train.method], _Batches(pairs, recipe.model.max_length, shared)
    sizes = _sizes(recipe, data.tokens(1), device, budgeted)
    peaks = [
        _setting(recipe, config, data, device, unsloth, size, checkpointing)
        for checkpointing in (False, True)
        for size in sizes
    ]
    open_size = recipe.engine.token_budget == "auto" and budgeted
    allowed = [
        one
        for one in peaks
        if train.gradient_checkpointing in (None, one.checkpointing)
        and (open_size or (one.micro_batch, one.token_budget) == (sizes[0][0], sizes[0][2]))
    ]

    def fits(one: Setting) -> bool:
        return available_bytes is None or one.memory.total <= available_bytes

    own = next(filter(fits, allowed), allowed[-1])
    proposal = own if available_bytes is None else next(filter(fits, peaks), None)
    notes = () if method.reference else (f"No reference: {train.method} needs none.",)
    return Plan(own, available_bytes, card or device, data.longest, proposal, notes, method.rows_are)


def available_memory(recipe: Recipe) -> int:
    """Return the bytes that a run may take: free on the card, else this machine's, or `engine.memory_limit` if less."""
    if torch.cuda.is_available():
        there = gpu.free_gpu_memory() + CUDA_CONTEXT  # the plan counts our context, which the card calls taken
    else:
        there = machine.total_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes beside this one
    return min(there, parse_memory_limit(recipe.engine.memory_limit) or there)


def budgets(largest: int, alone: int) -> list[int]:
    """Tokens of a pass to try: the largest, then 2**n and 3 * 2**n down to a pass that holds the longest pair alone.

    So whoever goes on from a smaller one, as the preflight does, tries the same: 8192, 6144, 4096, 3072, …
    """
    steps = {largest, *(part << times for part in (2, 3) for times in range(largest.bit_length()))}
    tried = sorted((step for step in steps if alone < step <= largest), reverse=True)
    return [*tried, alone] if tried else [largest]


def cuts(micro_batch: int, accumulation: int) -> Iterator[tuple[int, int]]:
    """(micro-batch, accumulation) with the same product, halving the first: down, where it is odd, to what divides."""
    effective = micro_batch * accumulation
    while True:
        yield micro_batch, effective // micro_batch
        if micro_batch == 1:
            return
        micro_batch //= 2
        while effective % micro_batch:
            micro_batch -= 1


# ------------------------------------------------------------------------------------------------------------ pieces


def _setting(
    recipe: Recipe,
    config: Any,
    data: _Batches,
    device: Device,
    unsloth: bool,
    size: tuple[int, int, int | None],
    checkpointing: bool,
) -> Setting:
    """A setting with its peak."""
    shape, method = Shape.of(config), METHODS[recipe.train.method]
    named = with_targets(recipe, config.to_dict()).lora.target_modules
    pairs_at_once, times, budget = size
    tokens = max(budget, data.tokens(1)) if budget else data.tokens(pairs_at_once)
    offloading = unsloth and device == "cuda" and recipe.model.max_length >= UNSLOTH_OFFLOADS
    memory = predict(
        shape,
        precision=_precision(recipe, config, device),
        rank=recipe.lora.r,
        targets=LINEARS if named == "auto" else named,
        optimizer=recipe.train.optim,
        checkpointing=checkpointing,
        tokens=tokens,
        scored=min(data.scored(None if budget else pairs_at_once), tokens),
        row=0 if data.shared else data.longest,
        again=data.again,
        device=device,
        unsloth=unsloth,
        offloading=offloading,
        fused_head=not method.whole_logits,
        reference_copy=method.reference and recipe.model.adapter is not None,
    )
    host = offloaded(shape, tokens) if checkpointing and offloading else 0
    return Setting(pairs_at_once, times, checkpointing, memory, budget, host)


def _sizes(recipe: Recipe, alone: int, device: Device, budgeted: bool) -> list[tuple[int, int, int | None]]:
    """(micro-batch, accumulation, token budget) to try, the largest first; `alone`: tokens of the longest row."""
    train, asked = recipe.train, recipe.engine.token_budget
    micro, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    if budgeted:
        largest = asked if isinstance(asked, int) else LARGEST_PASS[device]
        return [(micro * accumulation, 1, budget) for budget in budgets(largest, alone)]
    least = 2 if set(train.losses) & set(METHODS[train.method].neighbours) else 1
    return [(*cut, None) for cut in cuts(micro, accumulation) if cut[0] >= least]


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


def _precision(recipe: Recipe, config: Any, device: Device) -> Precision:
    if recipe.model.load_in_4bit or getattr(config, "quantization_config", None) is not None:
        return "nf4"
    names: dict[str, Precision] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return names.get(recipe.model.dtype, "bf16" if device == "cuda" else "fp32")
