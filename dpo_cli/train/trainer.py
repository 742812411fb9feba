"""One training run: TRL's trainer of the method on the prepared rows, every argument passed, resumable, log kept."""

from __future__ import annotations

import json
import logging
import math
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback, TrainerState

from dpo_cli import adapters, backends, chat, models, processes, show
from dpo_cli.disk import read_json, write_json
from dpo_cli.errors import INTERRUPTED, DpoError
from dpo_cli.machine import ran_out_of_memory
from dpo_cli.progress import Step
from dpo_cli.recipe import Recipe
from dpo_cli.recipe.train import DEFAULT_METHOD
from dpo_cli.run import Run
from dpo_cli.train.checkpoints import Start, best_checkpoint, is_last, start_log, start_of
from dpo_cli.train.config import trl_config
from dpo_cli.train.engine import cache_reference, choose
from dpo_cli.train.methods import LOSSES, METHODS
from dpo_cli.train.progress import Progress, StopAfterStep, peak_memory, print_remark
from dpo_cli.train.rows import check_answers, check_fills_a_step, held_out_rows, train_rows
from dpo_cli.train.token_budget import TokenBudget
from dpo_cli.train.trl_fixes import Fixes
from dpo_cli.train.watchdog import Watchdog, WatchdogCallback


def train(recipe: Recipe, run: Run, *, fresh: bool = False, quiet: bool = False) -> None:
    """Train a LoRA on `data/train.jsonl`; a run that was cut short goes on from its last whole checkpoint.

    Of several processes, as `accelerate launch` starts them, only the main one writes and prints.

    Raises:
        DpoError: the run to be resumed was made from something else, the data don't fit the model, or it was
            interrupted (exit code 130).
    """
    quiet = quiet or not processes.is_main()
    say: Callable[[str], None] = (lambda line: None) if quiet else show.say
    begun = Start() if fresh else processes.from_main(lambda: start_of(recipe, run))
    backend = backends.choose_backend(recipe)
    backends.import_backend(backend)
    trainer = build(recipe, run, backend)
    _check_longer(recipe, total_steps(trainer), begun)

    before = processes.from_main(lambda: run.record("train").get("engine")) if begun.checkpoint else None
    chosen = choose(recipe, trainer, before, say)
    chosen.reference_cache = cache_reference(recipe, trainer, run.folder.parent, before, say)

    log, stop = run["train"] / "log.jsonl", StopAfterStep()
    early = recipe.engine.early_stopping
    shown = Progress(log, stop, quiet, early.patience if early else None)
    for callback in (shown, *([NewRate(say)] if begun.longer else []), *_watchers(recipe, trainer, quiet)):
        trainer.add_callback(callback)
    facts = {"backend": backend.name, "engine": chosen.record(), **_facts(recipe, trainer)}
    record = processes.from_main(lambda: _begin(recipe, run, begun, facts, log))
    say(f"{_introduction(recipe, trainer, begun, record['device'])}\n  backend {backend.name}: {backend.why}")
    for line in (*begun.remarks, *trainer.remarks, chosen.line(), *_notes(recipe, trainer), *chosen.notes):
        say(textwrap.fill(line, 80, initial_indent="  ", subsequent_indent="    "))

    start = time.monotonic()
    with stop, shown:
        _go(recipe, trainer, begun, record)
    seconds = time.monotonic() - start
    _check_not_stopped(run, trainer, stop)
    trainer.check_gradients(at_least=1)
    metrics = _metrics(recipe, trainer, log, seconds, begun.step)
    _save(recipe, run, trainer, record, metrics)
    say(_summary(recipe, run, metrics))


