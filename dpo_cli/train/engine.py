"""The recipe's `engine` section at work: what of it this run takes, why not the rest, and how it is put into a trainer.

Each part changes what a step costs, none changes what it computes: losses, metrics and data order stay TRL's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli import backends, processes
from dpo_cli.errors import DpoError, either
from dpo_cli.gpu import limit_memory
from dpo_cli.progress import Step
from dpo_cli.recipe import Recipe
from dpo_cli.train import prefix_check, reference_cache, shared_prefix, token_budget
from dpo_cli.train.memory import CUDA_CONTEXT, Device, memory_limit
from dpo_cli.train.methods import METHODS
from dpo_cli.train.plan import Cut, available_memory, cuts, plan
from dpo_cli.train.preflight import fit, use
from dpo_cli.train.rows import lengths_of, row_lengths

PARTS = ("shared_prefix", "token_budget", "reference_cache")


@dataclass
class Chosen:
    """What a run takes; a resumed run takes the same again."""

    cut: Cut
    shared_prefix: bool
    unit: str  # what rows are called
    notes: Sequence[str]  # why a part that the recipe leaves open is not taken
    reference_cache: bool = False

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "micro_batch": self.cut.micro_batch,
            "token_budget": self.cut.token_budget,
            "gradient_checkpointing": self.cut.checkpointing,
            "shared_prefix": self.shared_prefix,
            "reference_cache": self.reference_cache,
        }

    def line(self) -> str:
        """For the screen: `shared prefix, 1024 tokens at once, no checkpointing`."""
        parts = ["shared prefix"] if self.shared_prefix else []
        parts += [f"{self.cut.at_once(self.unit)} at once", f"{'' if self.cut.checkpointing else 'no '}checkpointing"]
        return ", ".join(parts + (["cached reference"] if self.reference_cache else []))


def choose(recipe: Recipe, trainer: Any, before: dict[str, Any] | None, say: Callable[[str], None]) -> Chosen:
    """Put into a trainer what the recipe asks for and this model, these losses and this memory allow.

    Args:
        trainer: TRL's, with `TokenBudget` before it, before `train()`.
        before: the choice of the run that is resumed; its numbers must stay the same.
        say: prints one line.

    Raises:
        DpoError: a part that the recipe insists on can't be had, or one pair does not fit the memory.
    """
    args, method = trainer.args, METHODS[recipe.train.method]
    if args.device.type == "cuda":  # for training too, whether rows are tried before it or not
        limit = memory_limit(recipe)
        limit_memory(None if limit is None else limit - CUDA_CONTEXT)
    notes: list[str] = []
    off = [part for part in PARTS if part not in method.engine and (method.reference or part != "reference_cache")]
    if off:
        notes.append(f"no {either(off).replace('_', ' ')}: made for train.method dpo")
    shared = _install_sharing(recipe, trainer, notes) if before is None or before["shared_prefix"] else None
    can_cut = before is None and _can_be_cut(recipe, trainer, notes)

    def take(sharing: bool) -> Sequence[Cut]:
        trainer.shared_prefix = sharing
        tries = _tries(recipe, trainer, can_cut) if before is None else [_cut_before(trainer, before)]
        use(trainer, tries[0])
        return tries

    # First, for what is checked and tried has to run with the checkpointing of training.
    tries = take(shared is not None)
    if shared is not None and not _shares_exactly(recipe, trainer, shared, notes):
        tries = take(False)
    cut = tries[0]
    if before is None and recipe.engine.preflight:
        cut = fit(trainer, tries, memory_limit(recipe))
        if cut != tries[0]:
            on = ", with gradient checkpointing" if cut.checkpointing > tries[0].checkpointing else ""
            tried, instead = tries[0].at_once(method.rows_are), cut.at_once(method.rows_are)
            say(f"train: {tried} at once don't fit the memory: {instead} at once{on}")
    return Chosen(cut, trainer.shared_prefix, method.rows_are, notes)


def cache_reference(
    recipe: Recipe,
    trainer: Any,
    runs: Path,
    before: dict[str, Any] | None,
    say: Callable[[str], None],
) -> bool:
    """Compute the reference once for all runs of a folder, where that pays, and have the trainer read it.

    It pays where each pair is seen more than once, or where the rows are there already.
    """
    asked, data = recipe.engine.reference_cache, trainer.train_dataset
    if asked == "off" or "reference_cache" not in METHODS[recipe.train.method].engine:
        return False
    if before is not None and not before["reference_cache"]:
        return False
    why_not = reference_cache.unsupported(recipe, trainer)
    if why_not and asked == "on":
        raise _refused(recipe, "reference_cache", f"the reference can't be cached: {why_not}")
    if why_not:
        return False
    cache = reference_cache.ReferenceCache(runs / ".reference_cache", reference_cache.facts(recipe, trainer))
    missing = cache.missing(data)
    if asked == "auto" and before is None and missing and not sees_pairs_again(trainer):
        return False
    kept = cache.folder.parent
    say(f"train: reference of {missing} of {len(data)} pairs to compute, {len(data) - missing} from {kept}")
    budget = trainer.token_budget or 2 * trainer.args.max_length
    with Step("computing the reference", total=missing, named=False) as step:
        reference_cache.use(trainer, cache, batch_tokens=budget, report=step.advance)
    return True


def sees_pairs_again(trainer: Any) -> bool:
    """Whether a training takes more than one epoch."""
    args, rows = trainer.args, len(trainer.train_dataset)
    return bool(args.max_steps * _step_pairs(trainer) > rows if args.max_steps > 0 else args.num_train_epochs > 1)


def rows_of_a_pass(trainer: Any, indices: list[int]) -> list[dict[str, Any]]:
    """As many of these rows as one planned pass takes; the first even where it is too long."""
    rows, tokens = list[dict[str, Any]](), 0
    for index in indices[: trainer.args.per_device_train_batch_size]:
        row = trainer.train_dataset[index]
        tokens += sum(row_lengths(row))
        if rows and trainer.token_budget and tokens > trainer.token_budget:
            break
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------------ pieces


def _refused(recipe: Recipe, key: str, message: str) -> DpoError:
    return DpoError(message, where=recipe.where("engine", key), hint=f"set engine.{key}: auto")


def _install_sharing(recipe: Recipe, trainer: Any, notes: list[str]) -> shared_prefix.SharedPrefix | None:
    """Install the shared prefix; None where the recipe, the method or the model goes without."""
    asked = recipe.engine.shared_prefix
    if asked == "off" or "shared_prefix" not in METHODS[recipe.train.method].engine:
        return None
    unsloth = backends.patched_by_unsloth(type(trainer))
    model = trainer.accelerator.unwrap_model(trainer.model)
    why_not = shared_prefix.unsupported(model, unsloth)
    if why_not is None and asked == "auto" and recipe.lora.dropout and not recipe.train.disable_dropout:
        why_not = "LoRA's dropout would fall on both texts alike"
    if why_not is None:
        return shared_prefix.install(model, unsloth)
    _go_without_sharing(recipe, why_not, notes)
    return None


def _shares_exactly(recipe: Recipe, trainer: Any, shared: shared_prefix.SharedPrefix, notes: list[str]) -> bool:
    """Compare sharing with the stock path on real rows, forward and backward; switch it off where they differ."""
    compiled = backends.patched_by_unsloth(type(trainer)) and trainer.args.device.type == "cuda"
    rows = rows_of_a_pass(trainer, list(range(min(4, len(trainer.train_dataset)))))
    with Step("compiling kernels, once (a minute or two)" if compiled else "checking the shared prompt"):
        check = prefix_check.check(trainer, shared, trainer.data_collator(rows))
    if not processes.any_of(not check.ok):
        return True
    shared.enabled = False
    why_not = check.why_not()
    print(f"warning: the shared prefix is off: {why_not}", file=sys.stderr, flush=True)
    _go_without_sharing(recipe, why_not, notes)
    return False


def _go_without_sharing(recipe: Recipe, why_not: str, notes: list[str]) -> None:
    if recipe.engine.shared_prefix == "on":
        raise _refused(recipe, "shared_prefix", f"the prompt can't be shared: {why_not}")
    notes.append(f"no shared prefix: {why_not}")


def _can_be_cut(recipe: Recipe, trainer: Any, notes: list[str]) -> bool:
    """Whether a step's pairs may be cut by tokens; ask before the micro-batch is made the step."""
    asked = recipe.engine.token_budget
    if asked == "off":
        return False
    fits = "token_budget" in METHODS[recipe.train.method].engine
    why_not = token_budget.stays_whole(trainer) if fits else "made for train.method dpo"
    if why_not and asked != "auto":
        raise _refused(recipe, "token_budget", f"a step can't be cut by tokens: {why_not}")
    if why_not and fits:
        notes.append(f"no token budget: {why_not}")
    return why_not is None


