"""One training run: TRL's DPOTrainer on the prepared pairs, every argument passed, resumable, and its log kept."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli import models
from dpo_cli.errors import INTERRUPTED, DpoError
from dpo_cli.recipe import Recipe
from dpo_cli.records import read_pairs
from dpo_cli.run import Run, replace, write_json
from dpo_cli.train.memory import parse_memory_limit
from dpo_cli.train.methods import METHODS
from dpo_cli.train.preflight import fit, use_micro_batch
from dpo_cli.train.progress import StopAfterStep, peak_memory, print_remark, progress_callback
from dpo_cli.train.watchdog import Watchdog, check_finite
from dpo_cli.train.watchdog import callback as watchdog_callback

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("id", "prompt", "chosen", "rejected", "chat_template_kwargs")


@dataclass(frozen=True)
class Trained:
    """What `train` prints when it is done: where the adapter is, and `train/metrics.json`."""

    adapter: Path
    backend: models.Backend
    metrics: dict[str, Any]


def train(recipe: Recipe, run: Run, *, fresh: bool = False, quiet: bool = False) -> Trained:
    """Train a LoRA on `data/train.jsonl`; a run that was cut short goes on from its last whole checkpoint.

    Raises:
        DpoError: the run to be resumed was made from something else, the data don't fit the model, or it was
            interrupted (exit code 130).
    """
    checkpoint = None if fresh else _checkpoint_to_resume(recipe, run)
    backend = models.choose_backend(recipe)
    models.import_backend(backend)
    model, tokenizer = models.load_for_training(recipe, backend)

    import torch
    import trl  # after Unsloth, which patches its classes

    method = METHODS[recipe.train.method]
    if backend.name == "unsloth" and not getattr(trl, method.trainer).__name__.startswith("Unsloth"):
        raise DpoError("Unsloth did not replace TRL's trainer", hint="set engine.backend: hf, or reinstall unsloth")
    config = _config(recipe, run, getattr(trl, method.config))
    train_set = _dataset(run.train_pairs)
    eval_sets = _eval_sets(run.eval_pairs) if recipe.train.eval_strategy != "no" else None
    log = run["train"] / "log.jsonl"
    stop = StopAfterStep()
    trainer = _careful(getattr(trl, method.trainer))(
        model=model,
        args=config,
        train_dataset=train_set,
        eval_dataset=eval_sets,
        processing_class=tokenizer,
        callbacks=[progress_callback(log, stop, quiet)],
    )
    _check_nothing_dropped(len(train_set), len(trainer.train_dataset), recipe)
    if recipe.model.adapter is None:
        _forget_reference_copy(trainer.model)
    _remove_printers(trainer)
    micro_batch = _fit(recipe, run, trainer, checkpoint is not None, quiet)
    watchdog = Watchdog(
        losses=recipe.train.loss_type,
        beta=recipe.train.beta,
        batch=trainer.get_total_train_batch_size(config),
        weights=recipe.train.loss_weights,
        max_grad_norm=recipe.train.max_grad_norm,
        fp16=config.fp16,
    )
    trainer.add_callback(watchdog_callback(watchdog, (lambda remark: None) if quiet else print_remark))

    commit = getattr(model.config, "_commit_hash", None)  # of a hub repository
    record = run.started("train", recipe) | {
        "backend": backend.name,
        "micro_batch": micro_batch,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "revisions": {recipe.model.id: commit} if commit else {},
        "chat_template_sha256": models.chat_template_sha256(tokenizer),
        "effective_lora_dropout": 0.0 if recipe.train.disable_dropout else recipe.lora.dropout,
    }
    run["train"].mkdir(parents=True, exist_ok=True)
    resumed_from = _start_log(log, run.checkpoints, checkpoint)
    run.write_record("train", recipe, record)
    if not quiet:
        steps, pairs = trainer.get_total_train_batch_size(config), len(trainer.train_dataset)
        again = f", resumed from step {resumed_from}" if resumed_from else ""
        print(f"train: {pairs} pairs, {steps} a step, on {record['device']}{again}")
        print(f"  backend {backend.name}: {backend.why}", flush=True)

    start = time.monotonic()
    with stop:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - start
    if stop.asked and trainer.state.global_step < trainer.state.max_steps:
        raise DpoError(
            f"interrupted after step {trainer.state.global_step} of {trainer.state.max_steps}, which is saved",
            where=str(run.checkpoints),
            hint="the same command goes on from there",
            exit_code=INTERRUPTED,
        )

    metrics = _metrics(trainer, log, seconds, resumed_from)
    record["seconds"] = round(seconds, 3)
    with run.stage("train", recipe, record) as draft:
        trainer.model.save_pretrained(str(draft.folder / "adapter"), selected_adapters=["default"])
        tokenizer.save_pretrained(str(draft.folder / "adapter"))
        write_json(draft.folder / "metrics.json", metrics)
    return Trained(run.adapter, backend, metrics)


# ------------------------------------------------------------------------------------------------------------ pieces


def _config(recipe: Recipe, run: Run, config_class: Any) -> Any:
    """TRL's config with every argument passed, because Unsloth changes the defaults of those that are not."""
    from dataclasses import fields

    import torch

    on_gpu = torch.cuda.is_available()
    dtype = models.resolve_dtype(recipe)
    if not on_gpu and (recipe.train.fp16 or dtype == torch.float16):
        key = ("train", "fp16") if recipe.train.fp16 else ("model", "dtype")
        raise DpoError("float16 training needs a GPU", where=recipe.where(*key), hint="remove it; a CPU takes float32")
    mixed = on_gpu and recipe.train.bf16 is None and not recipe.train.fp16
    arguments = recipe.train.model_dump(exclude={"method"}) | {
        "output_dir": str(run.checkpoints),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "max_length": recipe.model.max_length,
        "use_cpu": not on_gpu,
        "bf16": dtype == torch.bfloat16 if mixed else bool(recipe.train.bf16),
        "fp16": dtype == torch.float16 if mixed else recipe.train.fp16,
        "disable_tqdm": True,
        "run_name": recipe.train.run_name or recipe.name,
        # Two CPUs pin no memory, and asking for it prints a warning.
        "dataloader_pin_memory": recipe.train.dataloader_pin_memory and on_gpu,
    }
    known = {field.name for field in fields(config_class)}
    foreign = [name for name in recipe.train.model_fields_set if name not in known and name != "method"]
    if foreign:
        raise DpoError(
            f"the installed TRL has no argument {foreign[0]}",
            where=recipe.where("train", foreign[0]),
            hint="remove it, or install the TRL that `dpo-cli doctor` names",
        )
    return config_class(**{name: value for name, value in arguments.items() if name in known})


