"""The recipe's `engine` section at work: what of it this run takes, why not the rest, and how it is put into a trainer.

Each part changes what a step costs, none changes what it computes: losses, metrics and data order stay TRL's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_cli import machine, models, processes
from dpo_cli.errors import DpoError, either
from dpo_cli.recipe import Recipe
from dpo_cli.train import reference_cache, shared_prefix, token_budget
from dpo_cli.train.memory import Device, parse_memory_limit, plan
from dpo_cli.train.methods import METHODS
from dpo_cli.train.preflight import fit, lengths_of, use_micro_batch

PARTS = ("shared_prefix", "token_budget", "reference_cache")


@dataclass
class Chosen:
    """What a run takes, as its manifest keeps it; a resumed run takes the same again."""

    micro_batch: int  # pairs, or rows, that the trainer is given at once; with a token budget, a step's
    token_budget: int | None = None
    gradient_checkpointing: bool = False
    shared_prefix: bool = False
    reference_cache: bool = False
    # Why a part that the recipe leaves open is not taken.
    notes: list[str] = field(default_factory=list)
    unit: str = "pairs"

    def record(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("notes", "unit")}

    def line(self) -> str:
        """For the screen: `shared prefix, 1024 tokens at once, no checkpointing`."""
        rows = f"one {self.unit.removesuffix('s')}" if self.micro_batch == 1 else f"{self.micro_batch} {self.unit}"
        what = f"{self.token_budget} tokens" if self.token_budget else rows
        parts = ["shared prefix"] if self.shared_prefix else []
        parts += [f"{what} at once", "checkpointing" if self.gradient_checkpointing else "no checkpointing"]
        return ", ".join(parts + (["cached reference"] if self.reference_cache else []))


def choose(recipe: Recipe, trainer: Any, before: dict[str, Any] | None, say: Callable[[str], None]) -> Chosen:
    """Put into a trainer what the recipe asks for and this model, these losses and this memory allow.

    Args:
        trainer: TRL's, made by `token_budget.budgeted`, before `train()`.
        before: the choice of the run that is resumed; its numbers must stay the same.
        say: prints one line.

    Raises:
        DpoError: a part that the recipe insists on can't be had, or one pair does not fit the memory.
    """
    args, engine = trainer.args, recipe.engine
    chosen = Chosen(args.per_device_train_batch_size, unit=rows_are(trainer))
    method = METHODS[recipe.train.method]
    off = [part for part in PARTS if part not in method.engine and (method.reference or part != "reference_cache")]
    if off:
        chosen.notes.append(f"no {either(off).replace('_', ' ')}: made for train.method dpo")
    if before is None or before["shared_prefix"]:
        chosen.shared_prefix = _share_prefix(recipe, trainer, chosen.notes)
    trainer.shared_prefix = chosen.shared_prefix
    if before is not None:
        use_micro_batch(trainer, before["micro_batch"])
        trainer.token_budget = before["token_budget"]
        _checkpoint_layers(trainer, before["gradient_checkpointing"])
    else:
        _cut_by_tokens(recipe, trainer, chosen)
        planned = trainer.token_budget or args.per_device_train_batch_size
        size = fit(trainer, parse_memory_limit(engine.memory_limit)) if engine.preflight else planned
        if size != planned:
            what = "tokens" if trainer.token_budget else chosen.unit
            say(f"train: {planned} {what} at once don't fit the memory: {size} at once")
    chosen.micro_batch = args.per_device_train_batch_size
    chosen.token_budget = trainer.token_budget
    chosen.gradient_checkpointing = args.gradient_checkpointing
    return chosen


def cache_reference(
    recipe: Recipe, trainer: Any, runs: Path, before: dict[str, Any] | None, say: Callable[[str], None]
) -> bool:
    """Compute the reference once for all runs of a folder, where that pays, and have the trainer read it.

    It pays where each pair is seen more than once, or where the rows are there already.
    """
    asked, args = recipe.engine.reference_cache, trainer.args
    if "reference_cache" not in METHODS[recipe.train.method].engine:
        return False
    if asked == "off" or (before is not None and not before["reference_cache"]):
        return False
    why_not = reference_cache.unsupported(recipe, trainer)
    if why_not:
        if asked == "on":
            raise _refused(recipe, "reference_cache", f"the reference can't be cached: {why_not}")
        return False
    cache = reference_cache.ReferenceCache.open(
        runs / ".reference_cache", reference_cache.facts(recipe, trainer.model, trainer)
    )
    data = trainer.train_dataset
    seen = args.max_steps * _step_pairs(trainer) if args.max_steps > 0 else args.num_train_epochs * len(data)
    missing = processes.from_main(lambda: cache.missing(data))
    if asked == "auto" and before is None and missing and seen <= len(data):
        return False
    say(f"train: reference of {missing} of {len(data)} pairs to compute, {len(data) - missing} from {cache.folder}")
    reference_cache.use(trainer, cache, batch_tokens=trainer.token_budget or 2 * args.max_length)
    return True


# ------------------------------------------------------------------------------------------------------------ pieces


def _refused(recipe: Recipe, key: str, message: str) -> DpoError:
    """For a part that the recipe insists on."""
    return DpoError(message, where=recipe.where("engine", key), hint=f"set engine.{key}: auto")


def _share_prefix(recipe: Recipe, trainer: Any, notes: list[str]) -> bool:
    """Install the shared prefix and hold it against the stock path on a real batch; False where it can't be had."""
    asked = recipe.engine.shared_prefix
    if asked == "off" or "shared_prefix" not in METHODS[recipe.train.method].engine:
        return False
    unsloth = models.patched_by_unsloth(type(trainer))
    model = trainer.accelerator.unwrap_model(trainer.model)
    why_not = shared_prefix.unsupported(model, unsloth)
    if why_not is None and asked == "auto" and recipe.lora.dropout and not recipe.train.disable_dropout:
        why_not = "LoRA's dropout would fall on both texts alike"
    if why_not is None:
        shared = shared_prefix.install(model, unsloth)
        rows = [trainer.train_dataset[index] for index in range(min(4, len(trainer.train_dataset)))]
        check = shared_prefix.check(trainer, shared, trainer.data_collator(rows))
        if processes.any_of(not check.ok):
            shared.enabled = False
            why_not = check.error or (
                f"its log-probabilities differ from the stock path's by {check.difference:.1e}, and may by "
                f"{check.limit:.1e}"
            )
            print(f"warning: the shared prefix is off: {why_not}", file=sys.stderr, flush=True)
    if why_not is None:
        return True
    if asked == "on":
        raise _refused(recipe, "shared_prefix", f"the prompt can't be shared: {why_not}")
    notes.append(f"no shared prefix: {why_not}")
    return False