def _tries(recipe: Recipe, trainer: Any, can_cut: bool) -> Sequence[Cut]:
    """How a step may be cut, best first, by the memory plan."""
    available = processes.least(available_memory(recipe))  # all have to take the same, and a desktop is on one card
    device: Device = "cuda" if trainer.args.device.type == "cuda" else "cpu"
    try:
        return plan(
            recipe,
            lengths_of(trainer.train_dataset),
            trainer.model.config,
            available,
            device=device,
            unsloth=backends.patched_by_unsloth(type(trainer)),
            shared=trainer.shared_prefix,
            budgeted=can_cut,
        ).tries
    except DpoError:  # an architecture that the formulas don't know
        return list(cuts(recipe, [recipe.train.gradient_checkpointing is not False], None, device))


def _cut_before(trainer: Any, before: dict[str, Any]) -> Cut:
    """That of the run that is resumed."""
    args, micro = trainer.args, before["micro_batch"]
    return Cut(
        micro_batch=micro,
        accumulation=args.per_device_train_batch_size * args.gradient_accumulation_steps // micro,
        checkpointing=before["gradient_checkpointing"],
        token_budget=before["token_budget"],
    )


def _step_pairs(trainer: Any) -> int:
    """Pairs of an optimizer step, over all processes."""
    return int(trainer.get_total_train_batch_size(trainer.args))
