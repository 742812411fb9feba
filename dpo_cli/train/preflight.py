"""`engine.preflight`: try the longest pairs once before training, so that no run dies of memory at step 800."""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32

from dpo_cli import machine
from dpo_cli.errors import DpoError
from dpo_cli.machine import ran_out_of_memory
from dpo_cli.progress import Step
from dpo_cli.train.memory import CUDA_CONTEXT, gib, state_bytes
from dpo_cli.train.plan import budgets, cuts
from dpo_cli.train.shared_prefix import pair_tokens
from dpo_cli.train.token_budget import groups, padded_groups

PROMPT, ANSWERS, LIST = "prompt_ids", ("chosen_ids", "rejected_ids", "completion_ids"), "answer_ids"
# Counters that a training step of TRL (or transformers) moves on.
COUNTERS = ("_metrics", "_stored_metrics", "_total_train_tokens", "current_gradient_accumulation_steps")


class DoesNotFit(DpoError):
    """One pair at a time takes more memory than there is."""


def fit(trainer: Any, limit_bytes: int | None = None) -> int:
    """Try one forward and backward on the longest pairs; halve until they fit. Before `train()` only.

    Halved are the tokens of a pass where the trainer has a `token_budget`, else the pairs of a micro-batch; the
    effective batch stays. No step is taken, and gradients, random states and TRL's counters are put back, so that a
    run after it is the run without it.

    Args:
        limit_bytes: what the process may take; on a CPU, its resident memory. None: all of the GPU, and on a CPU
            nothing is tried, for it knows no such error; nor where a CPU's peak can't be measured.

    Returns:
        Tokens of a pass, or pairs of a micro-batch; they are set in the trainer.

    Raises:
        DoesNotFit: one pair at a time takes too much.
    """
    args, budget, micro = trainer.args, getattr(trainer, "token_budget", None), trainer.args.per_device_train_batch_size
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled  # shards exist only once train() has begun
    measurable = args.device.type == "cuda" or (limit_bytes is not None and machine.can_reset_peak())
    if sharded or not measurable:
        return int(budget or micro)
    rows = _longest_rows(trainer.train_dataset, micro)
    sizes = list(cuts(micro, args.gradient_accumulation_steps))
    # KTO's KL term is a mean over the rows at once, and TRL has made its pairs of them: fewer would be another loss.
    fixed = getattr(trainer, "calculate_KL", False)
    tries = _passes(trainer, rows) if budget else ((*cut, rows[: cut[0]]) for cut in (sizes[:1] if fixed else sizes))
    for size, times, some in tries:
        if budget:
            trainer.token_budget = size
        with Step(f"trying the longest rows, {size} {'tokens' if budget else 'rows'} at once"):
            peak = _try(trainer, some, times)
        if trainer.accelerator.num_processes > 1:  # all processes have to take the same
            peak = trainer.accelerator.gather(torch.tensor([float(peak)], device=args.device)).max().item()
        if peak <= (limit_bytes or math.inf) and peak < math.inf:
            if not budget:
                use_micro_batch(trainer, size)
            return size
    took = "more memory than there is" if peak == math.inf else f"{gib(peak)} GiB"
    may = f", and it may take {gib(limit_bytes)} GiB" if limit_bytes is not None else ""
    fix = "lower model.max_length" if args.gradient_checkpointing else "set train.gradient_checkpointing: true"
    at_once = "one pair at a time does"
    if fixed:
        at_once, fix = f"{micro} rows at once do", f"lower train.per_device_train_batch_size (2 or more), {fix}"
    prompt, *answers = row_lengths(rows[0])
    raise DoesNotFit(
        f"{at_once} not fit: the longest ({prompt + max(answers)} tokens a row) takes {took}{may}",
        where="model.max_length, train.gradient_checkpointing",
        hint=f"{fix}, or take a smaller model",
    )


def _passes(trainer: Any, rows: list[dict[str, Any]]) -> Iterator[tuple[int, int, list[dict[str, Any]]]]:
    """(tokens, 1, the rows of the fullest pass) from the trainer's budget down to the longest pair."""
    shared, batch = trainer.shared_prefix, trainer.data_collator(rows)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    tokens = (pair_tokens(ids, mask) if shared else mask.sum(1).view(2, -1).amax(0)).tolist()
    alone = max(tokens) if shared else 2 * max(tokens)

    def cost(group: list[int]) -> int:
        taken = [tokens[one] for one in group]
        return sum(taken) if shared else len(taken) * max(taken)

    for budget in budgets(trainer.token_budget, alone):
        made = groups(tokens, budget) if shared else padded_groups(tokens, budget)
        fullest = max(made, key=cost)
        yield budget, 1, [rows[one] for one in fullest]