def _cut_by_tokens(recipe: Recipe, trainer: Any, chosen: Chosen) -> None:
    """Take the token budget and the checkpointing that the memory plan says, where the recipe leaves them open."""
    args, asked, fits = trainer.args, recipe.engine.token_budget, METHODS[recipe.train.method].engine
    why_not: str | None = "engine.token_budget: off" if asked == "off" else "made for train.method dpo"
    if asked != "off" and "token_budget" in fits:
        why_not = token_budget.stays_whole(trainer)
    if why_not and isinstance(asked, int):
        raise _refused(recipe, "token_budget", f"a step can't be cut by tokens: {why_not}")
    if why_not and asked == "auto" and "token_budget" in fits:
        chosen.notes.append(f"no token budget: {why_not}")
    device: Device = "cuda" if args.device.type == "cuda" else "cpu"
    available = available_memory(recipe)
    try:
        found = plan(
            recipe,
            lengths_of(trainer.train_dataset),
            trainer.model.config,
            available,
            device=device,
            shared=chosen.shared_prefix,
            budgeted=why_not is None,
        ).recipe
    except DpoError:  # an architecture that the formulas don't know
        _checkpoint_layers(trainer, recipe.train.gradient_checkpointing is not False)
        return
    _checkpoint_layers(trainer, found.checkpointing)
    if found.token_budget:
        trainer.token_budget = found.token_budget
        use_micro_batch(trainer, _step_pairs(trainer) // processes.count())


def _checkpoint_layers(trainer: Any, on: bool) -> None:
    """Switch gradient checkpointing for `train()`, as TRL's constructor does."""
    if on and not trainer.args.gradient_checkpointing:
        trainer.model.enable_input_require_grads()
    trainer.args.gradient_checkpointing = on


def available_memory(recipe: Recipe) -> int:
    """Bytes that a run may take: of the card, else of this machine, or `engine.memory_limit` where that is less."""
    import torch

    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    else:
        there = machine.total_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes beside this one
    return min(there, parse_memory_limit(recipe.engine.memory_limit) or there)


def rows_are(trainer: Any) -> str:
    """What a row of the trainer's data is called: pairs, rows with one answer, or prompts with all their answers."""
    columns = trainer.train_dataset.column_names
    return "rows" if "label" in columns else "prompts" if "relevance" in columns else "pairs"


def _step_pairs(trainer: Any) -> int:
    """Pairs of an optimizer step, over all processes."""
    return int(trainer.get_total_train_batch_size(trainer.args))