def build(recipe: Recipe, run: Run, backend: backends.Backend, output: Path | None = None) -> Any:
    """TRL's trainer for a recipe, with the model, its fresh or continued LoRA, and the run's rows; nothing has run.

    Args:
        output: a folder that TRL makes and may write to; the run's unless one is named.
    """
    train_set = train_rows(recipe, run.train_pairs)
    check_fills_a_step(recipe, len(train_set))
    eval_sets = held_out_rows(recipe, run.eval_pairs) if recipe.train.eval_strategy != "no" else None
    model, tokenizer = models.load_for_training(recipe, backend)
    method = METHODS[recipe.train.method]
    config_class, trainer_class = method.classes()  # after Unsloth, which patches them
    if backend.name == "unsloth" and not backends.patched_by_unsloth(trainer_class):
        raise DpoError("Unsloth did not replace TRL's trainer", hint="set engine.backend: hf, or reinstall unsloth")
    args = trl_config(recipe, run, config_class, len(train_set))
    args.output_dir = str(output or run.checkpoints)
    with Step(f"tokenizing {len(train_set)} {method.rows_are}", forks=True), _told_by(trainer_class.__module__) as told:
        trainer: Any = type("Trainer", (TokenBudget, Fixes, *method.mixins, trainer_class), {})(
            model=model,
            args=args,
            train_dataset=train_set,
            eval_dataset=eval_sets,
            processing_class=tokenizer,
        )
    trainer.checkpoint_limit = recipe.train.save_total_limit
    _check_nothing_dropped(train_set["id"], trainer.train_dataset["id"], recipe, method.rows_are)
    trainer.remarks = [*told, *check_answers(recipe, trainer.train_dataset, method.rows_are)]
    if recipe.model.adapter is None and "ref" in trainer.model.peft_config:
        # TRL's frozen copy of a fresh LoRA, B = 0, equals the base, which TRL takes where there is no copy. Saved with
        # a checkpoint, transformers (5.17) would restore the copy and not the policy.
        trainer.model.delete_adapter("ref")
    for parameter in trainer.model.parameters():
        # TRL casts the LoRA of a 4-bit model to bfloat16, where a step of a small learning rate rounds to nothing, and
        # PEFT loads it back as float32 at a resume. Unsloth's is float32, like PEFT's own of a 16-bit model.
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer


def total_steps(trainer: Any) -> int:
    """Optimizer steps of the whole run."""
    args = trainer.args
    epoch = math.ceil(len(trainer.train_dataset) / trainer.get_total_train_batch_size(args))
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)


