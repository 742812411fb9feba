"""`engine.preflight`: try the longest pairs once before training, so that no run dies of memory at step 800."""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32

from dpo_cli.errors import DpoError
from dpo_cli.machine import ran_out_of_memory
from dpo_cli.progress import Step
from dpo_cli.train.memory import CUDA_CONTEXT, gib, state_bytes
from dpo_cli.train.plan import Cut
from dpo_cli.train.rows import lengths_of, row_lengths
from dpo_cli.train.token_budget import cost, groups, pair_sizes

# Counters that a training step of TRL (or transformers) moves on.
COUNTERS = ("_metrics", "_stored_metrics", "_total_train_tokens", "current_gradient_accumulation_steps")


def fit(trainer: Any, tries: Sequence[Cut], limit_bytes: int | None = None) -> Cut:
    """Have a trainer cut its steps by the first of these with which a forward and backward on its longest rows fits.

    On a CPU, which knows no such error, that is the first of all. No step is taken, and gradients, random states and
    TRL's counters are put back, so that a run after it is the run without it. Before `train()` only.

    Args:
        tries: of them the trainer has the first already.
        limit_bytes: what the process may take of the GPU; None: all of it.

    Raises:
        DpoError: none fits.
    """
    device = trainer.args.device
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled  # shards exist only once train() has begun
    if sharded or device.type != "cuda":
        return tries[0]
    longest = _longest_rows(trainer.train_dataset, tries[0].micro_batch)
    for cut in tries:
        use(trainer, cut)
        with Step(f"trying the longest rows, {cut.at_once('rows')} at once"):
            rows = _fullest_pass(trainer, longest) if cut.token_budget else longest[: cut.micro_batch]
            peak = _try(trainer, rows, cut.accumulation)
        if trainer.accelerator.num_processes > 1:  # all processes have to take the same
            peak = trainer.accelerator.gather(torch.tensor([float(peak)], device=device)).max().item()
        if peak <= (limit_bytes or math.inf) and peak < math.inf:
            return cut
    took = "more memory than there is" if peak == math.inf else f"{gib(peak)} GiB"
    may = f", and it may take {gib(limit_bytes)} GiB" if limit_bytes is not None else ""
    fix = "lower model.max_length" if cut.checkpointing else "set train.gradient_checkpointing: true"
    one = cut.micro_batch == 1 or cut.token_budget
    if not one:  # KTO's
        fix = f"lower train.per_device_train_batch_size (2 or more), {fix}"
    prompt, *answers = row_lengths(longest[0])
    raise DpoError(
        f"{'one row at a time does' if one else f'{cut.micro_batch} rows at once do'} not fit: the longest "
        f"({prompt + max(answers)} tokens a row) takes {took}{may}",
        where="model.max_length, train.gradient_checkpointing",
        hint=f"{fix}, or take a smaller model",
    )


def use(trainer: Any, cut: Cut) -> None:
    """Have a trainer cut its steps so."""
    args = trainer.args
    checkpoint_layers(trainer, cut.checkpointing)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = cut.micro_batch, cut.accumulation
    trainer._train_batch_size, trainer.token_budget = args.train_batch_size, cut.token_budget


def _fullest_pass(trainer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the pass with most tokens among those that a trainer would cut these rows into."""
    tokens, padded = pair_sizes(trainer, trainer.data_collator(rows)).tolist(), not trainer.shared_prefix
    passes = groups(tokens, trainer.token_budget, padded)
    return [rows[index] for index in max(passes, key=lambda one: cost(tokens, one, padded))]


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


def _longest_rows(data: Any, count: int) -> list[dict[str, Any]]:
    """Those whose answers take most, padded to the longest, as they are in a batch."""
    sizes = [(len(answers) * (prompt + max(answers))) for prompt, *answers in lengths_of(data)]
    return [data[index] for index in sorted(range(len(data)), key=lambda index: -sizes[index])[:count]]


def _try(trainer: Any, rows: list[dict[str, Any]], accumulation: int) -> float:
    """The peak of one training step on these rows, in bytes; infinity where memory ran out."""
    args, trained = trainer.args, [one for one in trainer.model.parameters() if one.requires_grad]
    state = sum(one.numel() * state_bytes(str(args.optim), one.element_size()) for one in trained)
    with _put_back(trainer):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)
        peak, optimizer = math.inf, None
        try:
            # Stands for the optimizer's state, which the first step will make.
            optimizer = torch.empty(state, dtype=torch.uint8, device=args.device)
            _step(trainer, rows, accumulation)
            peak = torch.cuda.max_memory_allocated() + CUDA_CONTEXT
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