def _dataset(path: Path) -> Dataset:
    """The pairs as TRL reads them; on disk, so that its tokenisation is cached."""
    from datasets import load_dataset

    return load_dataset("json", data_files=str(path), split="train").select_columns(list(COLUMNS))


def _eval_sets(path: Path) -> dict[str, Dataset]:
    """The held-out pairs by language, so that TRL logs `eval_en_loss`, `eval_zh_loss` and so on."""
    from datasets import Dataset

    by_language: dict[str, list[dict[str, Any]]] = {}
    for pair in read_pairs(path):
        row = {name: getattr(pair, name) for name in COLUMNS}
        by_language.setdefault(pair.language, []).append(row)
    return {language: Dataset.from_list(rows) for language, rows in sorted(by_language.items())}


def _check_nothing_dropped(given: int, kept: int, recipe: Recipe) -> None:
    """TRL leaves out rows whose prompt alone fills `max_length`, without a word."""
    if kept < given:
        raise DpoError(
            f"the prompts of {given - kept} of {given} pairs fill all {recipe.model.max_length} tokens",
            where=recipe.where("model", "max_length"),
            hint="raise model.max_length, or switch data.filters.too_long back on",
        )


def _fit(recipe: Recipe, run: Run, trainer: Any, resumed: bool, quiet: bool) -> int:
    """The pairs of a micro-batch after the preflight; a resumed run keeps its own, for its numbers to stay the same."""
    asked = recipe.train.per_device_train_batch_size
    if resumed:
        micro_batch = run.record("train").get("micro_batch", asked)
        use_micro_batch(trainer, micro_batch)
    elif recipe.engine.preflight:
        micro_batch = fit(trainer, parse_memory_limit(recipe.engine.memory_limit))
    else:
        micro_batch = asked
    if micro_batch != asked and not quiet:
        steps = trainer.args.gradient_accumulation_steps
        print(f"train: {asked} pairs at once don't fit the memory: {micro_batch} at once, {steps} times a step")
    return int(micro_batch)