class NewRate(TrainerCallback):
    """Says at what learning rate more steps go on, once the checkpoint has been loaded."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        rate, step = optimizer.param_groups[0]["lr"], state.global_step + 1
        self.say(f"  learning rate {rate:.2e} at step {step}: the schedule is laid out anew over all steps")


# ------------------------------------------------------------------------------------------------------------ pieces


@contextmanager
def _told_by(module: str) -> Iterator[list[str]]:
    """What a module of TRL warns of meanwhile, as remarks and not as it would print them."""
    told, logger = list[str](), logging.getLogger(module)

    def keep(record: logging.LogRecord) -> bool:
        told.append("! " + record.getMessage().removeprefix("[RANK 0] "))  # accelerate's
        return False

    logger.addFilter(keep)
    try:
        yield told
    finally:
        logger.removeFilter(keep)


def _check_longer(recipe: Recipe, steps: int, begun: Start) -> None:
    """A fraction of an epoch more may round to the steps that are done."""
    if begun.longer and steps <= begun.step:
        raise DpoError(
            f"that is {steps} steps, and the finished run has {begun.step}",
            where=recipe.where("train", "num_train_epochs"),
            hint="raise it further",
        )


def _begin(recipe: Recipe, run: Run, begun: Start, facts: dict[str, Any], log: Path) -> dict[str, Any]:
    """Write down that the training has begun, and cut its log back to where it starts."""
    record = run.started("train", recipe) | facts
    continued = run.record("train").get("continued_from", []) if begun.checkpoint else []
    if begun.longer or continued:
        record["continued_from"] = [*continued, *([begun.step] if begun.longer else [])]
    if begun.checkpoint is None:
        run.forget("train")  # first: a log or checkpoints that go belong to no record
    run["train"].mkdir(parents=True, exist_ok=True)
    start_log(log, run.checkpoints, begun, recipe.train.save_total_limit)
    run.write_record("train", recipe, record)
    return record


def _go(recipe: Recipe, trainer: Any, begun: Start, record: dict[str, Any]) -> None:
    """Train, or restore a training that had come to its last step, where transformers would take one step more."""
    checkpoint = begun.checkpoint
    if checkpoint and is_last(checkpoint, record.get("continued_from", [])):
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
        folder = best_checkpoint(checkpoint.parent, best) if best else checkpoint
        adapters.load_adapter_weights(trainer.accelerator.unwrap_model(trainer.model), folder)
        return
    trainer.still = -1 if checkpoint else 0
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        tried = "" if recipe.engine.preflight else "set engine.preflight: true, "
        raise DpoError(
            f"memory ran out in step {trainer.state.global_step + 1} of {trainer.state.max_steps}",
            where=recipe.where("engine", "preflight"),
            hint=f"{tried}end what else uses the card (nvidia-smi names it); the same command goes on from the last "
            "checkpoint, or start over with --fresh and a lower engine.memory_limit",
        ) from error


def _check_not_stopped(run: Run, trainer: Any, stop: StopAfterStep) -> None:
    state = trainer.state
    if stop.asked and state.global_step < state.max_steps:
        raise DpoError(
            f"interrupted after step {state.global_step} of {state.max_steps}, which is saved",
            where=str(run.checkpoints),
            hint="the same command goes on from there",
            exit_code=INTERRUPTED,
        )


def _save(recipe: Recipe, run: Run, trainer: Any, record: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Write adapter, log and metrics on the main process; a sharded model is put together by all of them."""
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None

    def write() -> None:
        record["seconds"] = metrics["seconds"]
        with run.stage("train", recipe, record) as draft:
            adapter = draft.folder / "adapter"
            trainer.model.save_pretrained(str(adapter), state_dict=weights, selected_adapters=["default"])
            _sort_modules(adapter / "adapter_config.json")
            trainer.processing_class.save_pretrained(str(adapter))
            shutil.copyfile(run["train"] / "log.jsonl", draft.folder / "log.jsonl")
            write_json(draft.folder / "metrics.json", metrics)

    processes.from_main(write)


def _summary(recipe: Recipe, run: Run, metrics: dict[str, Any]) -> str:
    best = metrics.get("best")
    kept = f", step {best['step']} was the best" if best else ""
    rows_are = METHODS[recipe.train.method].rows_are
    rate = f"{metrics[f'{rows_are}_per_second']:.1f} {rows_are}/s"
    return f"train: {metrics['steps']} steps in {metrics['seconds']:.0f} s, {rate}{kept} -> {run.adapter}"