def checkpoint_layers(trainer: Any, on: bool) -> None:
    """Switch gradient checkpointing, for now and for `train()`, where TRL or Unsloth reads it."""
    args, model = trainer.args, trainer.model
    if on and not args.gradient_checkpointing:  # as TRL's constructor does
        model.enable_input_require_grads()
    args.gradient_checkpointing = on
    if hasattr(model, "for_training"):
        # Unsloth's train() takes the mode that the model was loaded with, not the arguments. That mode is "unsloth"
        # (layer inputs go to the host) or, for short texts, True.
        mode = vars(trainer).setdefault("loaded_checkpointing", model._unsloth_gradient_checkpointing)
        model._unsloth_gradient_checkpointing = mode if on else False
        model.for_training(use_gradient_checkpointing=model._unsloth_gradient_checkpointing)
    elif on:
        options = {**(args.gradient_checkpointing_kwargs or {})}
        own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None, **own)
    else:
        model.gradient_checkpointing_disable()


def use_micro_batch(trainer: Any, pairs: int) -> None:
    """Set the pairs of a micro-batch, and the accumulation that keeps the effective batch."""
    args = trainer.args
    effective = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.per_device_train_batch_size, args.gradient_accumulation_steps = pairs, effective // pairs
    trainer._train_batch_size = args.train_batch_size


def lengths_of(data: Any) -> list[tuple[int, ...]]:
    """Of each row the tokens of its prompt and of each of its answers."""
    columns = [name for name in (PROMPT, *ANSWERS, LIST) if name in data.column_names]
    return [row_lengths(row) for row in data.select_columns(columns)]


def row_lengths(row: dict[str, Any]) -> tuple[int, ...]:
    """`lengths_of` a row: a pair's two answers, a labelled row's one, all of a list."""
    answers = [row[name] for name in ANSWERS if name in row] + row.get(LIST, [])
    return len(row[PROMPT]), *map(len, answers)


def _longest_rows(data: Any, count: int) -> list[dict[str, Any]]:
    """Those whose answers take most, padded to the longest, as they are in a batch."""
    sizes = [(len(answers) * (prompt + max(answers))) for prompt, *answers in lengths_of(data)]
    return [data[index] for index in sorted(range(len(data)), key=lambda index: -sizes[index])[:count]]


def _try(trainer: Any, rows: list[dict[str, Any]], accumulation: int) -> float:
    """The peak of one training step on these rows, in bytes; infinity where memory ran out."""
    args, trained = trainer.args, [one for one in trainer.model.parameters() if one.requires_grad]
    state = sum(one.numel() * state_bytes(str(args.optim), one.element_size()) for one in trained)
    with _put_back(trainer):
        _start_measuring(args.device)
        peak, optimizer = math.inf, None
        try:
            # Stands for the optimizer's state, which the first step will make. Ones: zeros may not be resident.
            optimizer = torch.ones(state, dtype=torch.uint8, device=args.device)
            _step(trainer, rows, accumulation)
            on_gpu = args.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated() + CUDA_CONTEXT if on_gpu else machine.peak_memory()
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        del optimizer
    return peak


def seconds_of(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """Time one forward and backward on these rows, after which the trainer is as it was."""
    with _put_back(trainer):
        start = time.perf_counter()
        _step(trainer, rows, 1)
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _step(trainer: Any, rows: list[dict[str, Any]], accumulation: int) -> None:
    """One training step of these rows, as `train()` computes it."""
    trainer.current_gradient_accumulation_steps = accumulation
    own, gathering = vars(trainer.model), vars(trainer.accelerator)
    forward = own.get("forward")
    if trainer.accelerator.native_amp:
        # As train() wraps it: accelerate makes outputs float32, of whole logits more than half of the peak.
        own["forward"] = convert_outputs_to_fp32(trainer.model.forward)
    # Each process is left to itself: one whose memory runs out would keep the others waiting for its metrics.
    gathering["gather"] = gathering["gather_for_metrics"] = lambda values, *_, **__: values
    try:
        with trainer.accelerator.autocast():
            trainer.training_step(trainer.model, trainer.data_collator(rows))
    finally:
        del gathering["gather"], gathering["gather_for_metrics"]
        own.pop("forward", None)
        if forward is not None:
            own["forward"] = forward


@contextmanager
def _put_back(trainer: Any) -> Iterator[None]:
    """torch's random states, counters, gradients and training mode as they were."""
    model = trainer.model
    counters = {name: copy.deepcopy(vars(trainer)[name]) for name in COUNTERS if name in vars(trainer)}
    training = model.training
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        for name in COUNTERS:
            vars(trainer).pop(name, None)
        vars(trainer).update(counters)
        model.zero_grad(set_to_none=True)
        model.train(training)
        gc.collect()
        if gpus:
            torch.cuda.empty_cache()


def _start_measuring(device: Any) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: what an earlier try left must not count
        if trim:
            trim(0)
        machine.reset_peak()