def _forget_reference_copy(model: Any) -> None:
    """Remove the frozen copy of a fresh LoRA that TRL adds as its reference.

    With B = 0 the copy equals the base model, which TRL takes as the reference where there is no copy. Kept, it
    would be saved with each checkpoint, and transformers (seen with 5.17) then restores the copy and not the policy.
    """
    if "ref" in model.peft_config:
        model.delete_adapter("ref")


def _careful(trainer_class: Any) -> Any:
    """TRL's trainer with two mends: a loss that is no number stops the run, and a resume restores the policy."""
    import torch

    class Trainer(trainer_class):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, inputs, *args, **kwargs)
            if not torch.isfinite(loss):
                check_finite(float(loss), _ids_of(inputs, self.train_dataset))
            return loss

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            # Where a checkpoint holds a copy of the reference, transformers (seen with 5.17) restores only that.
            models.load_adapter_weights(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    return Trainer


def _ids_of(inputs: Any, dataset: Any) -> list[str]:
    """The ids of the pairs in a TRL batch, whose first half is the chosen sequences, found by their tokens."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    wanted = {tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True)}
    found = []
    for row in dataset:
        tokens = tuple(row["prompt_ids"] + row["chosen_ids"])
        if any(one and one == tokens[: len(one)] for one in wanted):
            found.append(row["id"])
    return found


def _remove_printers(trainer: Any) -> None:
    """transformers' own log printers; ours says the same in one line."""
    from transformers import PrinterCallback, ProgressCallback

    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)


def _checkpoint_to_resume(recipe: Recipe, run: Run) -> Path | None:
    """The last whole checkpoint of a run that was cut short; None to start over.

    Raises:
        DpoError: it was made from another recipe or other data.
    """
    state = run.state("train", recipe)
    if state.kind != "cut_short":
        return None
    checkpoint = _last_checkpoint(run.checkpoints)
    changed = run.changes("train", recipe)
    if checkpoint and changed:
        raise DpoError(
            f"a run of something else was cut short here: {'; '.join(changed[:5])}",
            where=str(run.checkpoints),
            hint="undo the change to go on with it, or start over with --fresh",
        )
    return checkpoint


def _last_checkpoint(folder: Path) -> Path | None:
    # trainer_state.json is the last file of a checkpoint, so one without it was cut off while being written.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _start_log(log: Path, checkpoints: Path, checkpoint: Path | None) -> int | None:
    """Begin `log.jsonl`, or cut it back to the checkpoint's step; returns that step."""
    import shutil

    if checkpoint is None:
        shutil.rmtree(checkpoints, ignore_errors=True)
        log.unlink(missing_ok=True)
        return None
    step = _step(checkpoint)
    for later in checkpoints.glob("checkpoint-*"):
        if _step(later) > step:
            shutil.rmtree(later)
    rows = [line for line in log.read_text(encoding="utf-8").splitlines() if _logged_until(line, step)]
    aside = log.with_suffix(".new")
    aside.write_text("".join(line + "\n" for line in rows), encoding="utf-8")
    replace(aside, log)
    return step


def _logged_until(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (json.JSONDecodeError, KeyError):
        return False  # a line that was cut off in the middle


def _metrics(trainer: Any, log: Path, seconds: float, resumed_from: int | None) -> dict[str, Any]:
    """`train/metrics.json`; rates count this session's steps only."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    final = rows[-1] if rows else {}
    steps = trainer.state.global_step
    done = steps - (resumed_from or 0)
    pairs = len(trainer.train_dataset) * trainer.state.epoch * done / steps
    return {
        "steps": steps,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(float(trainer._total_train_tokens) / seconds, 1),
        "pairs_per_second": round(pairs / seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "final": final,
        "resumed_from": resumed_from,
    }