def _sort_modules(config: Path) -> None:
    """PEFT writes `target_modules` in another order in each process; equal trainings should give equal files."""
    content = read_json(config)
    if isinstance(content["target_modules"], list):
        content["target_modules"].sort()
    config.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def _metrics(recipe: Recipe, trainer: Any, log: Path, seconds: float, resumed_from: int) -> dict[str, Any]:
    """`train/metrics.json`; rates count this session's steps only."""
    lines = log.read_text(encoding="utf-8").splitlines() if processes.is_main() else []
    state, size = trainer.state, len(trainer.train_dataset)
    step_rows = trainer.get_total_train_batch_size(trainer.args)
    per_epoch = math.ceil(size / step_rows)  # an epoch's last step has what is left

    def rows_until(step: int) -> int:
        return step // per_epoch * size + min(step % per_epoch * step_rows, size)

    done = rows_until(state.global_step) - rows_until(resumed_from)
    metrics = {
        "steps": state.global_step,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(float(trainer._total_train_tokens) / seconds, 1),
        f"{METHODS[recipe.train.method].rows_are}_per_second": round(done / seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "final": json.loads(lines[-1]) if lines else {},
        "resumed_from": resumed_from or None,
    }
    if state.best_global_step:
        metrics["best"] = {trainer.args.metric_for_best_model: state.best_metric, "step": state.best_global_step}
    return metrics


def _facts(recipe: Recipe, trainer: Any) -> dict[str, Any]:
    """What the manifest keeps of a training beside what every stage's record has."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": processes.count(),
        "revisions": models.revisions(recipe, trainer.model),
        "chat_template_sha256": chat.chat_template_sha256(trainer.processing_class),
        "effective_lora_dropout": 0.0 if getattr(recipe.train, "disable_dropout", False) else recipe.lora.dropout,
    }


def _watchers(recipe: Recipe, trainer: Any, quiet: bool) -> Iterator[TrainerCallback]:
    """What looks at the figures as they come: the watchdog, and the early stopping that the recipe asks for."""
    train, method = recipe.train, METHODS[recipe.train.method]
    # The heavier label, so that a run is never called worse than no training too early.
    weights = [max(method.label_weights(train))] if method.label_weights else None
    watchdog = Watchdog(
        losses=train.losses,
        beta=train.reward_scale,
        batch=trainer.get_total_train_batch_size(trainer.args),
        steps=total_steps(trainer),
        weights=getattr(train, "loss_weights", weights),
        method=method,
    )
    yield WatchdogCallback(watchdog, (lambda remark: None) if quiet else print_remark)
    if recipe.engine.early_stopping:
        yield EarlyStoppingCallback(recipe.engine.early_stopping.patience)


def _introduction(recipe: Recipe, trainer: Any, begun: Start, device: str) -> str:
    """What is trained, on what, and from where."""
    name, method = recipe.train.method, METHODS[recipe.train.method]
    step = trainer.get_total_train_batch_size(trainer.args)
    by = "" if name == DEFAULT_METHOD else f" by {name}"
    split = " (pairs split in two)" if recipe.data.format == "pairs" and method.label_weights else ""
    from_step = f", {'on' if begun.longer else 'resumed'} from step {begun.step}" if begun.step else ""
    finished = " of the finished run" if begun.longer else ""
    rows = f"{len(trainer.train_dataset)} {method.rows_are}{split}"
    return f"train: {rows}, {step} a step{by}, on {device}{from_step}{finished}"


def _notes(recipe: Recipe, trainer: Any) -> list[str]:
    """What of the method and the machine a person should know before it runs."""
    method, train = METHODS[recipe.train.method], recipe.train
    notes = [] if method.reference else [f"no reference: {train.method} needs none"]
    low = next((name for name in train.losses if train.reward_scale < LOSSES[name].least_beta), None)
    if low:
        notes.append(f"! train.beta {train.beta:g} is of DPO's size; {low} weighs log-probabilities per token: about 2")
    if trainer.args.device.type == "cuda" and processes.count() == 1 and torch.cuda.device_count() > 1:
        notes.append(f"one of {torch.cuda.device_count()} GPUs: accelerate launch -m dpo_cli train … takes all")
    end = chat.unnamed_end(trainer.model.generation_config, trainer.processing_class)
    if end:
        notes.append(f"! generation_config does not name {end}, which ends an answer: eval stops there, export adds it")
    steps = total_steps(trainer)
    warmup = trainer.args.get_warmup_steps(steps)
    if warmup and warmup >= steps:
        notes.append(f"! the warm-up takes {warmup} steps and the run {steps}: train.learning_rate is never reached")
    return notes


def _check_nothing_dropped(given: Sequence[str], kept: Sequence[str], recipe: Recipe, what: str) -> None:
    """TRL leaves out rows whose prompt alone fills `max_length`, without a word."""
    there = set(kept)
    gone = [one for one in given if one not in there]
    if gone:
        named = ", ".join(gone[:3]) + (" …" if gone[3:] else "")
        raise DpoError(
            f"the prompts of {len(gone)} of {len(given)} {what} fill all {recipe.model.max_length} tokens: {named}",
            where=recipe.where("model", "max_length"),
            hint="raise model.max_length, or switch data.filters.too_long back on",
        )
